"""Times each collective by size, beside TensorFlow's own operation for the same.

TensorFlow's operations are emitted bare, as `tf.distribute` emits them, under keys of this module. Each transport says
which of them exist (`Transport.of_tensorflow`).
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.collectives.transport import Call

SIZES_BYTES = tuple(2**k for k in (10, 14, 18, 22, 26))  # 1 KiB to 64 MiB
_LARGE_BYTES = 2**22
# Far from the keys of tfzero's own groups, and from those that TensorFlow counts up from 1.
_group_keys = itertools.count(900_000)


@dataclass(frozen=True)
class Speed:
    """Time of one collective at one size.

    Args:
        primitive: "all_reduce", "reduce_scatter", "all_gather", "all_to_all" or "broadcast".
        size_bytes: of the whole tensor: the summed one, the gathered one, or all rows that a replica gives.
        seconds: the median on this worker.
        stock_seconds: the same of TensorFlow's own operation; None if it has none.
    """

    primitive: str
    size_bytes: int
    seconds: float
    stock_seconds: float | None

    @property
    def bytes_per_second(self) -> float:
        return self.size_bytes / self.seconds


def measure_speeds(group: Group, sizes_bytes: Sequence[int] = SIZES_BYTES) -> list[Speed]:
    """Times every primitive. All workers call it together. Returns nothing for a single replica."""
    if group.world_size == 1:
        return []
    stock = _Stock(group)
    return [
        _measured(group, stock, primitive, size_bytes)
        for primitive in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
        for size_bytes in sizes_bytes
    ]


def _measured(group: Group, stock: "_Stock", primitive: str, size_bytes: int) -> Speed:
    elements = -(-size_bytes // 4 // group.world_size)  # of a row
    shapes = {"all_gather": [elements], "all_reduce": [size_bytes // 4], "broadcast": [size_bytes // 4]}
    value = tf.zeros(shapes.get(primitive, [group.world_size, elements]))
    ways = [getattr(group, primitive), *stock.ways(primitive)]
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(1 + (5 if size_bytes >= _LARGE_BYTES else 15)):
        for way, seconds in zip(ways, taken, strict=True):
            start = time.perf_counter()
            for result in group.launch(way, [value] * len(group.devices)):
                tf.reshape(result, [-1])[0].numpy()
            seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds[1:]) for seconds in taken]  # the first run traces
    return Speed(primitive, size_bytes, medians[0], medians[1] if len(ways) > 1 else None)


class _Stock:
    """TensorFlow's own operations among a group's replicas, under keys of their own."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._group_key = next(_group_keys)
        self._instance_keys = itertools.count(1)

    def ways(self, primitive: str) -> list[Callable]:
        """A list of one function, called like the group's method of this name; empty if TensorFlow has none."""
        group = self._group
        stock = group.transport.of_tensorflow(primitive, group.place)
        if stock is None:
            return []
        key = next(self._instance_keys)

        def run(value: tf.Tensor, replica: int) -> tf.Tensor:
            token = group.lanes.tokens[replica][0]
            call = Call(group.world_size, group.rank(replica), self._group_key, key, token=token)
            with tf.device(group.devices[replica]), group.lanes.counted(replica, 0, value) as ended:
                result = getattr(stock, primitive)(value, call)
                ended(result)
            return result

        return [run]
