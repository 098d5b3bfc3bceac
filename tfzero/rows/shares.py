"""The shares of a batch that replicas get, as given or as measured. [Note: uneven rows] in `plan/shares.py`

Measured shares change between two executions of a training step, on all workers at once. So batches are cut when a step
takes them, not ahead.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.host import graphs, runtime
from tfzero.plan import shares as plan
from tfzero.plan.mesh import Mesh
from tfzero.workers.channel import Channel

_MOST_AWAITED = 8  # gradients
STEPS = 32  # from one change of measured shares to the next, at least


class RowShares:
    """How the rows of a batch are dealt.

    Args:
        setting: "even", "measured", or a share for each rank.
        mesh: the positions of the replicas.
        channel: among the workers.

    Attributes:
        shares: whole numbers by part of a batch; None if rows are dealt evenly.
    """

    def __init__(self, setting: str | tuple[float, ...], mesh: Mesh, channel: Channel) -> None:
        self._setting, self._mesh, self._channel = setting, mesh, channel
        self.is_measured = setting == plan.MEASURED and mesh.replicas > 1
        self.shares: tuple[int, ...] | None = None
        if self.is_measured:
            self.shares = plan.whole_shares([1] * mesh.replicas)
        elif not isinstance(setting, str):
            self.shares = plan.by_part(plan.whole_shares(setting), mesh)
        self._seconds: tuple[float, ...] = ()  # of each part in the latest steps
        self._measured_with = self.shares
        self._steps = 0  # since shares were compared
        self._beginning: dict[int, tf.Tensor] = {}  # of the step that is being traced, by replica
        self._begun = [0.0] * mesh.devices_per_worker
        self._times: list[list[float]] = [[] for _ in mesh.ranks]

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

    # Measuring.

    @contextlib.contextmanager
    def timed(self, arguments: Any) -> Iterator[None]:
        """In a replica: notes when its batch is there; what is computed within comes after that."""
        if not self.is_measured:
            yield
            return
        leaves = [each for each in tf.nest.flatten(arguments, expand_composites=True) if isinstance(each, tf.Tensor)]
        beginning = self._note(self._begin, leaves)
        self._beginning[runtime.replica_index()] = beginning
        with tf.control_dependencies([beginning]):
            yield

    def end(self, gradients: Iterable[tf.Tensor]) -> None:
        """In a replica: notes when its gradients are there, before they are exchanged."""
        if not self.is_measured:
            return
        beginning, gradients = self._beginning.pop(runtime.replica_index(), None), list(gradients)
        if beginning is not None:  # these are the first gradients of a step
            # That of the first variable comes last, as a rule.
            self._note(self._end, [beginning, *gradients[:: max(1, len(gradients) // _MOST_AWAITED)]])

    def _note(self, function: Callable, tensors: list[tf.Tensor]) -> tf.Tensor:
        """Calls a function with the number of the replica when these tensors are there, also if they are on a GPU."""
        firsts = [tf.reshape(tensor, [-1])[:1] for tensor in tensors]
        replica = runtime.replica_index()
        noted = tf.numpy_function(lambda *values: function(replica), firsts, tf.int64)
        if not tf.executing_eagerly():
            graphs.run_freely(noted.op)
        return noted

    def _begin(self, replica: int) -> np.int64:
        self._begun[replica] = time.perf_counter()
        return np.int64(replica)

    def _end(self, replica: int) -> np.int64:
        self._times[replica].append(time.perf_counter() - self._begun[replica])
        return np.int64(replica)

    def rebalance(self, steps: int) -> None:
        """Between two executions of training steps, on all workers: changes the shares, if it is time.

        Args:
            steps: how many steps the latest execution had.
        """
        self._steps += steps
        if not self.is_measured or self._steps < STEPS:
            return
        own = [statistics.median(times) if times else None for times in self._times]
        self._steps, self._times = 0, [[] for _ in self._times]
        of_ranks = [each for told in self._channel.all_gather("comparing compute times", own) for each in told]
        if None not in of_ranks:
            self._seconds = plan.by_part(of_ranks, self._mesh)
            self._measured_with = self.shares
            self.shares = plan.moved(self.shares, self._seconds) or self.shares

    def __str__(self) -> str:
        if self._mesh.replicas == 1:
            return "one replica gets all rows"
        if self.shares is None:
            return "as many rows for each replica"
        of_ranks = [self.shares[self._mesh.part_of_rank(rank)] for rank in range(self._mesh.replicas)]
        shown = ", ".join(f"{share / sum(of_ranks):.1%}" for share in of_ranks)
        if not self.is_measured:
            return f"as given: {shown} of a batch"
        if not self._seconds:
            return f"measured in the first {STEPS} steps; {shown} of a batch"
        slowest, even = max(self._seconds), plan.seconds_if_even(self._measured_with, self._seconds)
        return (
            f"measured: {shown} of a batch; the slowest computed for {1000 * slowest:.3g} ms a step, with even rows it "
            f"would for {1000 * even:.3g} ms"
        )
