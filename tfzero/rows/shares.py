"""The shares of a batch that replicas get, as given or as measured. [Note: uneven rows] in `plan/shares.py`

Measured shares change between two executions of a training step, on all workers at once. So batches are cut when a step
takes them, not ahead.
"""

import collections
import contextlib
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.host import graphs, runtime
from tfzero.plan import shares as plan
from tfzero.plan.mesh import Mesh
from tfzero.workers.channel import Channel

_MOST_AWAITED = 8  # gradients
_MOST_TIMES = 1024  # that are kept
STEPS = 32  # from one change of measured shares to the next, at least


class RowShares:
    """How the rows of a batch are dealt.

    Args:
        setting: "even", "measured", or a share for each rank.
        mesh: the positions of the replicas.
        channel: among the workers.

    Attributes:
        shares: whole numbers by part of a batch; None if rows are dealt evenly.
        is_measured: whether they change with the time that replicas take.
        is_timing: whether replicas are timed now.
    """

    def __init__(self, setting: str | tuple[float, ...], mesh: Mesh, channel: Channel) -> None:
        self._setting, self._mesh, self._channel = setting, mesh, channel
        self.is_measured = setting == plan.MEASURED and mesh.replicas > 1
        self.shares: tuple[int, ...] | None = None
        if self.is_measured:
            self.shares = plan.whole_shares([1] * mesh.replicas)
        elif not isinstance(setting, str):
            self.shares = plan.by_part(plan.whole_shares(setting), mesh)
        self._measured: tuple = ()  # median seconds of each part, and its rows a second
        self.is_timing = False
        self._has_warned = False
        self._steps = 0  # since shares were compared
        self._watches = [_Watch() for _ in mesh.ranks]

    def now(self) -> tf.Tensor | None:
        """The shares by part, int64; None if rows are dealt evenly. In a pipeline they are those of the moment."""
        if self.shares is None:
            return None
        if not self.is_measured or tf.executing_eagerly():
            return tf.constant(self.shares, tf.int64)
        shares = tf.numpy_function(lambda: np.array(self.shares, np.int64), [], tf.int64)
        return tf.ensure_shape(shares, [len(self.shares)])

    def of_this_worker(self) -> tf.Tensor | None:
        """The shares of this worker's replicas, in their order."""
        shares = self.now()
        parts = [self._mesh.part_of_rank(rank) for rank in self._mesh.ranks]
        return None if shares is None else tf.gather(shares, parts)

    def note_own_rows(self) -> None:
        """Warns if the rows that a worker brings itself cannot be dealt as the setting says."""
        if self.shares is None or self._mesh.workers == 1:
            return
        own = {self.shares[self._mesh.part_of_rank(rank)] for rank in self._mesh.ranks}
        if self._mesh.devices_per_worker == 1 or (not self.is_measured and len(own) == 1):
            self._warn(
                "each worker brings rows of its own for its own replicas. Bring fewer rows to slow workers, or "
                "let all workers read whole batches"
            )

    def note_ready_parts(self) -> None:
        """Warns if data come in parts for each replica, as from `distribute_datasets_from_function`."""
        if self.shares is not None:
            self._warn("a function gives each replica its rows. Give each as many as it should have")

    def _warn(self, reason: str) -> None:
        warnings.warn(f"`rows={self._setting!r}` makes no difference for these data: {reason}.", stacklevel=3)

    # Measuring.

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """While a training step of Keras is traced or runs: its replicas are timed. Outside, nothing is."""
        self.is_timing = self.is_measured
        try:
            yield
        finally:
            self.is_timing = False

    def begin(self, tensors: list[tf.Tensor]) -> tf.Tensor:
        """In a replica: notes when these tensors are there. What follows the result is timed, until `end`."""
        if tf.executing_eagerly():
            raise ValueError(
                "`rows='measured'` needs a compiled step: eagerly replicas run one after the other. Leave "
                "`run_eagerly=True` away, or give a share for each replica."
            )
        return self._note(lambda watch, *_: watch.begin(), tensors)

    def end(self, beginning: tf.Tensor, gradients: list[tf.Tensor], rows: tf.Tensor) -> None:
        """In a replica: notes when its gradients of so many rows are there, before they are exchanged."""
        # That of the first variable comes last, as a rule.
        some = gradients[:: max(1, len(gradients) // _MOST_AWAITED)]
        self._note(lambda watch, rows, *_: watch.end(int(rows[0])), [rows, beginning, *some])

    def warn_of_loop(self) -> None:
        """Warns of a step that is not Keras's own, once."""
        if self.is_measured and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "`rows='measured'` measures the steps of `fit` and `train_on_batch` only. In a loop of your own rows "
                "stay as they are: give a share for each replica.",
                stacklevel=2,
            )

    def apart(self, exchange: Callable[[tf.Tensor], Any], value: tf.Tensor) -> Any:
        """In a replica, in a graph: what an exchange makes of a value. Waiting for it is not timed."""
        with tf.control_dependencies([self._note(lambda watch, *_: watch.pause(), [value])]):
            result = exchange(tf.identity(value))
        with tf.control_dependencies([self._note(lambda watch, *_: watch.go_on(), tf.nest.flatten(result))]):
            return tf.nest.map_structure(tf.identity, result)

    def _note(self, method: Callable, tensors: list[tf.Tensor]) -> tf.Tensor:
        """Calls a function of the replica's watch and their first elements when tensors are there, also on a GPU."""
        firsts = [tf.reshape(tensor, [-1])[:1] for tensor in tensors]
        watch = self._watches[runtime.replica_index()]
        noted = tf.numpy_function(lambda *values: method(watch, *values), firsts, tf.bool)
        graphs.run_freely(noted.op)
        return noted

    def rebalance(self, steps: int) -> None:
        """Between two executions of training steps, on all workers: changes the shares, if it is time.

        Args:
            steps: how many steps the latest execution had.
        """
        self._steps += steps
        if not self.is_measured or self._steps < STEPS:
            return
        self._steps, own = 0, [watch.medians() for watch in self._watches]
        of_ranks = [each for told in self._channel.all_gather("comparing compute times", own) for each in told]
        if None not in of_ranks:
            self._measured = tuple(zip(*plan.by_part(of_ranks, self._mesh), strict=True))
            self.shares = plan.moved(self.shares, *self._measured) or self.shares

    def __str__(self) -> str:
        if self._mesh.replicas == 1:
            return "one replica gets all rows"
        if self.shares is None:
            return "as many rows for each replica"
        of_ranks = [self.shares[self._mesh.part_of_rank(rank)] for rank in range(self._mesh.replicas)]
        shown = ", ".join(f"{share / sum(of_ranks):.1%}" for share in of_ranks)
        if not self.is_measured:
            return f"as given: {shown} of a batch"
        if not self._measured:
            return f"measured in the first {STEPS} steps; {shown} of a batch"
        slowest, even = max(self._measured[0]), plan.seconds_if_even(*self._measured)
        return (
            f"measured: {shown} of a batch; the slowest computed for {1000 * slowest:.3g} ms a step, with even rows it "
            f"would for {1000 * even:.3g} ms"
        )


class _Watch:
    """Takes a replica's time, without what it waits for others. When shares are right, no replica waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = self._paused = self._waited = 0.0
        self._pauses = 0
        self._times: collections.deque = collections.deque(maxlen=_MOST_TIMES)

    def begin(self) -> bool:
        with self._lock:
            self._begun, self._waited, self._pauses = time.perf_counter(), 0.0, 0
        return True

    def pause(self) -> bool:
        with self._lock:
            self._pauses += 1
            if self._pauses == 1:
                self._paused = time.perf_counter()
        return True

    def go_on(self) -> bool:
        with self._lock:
            if self._pauses == 1:
                self._waited += time.perf_counter() - self._paused
            self._pauses = max(0, self._pauses - 1)  # it may be of an earlier step
        return True

    def end(self, rows: int) -> bool:
        with self._lock:
            seconds = max(1e-6, time.perf_counter() - self._begun - self._waited)
            self._times.append((seconds, max(1, rows) / seconds))  # a replica without rows computes one
        return True

    def medians(self) -> tuple[float, float] | None:
        """Of seconds and of rows a second, since it was last asked; None if there are none."""
        with self._lock:
            times, self._times = list(self._times), collections.deque(maxlen=_MOST_TIMES)
        return (statistics.median(s for s, _ in times), statistics.median(r for _, r in times)) if times else None
