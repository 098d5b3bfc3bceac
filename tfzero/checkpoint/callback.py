"""CheckpointCallback: saves checkpoints during `fit`, and resumes from them."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import keras

from tfzero.checkpoint.directories import local_path
from tfzero.checkpoint.opening import Team
from tfzero.checkpoint.resuming import Resume
from tfzero.checkpoint.saving import Save
from tfzero.host import runtime
from tfzero.plan.settings import check_number
from tfzero.rows.inputs import DataPosition
from tfzero.strategy import ZeroStrategy
from tfzero.workers.stopping import EXIT_STOPPED


class CheckpointCallback(keras.callbacks.Callback):
    """Saves checkpoints during `fit`, and resumes from the newest one when `fit` is started again.

    It saves weights, slots, steps, loss scale, accumulated gradients, seed generators, metrics in progress, the epoch
    and the position in the data. A resumed run gives the result of an uninterrupted one, even in the middle of an
    epoch. The results are equal bit for bit on the same number of workers, if TensorFlow's operations are deterministic
    (`tf.config.experimental.enable_op_determinism`).

    To resume, `fit` skips the data before the saved position. Within the epoch it skips batch by batch. From each
    earlier epoch it draws only the first batch, which repeats the shuffles. With `steps_per_epoch` it draws all
    batches, as one iterator serves all epochs. Random operations in a `Dataset.map` are not repeated.

    On SIGTERM all workers save after the same step and exit with code 75. With parameter servers the first worker saves
    for all, and only it needs the directory (docs/servers.md).

    Args:
        directory: where to save, as `directory/step-...`; all workers must see it. Only one run may use it at a time.
        save_every_steps: save each time this many batches have been trained; None turns this off.
        save_every_epochs: save each time this many epochs are over; None turns this off.
        keep: how many checkpoints to keep; None for all.
        asynchronous: write in the background, from a copy of each worker's own shards.

    Raises:
        ValueError: for invalid settings.
        OSError: from `fit`, on all workers, if the directory cannot be written, lacks room, or is another run's.

    Example:

    ```python
    callback = tfzero.CheckpointCallback("run", save_every_steps=100)
    model.fit(x, y, batch_size=16, epochs=2, callbacks=[callback])  # started again, it trains no more
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_every_steps: int | None = None,
        save_every_epochs: int | None = 1,
        keep: int | None = 3,
        asynchronous: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("save_every_steps", save_every_steps),
            ("save_every_epochs", save_every_epochs),
            ("keep", keep),
        ):
            if value is not None:
                check_number(name, value, int, 1)
        if save_every_steps is None and save_every_epochs is None:
            raise ValueError("Nothing would be saved: give `save_every_steps` or `save_every_epochs`.")
        self.directory = local_path(directory)
        self.save_every_steps = save_every_steps
        self.save_every_epochs = save_every_epochs
        self.keep = keep
        self.asynchronous = asynchronous
        self.step = 0  # batches trained in total
        self._save: Save | None = None
        self._former_handler: Any = None

    # Before and after `fit` itself (`keras/training.py`).

    def prepare(self, model: keras.Model) -> None:
        """Finds the checkpoint to resume from.

        This comes before the data pipeline is made, because the pipeline must repeat its shuffles.
        """
        self._team = Team.of(model)
        names = ("directory", "save_every_steps", "save_every_epochs", "keep", "asynchronous")
        settings = {name: str(getattr(self, name)) for name in names}
        self._team.channel.agree("preparing checkpoints", settings, "settings of CheckpointCallback")
        self._resume = Resume.of(self._team, self.directory)
        self.step = self._resume.step
        self._position: dict[str, Any] = dict.fromkeys(("epoch", "batch", "epoch_batches"), 0)
        self._position |= dict.fromkeys(("first_epoch", "finished", "randomness", "passes", "steps", "batch_size"))
        self._data = DataPosition()
        self._saved: tuple | None = None
        self._due = False
        if self._resume.position is not None:
            self._position = dict(self._resume.position)
            self._data = DataPosition(
                epochs=self._position["epoch"] - (self._position["first_epoch"] or 0),
                batches=self._position["batch"],
                randomness=self._position["randomness"],
                passes=self._position.get("passes"),
                epoch_batches=self._position["epoch_batches"],
            )
            self._saved = self._mark()
        model.distribute_strategy.data_position = self._data

    def finish(self) -> None:
        """Saves at the end of training, after all other callbacks."""
        self._position["finished"] = self.params["epochs"]
        self._save_if_due()
        self._save.wait()
        if any(self._team.channel.all_gather("ending training", self._stop.is_requested)):
            raise SystemExit(EXIT_STOPPED)

    def leave(self) -> None:
        """Releases the directory and the signal handler, whatever has happened."""
        if self._save is not None:
            self._save.close()
            self._save = None
            self._hear_servers(None)
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
            self._former_handler = None
        if self.model is not None:
            runtime.set_initial_epoch(self.model, None)

    def _hear_servers(self, stop: Callable[[], None] | None) -> None:
        """Says what to do when a parameter server is told to end."""
        if self._team.served is not None:
            self._team.served.peers.stop = stop

    # While `fit` runs.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        strategy = self.model.distribute_strategy
        if not isinstance(strategy, ZeroStrategy):
            raise ValueError("CheckpointCallback needs a model of a ZeroStrategy; with others use BackupAndRestore.")
        self._stop = strategy.stop
        self._save = Save(self._team, self.model, self.directory, self.keep, self._resume.damaged)
        self._save.open()
        self._hear_servers(self._stop.request)
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, lambda *_: self._stop.request())
        if self._resume.position is None:
            return
        self._resume.restore(self.model)
        is_over = (self._position["finished"] or 0) >= self.params["epochs"]
        epoch = self.params["epochs"] if is_over else self._position["epoch"]
        runtime.set_initial_epoch(self.model, epoch)
        if self._team.is_chief and self._resume.found is not None:
            folder, manifest = self._resume.found
            behind = ", where the slowest worker was" * (self.step < manifest["step"])
            place = f"epoch {self._position['epoch'] + 1}, after {self._position['batch']} batches{behind}"
            print(f"Going on from {folder}: step {self.step}, {place}.", flush=True)
            if told := self._describe_other_data():
                warnings.warn(f"{folder}: {told}", stacklevel=2)

    def _describe_other_data(self) -> str:
        """A warning for a run that resumes in the middle of an epoch with other batches; "" if there is none."""
        batch, now = self._position["batch"], {"steps": self.params["steps"], "batch_size": self._data.batch_size}
        words = {"steps": "batches an epoch", "batch_size": "samples a batch"}
        other = [
            f"{self._position[key]} {word}, now {now[key]}"
            for key, word in words.items()
            if None not in (now[key], self._position.get(key)) and now[key] != self._position[key]
        ]
        if not batch or not other:
            return ""
        steps = now["steps"]
        rest = "" if steps is None or batch < steps else f" It has only {steps}, so it ends without any."
        return (
            f"It was saved after {batch} batches of an epoch, with {' and '.join(other)}. "
            f"Of this epoch the first {batch} batches are skipped, as they are now, so samples may be left out or come "
            f"twice.{rest}"
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._position["first_epoch"] is None:
            self._position["first_epoch"] = epoch
        self._resume.restore_metrics(self.model, epoch)
        self._position["epoch"] = epoch
        begun = (self._position.get("epoch_steps") or [])[: epoch - self._position["first_epoch"]]
        self._position["epoch_steps"] = [*begun, self.step - self._position["batch"]]
        self._save_if_due()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._stop.begin_step():
            self._due = True
            self._save_if_due()
            self._save.wait()
            is_saved = self._team.takes_part and self._mark() == self._saved
            saved = f"saved step {self.step} in {self.directory}, and " * is_saved
            print(f"Told to stop: {saved}exits.", flush=True)
            raise SystemExit(EXIT_STOPPED)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        before, steps = self.step, self.params["steps"]
        behind = runtime.batches_behind(self.model, batch)
        if steps is not None and not self._data.one_iterator:
            behind = min(behind, steps)  # the last execution may have fewer
        self.step += behind - self._position["batch"]
        self._position["batch"] = behind
        if self.save_every_steps is None or self.step // self.save_every_steps == before // self.save_every_steps:
            return
        self._due = True
        if steps is None or behind < steps:  # else `on_epoch_end` comes first
            self._save_if_due()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._position |= {"epoch": epoch + 1, "batch": 0, "epoch_batches": self._position["batch"]}
        if self.save_every_epochs is not None and (epoch + 1) % self.save_every_epochs == 0:
            self._due = True

    def _save_if_due(self) -> None:
        """Saves if a save is due.

        A save at an epoch's end waits until all other callbacks are done with the epoch, as they may change what is
        saved.
        """
        if self._due and self._mark() != self._saved and not self._resume.is_repeating:
            self._position |= {"randomness": self._data.randomness, "batch_size": self._data.batch_size}
            self._position["passes"] = self._data.passes_at(self._position["batch"])
            self._position["steps"] = self.params["steps"]
            manifest = self._save.start(self.step, dict(self._position), self.asynchronous)
            self._resume.note_saved(self.model, manifest)
            self._saved = self._mark()
        self._due = False

    def _mark(self) -> tuple:
        """A key that differs from one checkpoint to the next."""
        return self.step, *(self._position[key] for key in ("epoch", "batch", "finished"))
