"""The keys by which TensorFlow matches the members' parts of one collective.

[Note: keys] TensorFlow binds an instance key to operation, dtype and shape for the life of the process, and all members
must use the same key for the same collective. They trace the same functions, but not equally often: where shapes differ
by replica, one worker retraces a function while the others reuse their trace. So a key cannot come from a counter that
lasts. It identifies a collective within its function. It is a hash of the function's name, the number of collectives
that the replica has put into it before, and operation, dtype, shape and lane. Replicas that trace the same function get
the same keys, whenever and however often they trace it. Functions that share a key share its lane too, and the lane
orders them. [Note: ordering] in `collectives/counts.py`

Keys are constants in the graph, so they work inside `tf.while_loop` and `tf.cond`. Loops and branches count with their
enclosing function, as TensorFlow numbers its own names. A value whose shape is known only when the graph runs travels
flat, padded to the next of a fixed list of sizes, and each size has a key of its own.
"""

import hashlib
import weakref
from collections import Counter

import tensorflow as tf

from tfzero.host import graphs

# 64 sizes for values of unknown shape: 0, and powers of two from 1 to 2^62.
SIZES = (0, *(2**k for k in range(63)))
# The operation that each primitive's key is bound to. It does not depend on the transport, so that workers with the
# same function have the same keys.
BOUND_TO = {
    "all_reduce": "collective_reduce_v2",
    "reduce_scatter": "collective_reduce_scatter_v2",
    "all_to_all": "collective_all_to_all_v2",
    "all_gather": "collective_gather_v2",
    "broadcast": "Broadcast",
}
# Keys are positive int32. Keys of one shape are below this, keys of all `SIZES` above.
_SIZED = 2**30


class Keys:
    """The keys of one group's collectives. [Note: keys]

    Args:
        replicas: number of local replicas.
        lanes: number of lanes of each; `take` gives the last one only on request, unless it is the only one.
    """

    def __init__(self, replicas: int, lanes: int) -> None:
        self._replicas = replicas
        self._lanes = lanes
        # Number of collectives that each local replica has put into a function.
        self._counts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._contents: dict[int, tuple] = {}  # what each key is for
        self.traced: Counter[str] = Counter()  # how often functions with collectives were traced, by name

    def align(self) -> None:
        """Makes the local replicas' counts equal again, in case an error within a function left them apart."""
        counts = self._counts.get(graphs.current_function(), [])
        counts[:] = [max(counts, default=0)] * len(counts)

    def take(self, replica: int, content: tuple, lane: int | None = None, is_sized: bool = False) -> tuple[int, int]:
        """Key and lane of a local replica's next collective in the function that is being traced.

        Args:
            replica: the local replica.
            content: what the key is bound to, the same on all replicas: operation, dtype, shape.
            lane: the lane; None for any.
            is_sized: whether this is the first of a series of keys, one for each of `SIZES`.
        """
        function = graphs.current_function()
        counts = self._counts_of(function)
        place = counts[replica]
        counts[replica] += 1
        lane = place % max(1, self._lanes - 1) if lane is None else lane % self._lanes
        content = (graphs.name_of_function(function), place, lane, *content)
        number = int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "big")
        first, stride = (_SIZED, len(SIZES)) if is_sized else (1, 1)
        count = (_SIZED - first % _SIZED) // stride
        while self._contents.setdefault(key := first + number % count * stride, content) != content:
            number += 1  # a collision, among thousands of millions of keys
        return key, lane

    def _counts_of(self, function: tf.Graph) -> list[int]:
        if function not in self._counts:
            self._counts[function] = [0] * self._replicas
            self.traced[graphs.name_of_function(function)] += 1
        return self._counts[function]
