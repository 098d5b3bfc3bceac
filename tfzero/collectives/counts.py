"""Orders the collectives of one process, and counts how far each replica has come with them.

[Note: ordering] Several devices of one process deadlock unless each orders its own collectives. An ordering token does
that and nothing else: it is one resource per device, and collectives that share a token run in program order. NCCL
needs one order for all. On CPU a few tokens per device let some collectives overlap, which hides their latency. One
more "lane" is for stage 3's second gathers, which are traced after the operations that need them.

[Note: counts] Between processes a replica adds one to its lane's count when a collective begins and again when it ends.
This is how `collectives/pulse.py` notices a collective that waits in vain. The purpose of the collective is written
beside the count before it begins.

[Note: batch first] A replica's step begins no collective before the replica has its batch. Data may fail on all workers
at once, for instance when they find out that their batches differ. A gather of parameters needs no batch, so some
replicas would have begun it and others not, and the next step would meet what is left of it.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

# [Note: ordering] Collectives in flight at once on CPU.
LANES = 4


class Lanes:
    """The lanes of the local replicas. [Note: ordering]

    Args:
        devices: this process's devices, one per local replica.
        count: number of lanes of each; the last one is for gathers in the backward pass.
        is_counted: whether collectives are counted. [Note: counts]
    """

    def __init__(self, devices: Sequence[str], count: int, is_counted: bool) -> None:
        self.is_counted = is_counted
        self.tokens = [_make_variables(device, count) for device in devices]
        hosts = [_host_of(device) for device in devices] if is_counted else []
        self._counters = [_make_variables(host, count) for host in hosts]
        self._purposes = [_make_variables(host, count) for host in hosts]
        self._known_purposes = {"a value that all replicas contribute to": 0}
        self._current_purpose = [0] * len(devices)
        self.iterations: tf.Variable | None = None  # of the optimizer built last
        # Weak references: an operation keeps its graph alive, and the graph keeps the variables that it reads.
        self._latest: list[list[weakref.ref | None]] = [[None] * count for _ in devices]

    def counts(self) -> list[int]:
        """Collectives begun plus collectives ended, for each lane of each local replica. [Note: counts]"""
        return [int(counter.numpy()) for counters in self._counters for counter in counters]

    @contextlib.contextmanager
    def purpose(self, replica: int, text: str) -> Iterator[None]:
        """While active, `text` describes a local replica's collectives, in case one of them must be named."""
        former = self._current_purpose[replica]
        self._current_purpose[replica] = self._known_purposes.setdefault(text, len(self._known_purposes))
        try:
            yield
        finally:
            self._current_purpose[replica] = former

    def describe(self, place: int) -> str:
        """The step and the purpose of the collective at one place of `counts`."""
        replica, lane = divmod(place, len(self._counters[0]))
        purpose = list(self._known_purposes)[int(self._purposes[replica][lane].numpy())]
        step = "" if self.iterations is None else f"in step {int(self.iterations.numpy()) + 1}, "
        return f"{step}at {purpose}"

    def latest(self, replica: int, graph: tf.Graph) -> tf.Operation | None:
        """The collective that the backward lane's next one will wait for, if it is in `graph`. [Note: ordering]"""
        noted = self._latest[replica][-1]
        latest = None if noted is None else noted()
        return latest if latest is not None and latest.graph is graph else None

    def noted(self, result: tf.Tensor, replica: int, lane: int) -> tf.Tensor:
        """Notes a collective's result: the lane's next collective will wait for it."""
        self._latest[replica][lane] = weakref.ref(result.op)
        return result

    def wait_for(self, tensors: Sequence[tf.Tensor], replica: int) -> None:
        """Makes a local replica's next collectives in this graph wait for tensors of it. [Note: batch first]

        A write to what orders a lane comes before the lane's next collective, in inner functions and branches too.
        """
        with tf.control_dependencies(tensors):
            for variable in (self._counters if self.is_counted else self.tokens)[replica]:
                with tf.device(variable.device):
                    variable.assign_add(0, read_value=False)

    @contextlib.contextmanager
    def counted(self, replica: int, lane: int, value: tf.Tensor) -> Iterator[Callable[..., list[tf.Operation]]]:
        """Counts a collective that waits for `value`; pass the result to the function yielded. [Note: counts]"""

        def count_after(*tensors: tf.Tensor) -> list[tf.Operation]:
            if not self.is_counted:
                return []
            counter = self._counters[replica][lane]
            with tf.control_dependencies(tensors), tf.device(counter.device):
                return [counter.assign_add(1, read_value=False)]

        def note_after(tensor: tf.Tensor) -> list[tf.Operation]:
            if not self.is_counted:
                return []
            noted = self._purposes[replica][lane]
            with tf.control_dependencies([tensor]), tf.device(noted.device):
                return [noted.assign(self._current_purpose[replica], read_value=False)]

        with tf.control_dependencies(count_after(value, *note_after(value))):
            yield count_after


def _make_variables(device: str, count: int) -> list[tf.Variable]:
    with tf.init_scope(), tf.device(device):
        return [tf.Variable(0, trainable=False, dtype=tf.int64) for _ in range(count)]


def _host_of(device: str) -> str:
    """The CPU device, which can be read while the GPU is busy."""
    spec = tf.DeviceSpec.from_string(device)
    return device if spec.device_type == "CPU" else spec.replace(device_type="CPU", device_index=0).to_string()
