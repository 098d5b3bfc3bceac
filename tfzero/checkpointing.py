"""Saving and loading checkpoints, by all workers together."""

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import keras

from tfzero import commits
from tfzero.channel import Channel
from tfzero.checkpoint import Writer, check_fits, patience, pieces_to_write, read_state, snapshot, together
from tfzero.joining import channel_of_one
from tfzero.progress import progress
from tfzero.state import METRICS, Item, World, bucket_bytes_of, optimizers_of, state_of
from tfzero.strategy import ZeroStrategy

_SAVE_SECONDS = 60.0  # for workers without a strategy's timeout


def save_checkpoint(model: keras.Model, directory) -> Path:
    """Saves all that the training of a model goes on from. All workers call it, between steps.

    Every worker writes its own shards. Any number of workers at any stage can load it, and so can plain Keras;
    `tf.train.load_checkpoint` reads its variables, each whole and in its own shape: the files are TensorFlow's tensor
    bundles (`tensorflow/core/util/tensor_bundle`).

    Args:
        model: a compiled and built Keras model.
        directory: a directory of checkpoints, which all workers see.

    Returns:
        The new checkpoint, a `Path`: `directory/step-...`, by the optimizer's number of steps.

    Raises:
        OSError: on all workers, if one of them cannot write, or if another run writes there.
        ValueError: for a model of several replicas of another strategy.

    Example:

    ```python
    folder = tfzero.save_checkpoint(model, "by_hand")
    kernel = tf.train.load_checkpoint(folder).get_tensor(f"model/{model.layers[-1].kernel.path}")
    ```
    """
    team = Team.of(model)
    folder = commits.step_folder(Path(directory), int(model.optimizer.iterations) if model.optimizer else 0)
    with contextlib.closing(Save(team, model, Path(directory))) as save:
        save.open()
        save.start(folder, {"step": int(folder.name.rpartition("-")[2]), "position": None}, asynchronous=False)
    return folder


def load_checkpoint(model: keras.Model, directory) -> int:
    """Gives a model, its optimizer and its metrics the values of a checkpoint. All workers call it, between steps.

    Args:
        model: a compiled and built Keras model: of a `ZeroStrategy`, or a plain one on one device.
        directory: a checkpoint, or a directory of several, of which the newest that is not damaged is taken.

    Returns:
        The number of steps that it was trained for.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        DamagedCheckpointError: if the checkpoint that was asked for is damaged; the message names the file.
        ValueError: if the checkpoint is one of another model or optimizer, or was written by a newer tfzero.

    Example:

    ```python
    tfzero.save_checkpoint(model, "to_go_on")
    steps = tfzero.load_checkpoint(model, "to_go_on")
    ```
    """
    team = Team.of(model)
    directory = Path(directory)
    if directory.name.startswith("step-"):
        found = directory, open_checkpoint(directory, team)
    else:
        found = find_newest(directory, team)
    if found is None:
        raise FileNotFoundError(f"There is no complete checkpoint in {directory}.")
    restore(model, *found, team)
    return found[1]["step"]


@dataclass(frozen=True)
class Team:
    """The workers that save and load together.

    Args:
        channel: between them.
        world: this process's place.
        stage: of their strategy; None for plain Keras.
        timeout_seconds: how long they wait for each other.
    """

    channel: Channel
    world: World
    stage: int | None
    timeout_seconds: float

    @classmethod
    def of(cls, model: keras.Model) -> "Team":
        """The team for a model's own control channel for saving."""
        strategy = model.distribute_strategy
        if isinstance(strategy, ZeroStrategy):
            settings = strategy.settings
            return cls(strategy.saving_channel, World.of(strategy), settings.stage, settings.timeout_seconds)
        if strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"tfzero's checkpoints are for models of a ZeroStrategy or of one device. Received: {strategy!r}"
            )
        return cls(channel_of_one(), World.of(strategy), None, _SAVE_SECONDS)

    @property
    def is_chief(self) -> bool:
        return self.world.worker == 0

    def together(self, what: str, function):
        """The first worker's answer of `function`, which fails on all if it fails on one. For short work."""
        return together(self.channel, what, function)[0]


def open_checkpoint(folder: Path, team: Team) -> dict:
    """A checkpoint's manifest, when every file has been checked; the workers share the work.

    Raises:
        DamagedCheckpointError: on all workers, naming what is damaged.
        ValueError: if it was written by a newer tfzero.
    """
    manifest: dict = {}
    damages: list[str] = []
    newer = ""
    try:
        manifest = commits.read_manifest(folder)
        damages = commits.find_damage(folder, manifest, team.world.worker, team.world.workers)
    except commits.DamagedCheckpointError as error:
        damages = [str(error)]
    except ValueError as error:
        newer = str(error)
    seconds = patience(team.timeout_seconds, sum(size for size, _ in manifest.get("files", {}).values()))
    answers = team.channel.all_gather(f"opening {folder}", [damages, newer], seconds)
    newer = next((text for _, text in answers if text), "")
    if newer:
        raise ValueError(newer)
    found = list(dict.fromkeys(damage for theirs, _ in answers for damage in theirs))
    if found:
        raise commits.DamagedCheckpointError(f"The checkpoint {folder} is damaged: {'; '.join(found)}.")
    return manifest


def find_newest(directory: Path, team: Team) -> tuple[Path, dict] | None:
    """The newest checkpoint that is not damaged, and its manifest; warns of those that are."""
    names = team.together("looking for checkpoints", lambda: [path.name for path in commits.checkpoints(directory)])
    for name in names:
        try:
            return directory / name, open_checkpoint(directory / name, team)
        except commits.DamagedCheckpointError as error:
            warnings.warn(f"{error} The one before it is used.", stacklevel=2)
    return None


def restore(model: keras.Model, folder: Path, manifest: Mapping, team: Team, only: str | None = None) -> None:
    """Gives the variables of a model the values of a checkpoint, all or one group of them."""
    if not model.built:
        raise ValueError("A checkpoint is loaded into a built model: call `model.build(...)` or the model first.")
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    items = [item for item in state_of(model) if only in (None, item.group)]
    if manifest["position"] is None or not manifest["position"]["batch"]:
        items = [item for item in items if item.group != METRICS]  # begins anew, and may be another
    entries = check_fits(items, manifest, folder, optimizers_of(model))
    with progress("restoring", sum(item.bytes for item in items), unit="bytes", shown=team.is_chief) as bar:
        read_state(folder, items, entries, team.world, bar.advance)
    if only is None and manifest["world_size"] == team.world.size:
        for name in bucket_bytes_of(model):
            if name in manifest.get("bucket_bytes", {}):
                getattr(model, name).repeat_bucket_bytes(manifest["bucket_bytes"][name])


class Save:
    """Writes checkpoints of a model into a directory, one after the other, also in the background.

    Args:
        team: the workers.
        model: the model.
        directory: of the checkpoints.
        keep: how many to keep; None for all.
    """

    def __init__(self, team: Team, model: keras.Model, directory: Path, keep: int | None = None) -> None:
        self._team = team
        self._model = model
        self._directory = directory
        self._keep = keep
        self._lock: commits.Lock | None = None
        self._thread: Thread | None = None
        self._problem: OSError | None = None

    def open(self) -> None:
        """Takes the directory for this run, before anything is trained.

        Raises:
            OSError: on all workers, if one of them cannot write there, if there is no room, or if another run does.
        """
        needed = sum(item.bytes for item in state_of(self._model))

        def take():
            commits.check_room(self._directory, needed if self._team.is_chief else 0)
            if self._team.is_chief:
                self._lock = commits.Lock(self._directory)
                commits.tidy(self._directory)

        self._team.together("opening the directory of checkpoints", take)

    def start(self, folder: Path, about: Mapping, asynchronous: bool) -> None:
        """Begins to write one checkpoint, when the one before is written; asynchronous is when it is only copied."""
        self.wait()
        items = state_of(self._model)
        manifest = {
            **about,
            "stage": self._team.stage,
            "world_size": self._team.world.size,
            "optimizers": optimizers_of(self._model),
            "bucket_bytes": bucket_bytes_of(self._model),
        }
        title, size_bytes = "copying" if asynchronous else "saving", sum(item.bytes for item in items)
        with progress(title, size_bytes, unit="bytes", shown=self._team.is_chief) as bar:
            pieces: Iterator = pieces_to_write(items, self._team.world, bar.advance)
            if not asynchronous:
                self._write(folder, pieces, items, manifest)
                return self.wait()
            pieces = _drain(deque(snapshot(pieces)))
        self._thread = Thread(target=self._write, args=(folder, pieces, items, manifest), name="tfzero save")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            OSError: if a checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def close(self) -> None:
        """Lets the directory go."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(self, folder: Path, pieces: Iterator, items: Sequence[Item], manifest: Mapping) -> None:
        team = self._team
        try:
            Writer(team.channel, team.world, folder, team.timeout_seconds).write(pieces, items, manifest)
            if self._keep is not None and team.is_chief:
                commits.prune(self._directory, self._keep)
        except (OSError, RuntimeError, ValueError) as error:
            self._problem = error


def _drain(pieces: deque) -> Iterator:
    """Gives pieces away, so that each is freed when it has been written."""
    while pieces:
        yield pieces.popleft()
