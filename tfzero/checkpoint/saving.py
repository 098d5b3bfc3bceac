"""Saves and loads checkpoints, by all workers together."""

import contextlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock, Thread

import keras

from tfzero.checkpoint import commits, directories
from tfzero.checkpoint.opening import Search, Team, find_newest, open_checkpoint, writing
from tfzero.checkpoint.outer import mergers_of, whole_state_of
from tfzero.checkpoint.pieces import Writer, check_fits, patience, pieces_to_write, read_state, snapshot
from tfzero.checkpoint.served import ServedItem, first_does, items_on_servers, restore_for_all
from tfzero.checkpoint.state import METRICS, Item, bucket_bytes_of, build_optimizer, optimizers_of
from tfzero.checkpoint.teamwork import together
from tfzero.host import notes
from tfzero.servers.parts import Number
from tfzero.strategy import ZeroStrategy
from tfzero.workers.progress import progress


def save_checkpoint(model: keras.Model, directory: str | os.PathLike[str]) -> Path:
    """Saves the whole training state of a model. All workers call it, between steps.

    Every worker writes its own shards. Any number of workers at any stage can load the checkpoint, and so can plain
    Keras. `tf.train.load_checkpoint` reads its variables, each whole and in its own shape: the files are TensorFlow's
    tensor bundles (`tensorflow/core/util/tensor_bundle`).

    Args:
        model: a compiled and built Keras model.
        directory: a directory of checkpoints, which all workers see.

    Returns:
        The `Path` of the new checkpoint: `directory/step-...`, with the optimizer's number of steps.

    Raises:
        OSError: on all workers, if one of them cannot write, or if another run writes there.
        ValueError: for a model that is not built, or has several replicas of another strategy, and for a URL.

    Example:

    ```python
    folder = tfzero.save_checkpoint(model, "by_hand")
    kernel = tf.train.load_checkpoint(folder).get_tensor(f"model/{model.layers[-1].kernel.path}")
    ```
    """
    directory = directories.local_path(directory)
    team = Team.of(model)
    build_optimizer(model)

    def save_all() -> int:
        step = int(model.optimizer.iterations) if model.optimizer else 0
        with contextlib.closing(Save(team, model, directory)) as save:
            save.open()
            save.start(step, None, asynchronous=False)
        return step

    step = save_all() if team.served is None else first_does(team.served, "saving a checkpoint", save_all)
    return directories.step_folder(directory, int(model.optimizer.iterations) if step is None else step)


def load_checkpoint(model: keras.Model, directory: str | os.PathLike[str]) -> int:
    """Restores a model, its optimizer and its metrics from a checkpoint. All workers call it, between steps.

    Metrics in progress are restored only if the model has been trained or evaluated: before, Keras has not made them.

    Args:
        model: a compiled and built Keras model: of a `ZeroStrategy`, or a plain one on one device.
        directory: a checkpoint, or a directory of several: then the newest undamaged one is taken.

    Returns:
        The number of steps that the checkpoint was trained for.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        DamagedCheckpointError: if the given checkpoint is damaged, or all are; the message names what is damaged.
        OSError: if a checkpoint is there but cannot be read. It may be whole, so none before it is taken.
        ValueError: if the checkpoint is of another model or optimizer, or a newer tfzero wrote it.

    Example:

    ```python
    tfzero.save_checkpoint(model, "to_go_on")
    steps = tfzero.load_checkpoint(model, "to_go_on")
    ```
    """
    directory = directories.local_path(directory)
    team = Team.of(model)

    def load(number: Number | None = None) -> tuple[int, None]:
        folder, manifest = _find(directory, team)
        restore(model, folder, manifest, team, number=number)
        return manifest["step"], None

    if team.served is None:
        return load()[0]
    step = restore_for_all(model, team.served, "loading a checkpoint", load)
    return int(model.optimizer.iterations) if step is None else step


def _find(directory: Path, team: Team) -> tuple[Path, dict]:
    """The checkpoint that a user means by a directory, and its manifest."""

    def is_one() -> bool:
        is_named_so = directories.step_of(directory) is not None and directory.is_dir()
        return commits.is_checkpoint(directory) or (is_named_so and not directories.checkpoints(directory))

    if team.together("looking for a checkpoint", is_one):
        return directory, open_checkpoint(directory, team)
    search: Search = find_newest(directory, team)
    if search.found is None and search.damaged:
        names = ", ".join(search.damaged)
        raise commits.DamagedCheckpointError(f"Every checkpoint in {directory} is damaged: {names}.")
    if search.found is None:
        raise FileNotFoundError(f"There is no complete checkpoint in {directory}.")
    return search.found


def restore(model: keras.Model, folder: Path, manifest: Mapping, team: Team, only: str | None = None,
            number: Number | None = None) -> None:  # fmt: skip
    """Restores the variables of a model from a checkpoint.

    Args:
        model: the model.
        folder: of the checkpoint.
        manifest: of it.
        team: the workers that restore.
        only: the section of variables to restore; None for all.
        number: under which servers are assigned what they hold; None without servers.
    """
    strategy = model.distribute_strategy
    if only is None and isinstance(strategy, ZeroStrategy):
        strategy.merge("loading a checkpoint")  # other models may be in the middle of a window
    build_optimizer(model)
    items = [item for item in whole_state_of(model) if only in (None, item.section)]
    if manifest["position"] is None or not manifest["position"]["batch"]:
        items = [item for item in items if item.section != METRICS]  # they begin anew, and may be others
    elif any(not getattr(metric, "built", True) for metric in model.metrics):
        items = [item for item in items if item.section != METRICS]  # Keras makes them in the first step, at zero
    if number is not None:
        items = items_on_servers(team.served, items, number)
    entries = check_fits(items, manifest, folder, optimizers_of(model))
    size_bytes = sum(item.bytes for item in items)
    with progress("restoring", size_bytes, unit="bytes", shown=team.is_chief) as bar:

        def read() -> None:
            read_state(folder, items, entries, team.mesh, bar.advance)

        together(team.channel, f"reading {folder}", read, patience(team.timeout_seconds, size_bytes))
    if only is None and isinstance(strategy, ZeroStrategy):
        strategy.local_steps.forget()
        for merger in mergers_of(model).values():
            merger.take_up()
    if only is None and number is None and manifest["world_size"] == team.mesh.replicas:
        for name in bucket_bytes_of(model):
            if name in manifest.get("bucket_bytes", {}):
                getattr(model, name).repeat_bucket_bytes(manifest["bucket_bytes"][name])


class Save:
    """Writes checkpoints of a model into a directory, one after the other, on request in the background.

    Args:
        team: the workers.
        model: the model.
        directory: of the checkpoints.
        keep: how many to keep; None for all.
        damaged: names of checkpoints there that are known to be damaged.
    """

    def __init__(
        self, team: Team, model: keras.Model, directory: Path, keep: int | None = None, damaged: Sequence[str] = ()
    ) -> None:
        self._team = team
        self._model = model
        self._directory = directory
        self._keep = keep
        self._damaged = set(damaged)
        self._lock: directories.Lock | None = None
        self._thread: Thread | None = None
        self._problem: BaseException | None = None
        self._is_writing = False
        self._is_closed = False
        self._guard = Lock()  # either `close` releases the directory, or the thread that still writes then

    def open(self) -> None:
        """Takes the directory for this run, before anything is trained.

        Raises:
            OSError: on all workers, if one of them cannot write there, there is no room, or another run holds it.
        """
        if not self._team.takes_part:
            return
        needed = sum(item.stored_bytes(self._team.mesh) for item in whole_state_of(self._model))

        def take() -> None:
            directories.check_room(self._directory, needed if self._team.is_chief else 0)
            if self._team.is_chief:
                self._lock = directories.Lock(self._directory)
                directories.tidy(self._directory)

        self._team.together("opening the directory of checkpoints", take)

    def start(self, step: int, position: Mapping | None, asynchronous: bool) -> dict | None:
        """Begins to write the checkpoint of a step, once the one before is written.

        Args:
            step: the number of the step.
            position: the position in the data, if there is one.
            asynchronous: whether to return as soon as all is copied, and write in the background.

        Returns:
            The manifest; None if this worker does not save.
        """
        if not self._team.takes_part:
            return None
        with contextlib.nullcontext() if self._team.served is None else self._team.served.peers.busy():
            return self._start(step, position, asynchronous)

    def _start(self, step: int, position: Mapping | None, asynchronous: bool) -> dict:
        self.wait()
        if isinstance(strategy := self._model.distribute_strategy, ZeroStrategy):
            strategy.merge("saving a checkpoint")
        items = whole_state_of(self._model)
        manifest = {
            "step": step,
            "position": position,
            "stage": self._team.stage,
            "world_size": self._team.mesh.replicas,
            "optimizers": optimizers_of(self._model),
            "bucket_bytes": bucket_bytes_of(self._model),
        }
        if self._team.served is not None:
            manifest["servers"] = self._team.served.snapshot(self._team.served.keeping.remotes_of(self._model))
            items = items_on_servers(self._team.served, items)
        copied = [item for item in items if not (asynchronous and isinstance(item, ServedItem))]
        title, size_bytes = "copying" if asynchronous else "saving", sum(item.bytes for item in copied)
        with progress(title, size_bytes, unit="bytes", shown=self._team.is_chief) as bar:
            if not asynchronous:
                self._write(pieces_to_write(items, self._team.mesh, bar.advance), items, manifest)
                self.wait()
                return manifest
            copies: deque = deque()
            pieces = pieces_to_write(copied, self._team.mesh, bar.advance)
            self._team.together("copying", lambda: copies.extend(snapshot(pieces)))
        others = [item for item in items if isinstance(item, ServedItem)]  # of which servers have copies
        rest = pieces_to_write(others, self._team.mesh, lambda size_bytes: None)
        self._is_writing = True
        arguments = itertools.chain(_drain(copies), rest), items, manifest
        self._thread = Thread(target=self._write, args=arguments, name="tfzero save")
        writing[self._team.channel] = self._thread
        self._thread.start()
        return manifest

    def wait(self) -> None:
        """Waits until nothing is being written any more.

        Raises:
            OSError: on all workers, if one of them could not write a checkpoint.
            RuntimeError: on all workers, for any other error.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def close(self) -> None:
        """Releases the directory: at once, or when the current write is over."""
        with self._guard:
            self._is_closed = True
            if not self._is_writing:
                self._release()
        problem, raised = self._problem, sys.exc_info()[1]
        if problem is not None and raised is not None:
            notes.add_note(raised, f"Before that: {type(problem).__name__}: {problem}")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(self, pieces: Iterator, items: Sequence[Item], manifest: Mapping) -> None:
        team, folder = self._team, directories.step_folder(self._directory, manifest["step"])
        try:
            Writer(team.channel, team.mesh, folder, team.timeout_seconds).write(pieces, items, manifest)
            if self._keep is not None:
                self._damaged.discard(folder.name)
                team.together("deleting old checkpoints", self._prune if team.is_chief else lambda: None)
        except BaseException as error:
            self._problem = error
        if team.served is not None:
            with contextlib.suppress(ConnectionError):  # a lost server has no copies
                team.served.keeping.drop_copies()
        with self._guard:
            self._is_writing = False
            if self._is_closed:
                self._release()
                if self._problem is not None:
                    raise self._problem  # the thread shows it, as nobody waits for it any more

    def _prune(self) -> None:
        directories.prune(self._directory, self._keep, self._damaged)


def _drain(pieces: deque) -> Iterator:
    """Yields pieces and drops them, so that each is freed when it has been written."""
    while pieces:
        yield pieces.popleft()
