"""Which collective is which: the keys by which TensorFlow brings together what belongs together.

[Note: keys] TensorFlow binds an instance key to operation, dtype and shape for the life of the process, and all members
must use the same key for the same collective. They trace the same functions, but not equally often: where shapes differ
by replica, one worker traces a function once more while the others go on with what they have. So a key is no number of
a count that lasts. It says which collective of its function one is: it is made of the name of the function, how many
collectives the replica has put into it before, and operation, dtype, shape and lane. Who traces the same function gets
the same keys, whenever and however often. Functions that have a key in common have its lane in common too, which orders
them. [Note: ordering] in `collectives/counts.py`

Keys are constants in the graph, therefore they work inside `tf.while_loop` and `tf.cond`; loops and branches count with
the function that they are in, as TensorFlow numbers their own names. Where the shape is only known when the graph runs,
the value travels flat, padded to the next of a fixed list of sizes, and each size has a key of its own.
"""

import hashlib
import weakref
from collections import Counter

import tensorflow as tf

from tfzero.host import graphs

# 64 sizes for values of unknown shape: powers of two from 1 to 2^62, and 0.
SIZES = (0, *(2**k for k in range(63)))
# To what a key is bound for each primitive: workers with one function have the same keys, whatever carries them.
BOUND_TO = {
    "all_reduce": "collective_reduce_v2",
    "reduce_scatter": "collective_reduce_scatter_v2",
    "all_to_all": "collective_all_to_all_v2",
    "all_gather": "collective_gather_v2",
    "broadcast": "Broadcast",
}
# Keys are positive int32: those of one shape below this, those of all sizes above.
_SIZED = 2**30


class Keys:
    """The keys of one group's collectives. [Note: keys]

    Args:
        replicas: how many local replicas there are.
        lanes: how many lanes each has; the last one is never given by `take`, unless it is the only one.
    """

    def __init__(self, replicas: int, lanes: int) -> None:
        self._replicas = replicas
        self._lanes = lanes
        # How many collectives each local replica has put into a function.
        self._counts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._contents: dict[int, tuple] = {}  # what each key is for
        self.traced: Counter[str] = Counter()  # how often functions with collectives were traced, by name

    def align(self) -> None:
        """Brings the local replicas' counts together, should an error within a function have left them apart."""
        counts = self._counts.get(graphs.current_function(), [])
        counts[:] = [max(counts, default=0)] * len(counts)

    def take(self, replica: int, content: tuple, lane: int | None = None, is_sized: bool = False) -> tuple[int, int]:
        """Key and lane of a local replica's next collective in the function that is being traced.

        Args:
            replica: the local replica.
            content: what the key is to be bound to, the same on all replicas: operation, dtype, shape.
            lane: the lane, if it is not any.
            is_sized: whether it is the first of a row of keys, one for each of `SIZES`.
        """
        function = graphs.current_function()
        counts = self._counts_of(function)
        place = counts[replica]
        counts[replica] += 1
        lane = place % max(1, self._lanes - 1) if lane is None else lane % self._lanes
        content = (graphs.name_of_function(function), place, lane, *content)
        number = int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest())
        first, stride = (_SIZED, len(SIZES)) if is_sized else (1, 1)
        count = (_SIZED - first % _SIZED) // stride
        while self._contents.setdefault(key := first + number % count * stride, content) != content:
            number += 1  # taken for something else, of thousands of millions
        return key, lane

    def _counts_of(self, function: tf.Graph) -> list[int]:
        if function not in self._counts:
            self._counts[function] = [0] * self._replicas
            self.traced[graphs.name_of_function(function)] += 1
        return self._counts[function]
