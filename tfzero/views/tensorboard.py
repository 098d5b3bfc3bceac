"""Writes figures of a training for TensorBoard, while it runs."""

import importlib
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime
from tfzero.optimizer import ZeroOptimizer
from tfzero.plan.settings import check_number
from tfzero.strategy import ZeroStrategy
from tfzero.views.gradient_time import UnmeasurableError, gradient_seconds
from tfzero.views.picture import draw, holdings


class TensorBoardCallback(keras.callbacks.Callback):
    """Writes memory, network and gradient figures for TensorBoard while `fit` runs.

    All workers have it in `callbacks`. The first worker writes, into `log_dir/tfzero`, beside Keras's own
    `keras.callbacks.TensorBoard(log_dir)`. The training's result stays the same bit for bit. Steps count batches.

    Its tags:

    * `memory/current_bytes` and `memory/peak_bytes`: of TensorFlow's allocator for this worker's first device. The peak
      covers the time since the last write, which resets it. Missing on CPUs where TensorFlow does not use oneDNN by
      itself: set the environment variable `TF_ENABLE_ONEDNN_OPTS=1` there.
    * `wire/bytes_per_step`: bytes that a replica sends in a step, by formula (`strategy.report().sent_bytes`).
    * `time/step_seconds`: median since the last write. The first batch does not count, as its step is traced.
    * `time/exposed_seconds`: the part of it that is not the gradient with its loss and metrics: communication that
      nothing hides, and the update. The gradient alone is measured once, after the first batch. If that is impossible,
      a warning says why, and the tag is missing.
    * `time/input_seconds`: mean time since the last write that a step has waited for its batch, and
      `input/read_bytes_per_step`: bytes that the process has read in it, by `read` and the like (`rchar` of
      /proc/self/io): from disks or their cache. Missing where the system does not tell.
    * `gradient/norm`: norm of the whole batch's gradient in the latest update, before clipping and without loss scale.
      Further optimizers of the model write `gradient/norm_of_` and the attribute's name.
    * `loss_scale/scale` and `loss_scale/skipped_steps`: with a `LossScaleOptimizer`, its scale, and the number of
      batches skipped because of an overflow.
    * `local_steps/cosine`, `local_steps/distance` and `local_steps/waited_seconds`: with `sync_every`, of the latest
      merge: the mean cosine between what each two workers have changed (near 0 it is mostly noise),
      their root mean square distance from their mean, and how long the first worker waited for the others.
    * `plan`: a picture of what each rank holds.

    Args:
        log_dir: TensorBoard's directory.
        every_steps: number of batches from one write to the next.
        picture: whether to draw the plan.

    Raises:
        ValueError: for invalid arguments; from `fit`, for a model of another strategy, or if the workers'
            `every_steps` differ.
        ImportError: without the package tensorboard; with `picture`, without matplotlib.

    Example:

    ```python
    model.fit(x, y, epochs=2, verbose=0, callbacks=[tfzero.TensorBoardCallback("logs", every_steps=2)])
    ```
    """

    def __init__(self, log_dir: str | os.PathLike, every_steps: int = 10, picture: bool = True) -> None:
        super().__init__()
        if not isinstance(log_dir, str | os.PathLike) or not os.fspath(log_dir):
            raise ValueError(f"`log_dir` must be the path of a directory. Received: log_dir={log_dir!r}")
        check_number("every_steps", every_steps, int, 1)
        if not isinstance(picture, bool):
            raise ValueError(f"`picture` must be True or False. Received: picture={picture!r}")
        _need("tensorboard", "`pip install tensorboard`")
        if picture:
            _need("matplotlib", "`pip install matplotlib`, or pass picture=False")
        self.log_dir = os.path.join(os.fspath(log_dir), "tfzero")
        self.every_steps = every_steps
        self.picture = picture
        self.step = 0  # batches trained in total
        self._gradient_seconds: dict[tuple, float | None] = {}
        self._writer: tf.summary.SummaryWriter | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        strategy = self.model.distribute_strategy
        if not isinstance(strategy, ZeroStrategy):
            raise ValueError(
                "TensorBoardCallback needs a model of a ZeroStrategy; with others use keras.callbacks.TensorBoard."
            )
        settings = {"every_steps": self.every_steps}
        strategy.channel.agree("preparing for TensorBoard", settings, "settings of TensorBoardCallback")
        if any([optimizer.watch_norm() for optimizer in self._optimizers.values()]):
            self.model.make_train_function(force=True)
        self._strategy = strategy
        self._device = strategy.extended.worker_devices[0]
        account = strategy.extended.input_account
        self._counted = account.batches, account.seconds, account.bytes
        self._is_first = True
        self._seconds: list[float] = []
        if strategy.extended.should_checkpoint:
            self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._first_batch = batch
        if self._is_first:
            self.step = max(self.step, self._steps_of_optimizer)  # a run may resume from a checkpoint
            self._rows = runtime.rows_counted(self.model)
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._strategy.settings.device_type == "GPU":
            tf.test.experimental.sync_devices()
        seconds = time.perf_counter() - self._start
        batches = runtime.batches_behind(self.model, batch) - self._first_batch
        before, self.step = self.step, self.step + batches
        if not self._is_first:
            self._seconds.append(seconds / batches)
        is_due = self.step // self.every_steps > before // self.every_steps
        if is_due and self._writer is not None:
            self._write(self._scalars())
        if self._is_first:
            self._is_first = False
            self._begin(batches)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin(self, batches: int) -> None:
        """Draws the picture and measures the gradient alone, after the first batch, when everything is built."""
        if self._writer is not None and self.picture:
            pixels = draw(holdings(optimizer.trained for optimizer in self._optimizers.values() if optimizer.built))
            with self._writer.as_default(self.step), tf.summary.record_if(True):
                tf.summary.image("plan", pixels[None], description="Who holds what, and how many bytes.")
            self._writer.flush()
        now_counted = runtime.rows_counted(self.model)
        rows = [round((now - then) / batches) for now, then in zip(now_counted, self._rows, strict=True)]
        self._shapes = (tuple(rows), str(self.model.train_function.element_spec))
        if self._shapes not in self._gradient_seconds:
            self._gradient_seconds[self._shapes] = self._measure(rows)
            _memory(self._device)  # resets the peak, which the measurement has raised

    def _measure(self, rows: Sequence[int]) -> float | None:
        try:
            return gradient_seconds(self.model, rows)
        except UnmeasurableError as error:
            warnings.warn(f"There will be no time/exposed_seconds for TensorBoard: {error}.", stacklevel=2)
            return None

    def _write(self, scalars: dict[str, float]) -> None:
        with self._writer.as_default(self.step), tf.summary.record_if(True):
            for tag, value in scalars.items():
                tf.summary.scalar(tag, value)
            if (served := self._strategy.served) is not None and len(ages := served.staleness()):
                tf.summary.histogram("servers/staleness", ages)
        self._writer.flush()  # so that it shows during `fit`

    def _scalars(self) -> dict[str, float]:
        scalars = {**_memory(self._device), "wire/bytes_per_step": self._strategy.report().sent_bytes}
        if self._seconds:
            step_seconds, self._seconds = statistics.median(self._seconds), []
            scalars["time/step_seconds"] = step_seconds
            alone_seconds = self._gradient_seconds[self._shapes]
            if alone_seconds is not None:
                scalars["time/exposed_seconds"] = max(0.0, step_seconds - alone_seconds)
        scalars |= self._input()
        for name, optimizer in self._optimizers.items():
            norm = optimizer.gradient_norm
            if norm is not None:
                scalars["gradient/norm" if name == "optimizer" else f"gradient/norm_of_{name}"] = norm
        if (merge := self._strategy.local_steps.latest) is not None:
            scalars |= {"local_steps/distance": merge.distance, "local_steps/waited_seconds": merge.waited_seconds}
            scalars |= {} if merge.cosine is None else {"local_steps/cosine": merge.cosine}
        if (served := self._strategy.served) is not None:
            scalars |= served.scalars()
        scale = getattr(self.model.optimizer, "loss_scale_optimizer", None)
        if scale is not None:
            scalars["loss_scale/scale"] = float(scale.dynamic_scale.numpy())
            scalars["loss_scale/skipped_steps"] = self.step - self._steps_of_optimizer
        return scalars

    def _input(self) -> dict[str, float]:
        """What input has cost since the last write, for each batch."""
        account = self._strategy.extended.input_account
        before, self._counted = self._counted, (account.batches, account.seconds, account.bytes)
        batches = self._counted[0] - before[0]
        if not batches:
            return {}
        found = {"time/input_seconds": (self._counted[1] - before[1]) / batches}
        if self._counted[2] is not None:
            found["input/read_bytes_per_step"] = (self._counted[2] - (before[2] or 0)) / batches
        return found

    @property
    def _optimizers(self) -> dict[str, ZeroOptimizer]:
        """The model's optimizers, by the attribute that holds each."""
        return {name: value for name, value in sorted(vars(self.model).items()) if isinstance(value, ZeroOptimizer)}

    @property
    def _steps_of_optimizer(self) -> int:
        """Batches that the optimizer has taken; with a loss scale, only those that did not overflow."""
        optimizer = self.model.optimizer
        return 0 if optimizer is None else int(runtime.iteration_counter(optimizer.inner_optimizer).numpy())


def _need(package: str, remedy: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"TensorBoardCallback needs the package {package}: {remedy}.") from error


def _memory(device: str) -> dict[str, float]:
    """Bytes in use, and their peak since the last call; empty if the allocator keeps no account."""
    try:
        memory = tf.config.experimental.get_memory_info(device)
    except ValueError:
        return {}
    tf.config.experimental.reset_memory_stats(device)
    return {"memory/current_bytes": memory["current"], "memory/peak_bytes": memory["peak"]}
