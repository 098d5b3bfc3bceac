"""All replicas as one group, or two levels of them: all-reduce, reduce-scatter, all-gather and broadcast.

The raw operations are TensorFlow's (`tensorflow/core/ops/collective_ops.cc`). What this module knows about them:

Which of them carries what, and in which dtype, is the table of `collectives/ways.py`; their keys are
`collectives/keys.py`'s.

[Note: two levels] Of an all-to-all each of a worker's K replicas sends its rows to all other workers. With two levels
the replicas of a worker first add up their rows: each those of the ranks that have its own place in their workers
(`within`). Then the replicas of one place exchange these sums (`across`): the network carries one K-th, in W-1 messages
instead of N-K. Sums in between are float32 at least. All-gather is a ring, which leaves a worker once in any case.

[Note: small sums] Between processes on CPU, a tensor of a few KiB is summed sooner if all replicas gather all of it
and add: N-1 messages one after the other instead of 2(N-1). Milliseconds, ring and gathered, on two cores
(`benchmarks/collectives.py`): two workers 1.8 and 1.2 at 4 KiB, 2.4 and 2.1 at 64 KiB, 3.2 and 3.8 at 512 KiB; four
workers 7.5 and 6.4, 9.1 and 7.4, 10.5 and 10.4. A ring passes a single number on whole, which is faster with four:
4.0 and 5.2. So tensors of up to 64 KiB are gathered, single numbers aside, as long as no replica receives more than
256 KiB. Within a process there is no difference. Reduce-scatter and all-gather instead of a large ring gain nothing.

Between processes with one replica each, on CPU, not TensorFlow's collectives but `workers/links.py` carries all but
broadcasts. Their lanes are one for each `Links`, and the counts of a lane order what it carries: nothing else does, so
that lanes go on side by side.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.counts import LANES, Lanes
from tfzero.collectives.keys import SIZES, Keys
from tfzero.collectives.ways import Place, Way
from tfzero.host import graphs
from tfzero.workers.links import Links

# Far from the keys that TensorFlow's own collectives count up from 1.
_group_keys = itertools.count(1_000_000)
# Rings exchange among so many members of one process. [Note: ways]
_MOST_EXCHANGING = 11
# [Note: small sums]
_MOST_GATHERED_BYTES, _MOST_RECEIVED_BYTES = 2**16, 2**18
# As many `Links`: for the usual lane and the backward one.
LINKED_LANES = 2
_OVER_LINKS = {
    tf.raw_ops.CollectiveReduceV2: Links.all_reduce,
    tf.raw_ops.CollectiveGatherV2: Links.all_gather,
    tf.raw_ops.CollectiveAllToAllV2: Links.all_to_all,
}


class Group:
    """The replicas of one strategy as a collective group.

    Each method that takes `replica` is called while that local replica is traced (in a `tf.function`), emits its part
    of the collective on its device, and must be called by every replica of every worker in the same order.

    Args:
        devices: this process's devices, one per local replica.
        world_size: number of replicas in all processes.
        first_rank: rank of this process's first replica.
        hint: "ring" or "nccl": TensorFlow compares it in lower case, and takes all else for "ring".
        two_level: whether sums are taken within each worker first. [Note: two levels]
        links: two `Links` that carry the collectives instead of TensorFlow's own, or none.
        transport: whose ways of `collectives/ways.py` are taken; by default those of the hint.
    """

    def __init__(
        self,
        devices: Sequence[str],
        world_size: int,
        first_rank: int,
        hint: str,
        two_level: bool = False,
        links: Sequence[Links] = (),
        transport: str = "",
    ) -> None:
        self.devices = tuple(devices)
        self.world_size = world_size
        self.hint = hint.lower()
        self.links = tuple(links)
        self.transport = transport or (ways.NCCL if self.hint == "nccl" else ways.RINGS)
        self._members_here = len(self.devices)
        self._ranks = [first_rank + replica for replica in range(len(self.devices))]
        self._group_keys = [next(_group_keys)] * len(self.devices)
        self._launchers: dict = {}
        lanes = 1 if self.transport == ways.NCCL else LANES + 1
        self.keys = Keys(len(self.devices), lanes)
        self.lanes = Lanes(self.devices, lanes, is_counted=len(self.devices) < world_size)
        self._is_silent = False
        self.within: Group | None = None
        self.across = self
        if two_level:
            self._make_levels(first_rank)

    def _make_levels(self, first_rank: int) -> None:
        """The groups of [Note: two levels]. They share this one's keys, lanes and counts."""
        here = len(self.devices)
        workers, worker = self.world_size // here, first_rank // here
        keys = [next(_group_keys) for _ in range(workers + here)]
        self.within, self.across = copy.copy(self), copy.copy(self)
        self.within.world_size, self.within._ranks = here, list(range(here))
        self.within._group_keys = [keys[worker]] * here
        self.across.world_size, self.across._ranks = workers, [worker] * here
        self.across._group_keys = keys[workers:]
        self.across._members_here = 1
        self.within.across, self.across.across = self.within, self.across

    def rank(self, replica: int) -> int:
        """Rank of a local replica."""
        return self._ranks[replica]

    @property
    def place(self) -> Place:
        """Where its collectives run. [Note: ways]"""
        is_crowded = self.transport == ways.RINGS and self._members_here > _MOST_EXCHANGING
        processes = ways.SEVERAL if self.world_size > self._members_here else ways.ONE
        return Place(ways.CROWDED if is_crowded else self.transport, processes)

    @property
    def exchanges_encoded(self) -> bool:
        """Whether gradients can be exchanged encoded. [Note: ways]"""
        return self.across.place.exchanges_encoded

    def way(self, primitive: str, dtype: tf.DType) -> Way:
        """The way that one of `ways.PRIMITIVES` takes here."""
        return ways.choose(primitive, dtype.name, self.place)

    @contextlib.contextmanager
    def silenced(self):
        """Within it nothing is sent: what is traced gives this replica's own values, in the shapes of results.

        No keys are taken, so that it may differ between replicas. For measuring what is not communication.
        """
        groups = [self, self.across, *([] if self.within is None else [self.within])]
        for group in groups:
            group._is_silent = True
        try:
            yield
        finally:
            for group in groups:
                group._is_silent = False

    @property
    def _is_alone(self) -> bool:
        return self.world_size == 1 or self._is_silent

    # Each is the sum, or the rows, of all replicas' values.

    def all_reduce(self, value: tf.Tensor, replica: int) -> tf.Tensor:
        """Sum over replicas of a tensor of any dtype, with the same shape on all of them."""
        if self._is_alone or value.shape.num_elements() == 0:
            return tf.identity(value)
        if value.dtype.is_complex:
            parts = self.all_reduce(tf.stack([tf.math.real(value), tf.math.imag(value)]), replica)
            return tf.complex(parts[0], parts[1])
        way = self.way(ways.ALL_REDUCE, value.dtype)
        carried = _carried(value, way)
        if value.shape.is_fully_defined():
            return _restored(self._reduce(carried, replica), way, value.dtype)
        flat, size = _pad_to_size(carried, tf.size(value, tf.int64))
        summed = self._reduce(flat, replica, size)[: tf.size(value, tf.int64)]
        whole = tf.ensure_shape(tf.reshape(summed, tf.shape(value)), value.shape)
        return _restored(whole, way, value.dtype)

    def reduce_scatter(self, rows: tf.Tensor, replica: int, dtype: tf.DType | None = None) -> tf.Tensor:
        """Sum over replicas of this rank's row: `[world_size, n]` to `[n]`. Adds 16-bit floats in float32.

        Args:
            rows: every rank's row as this replica has it; travels in its own dtype.
            replica: the local replica.
            dtype: dtype of the sum; by default that of `rows`.
        """
        dtype = rows.dtype if dtype is None else dtype
        if self._is_alone:
            return tf.cast(rows[self.rank(replica)], dtype)
        if self.within is not None:
            return self.across.reduce_scatter(self.sum_within(rows, replica), replica, dtype)
        way = self.way(ways.REDUCE_SCATTER, rows.dtype)
        if way.operation == ways.ALL_TO_ALL:
            received = self.all_to_all(rows, replica)
            is_narrow = rows.dtype in (tf.bfloat16, tf.float16)
            return tf.cast(tf.reduce_sum(tf.cast(received, tf.float32) if is_narrow else received, 0), dtype)
        carried = _carried(rows, way)
        if way.operation == ways.ALL_REDUCE:
            return tf.cast(self.all_reduce(carried, replica)[self.rank(replica)], dtype)
        return tf.cast(self._scatter_sum(carried, replica), dtype)

    def sum_within(self, rows: tf.Tensor, replica: int) -> tf.Tensor:
        """The first of two levels: `[world_size, n]` to the rows that are left to be exchanged by `across`.

        Those are `[workers, n]`, sums over this worker's replicas. With one level `rows` themselves, and `across` is
        this group. 16-bit floats become float32 when they are added.
        """
        if self.within is None:
            return rows
        by_place = tf.reshape(rows, [self.across.world_size, self.within.world_size, -1])
        dtype = tf.float32 if rows.dtype in (tf.bfloat16, tf.float16) else rows.dtype
        return self.within.reduce_scatter(tf.transpose(by_place, [1, 0, 2]), replica, dtype)

    def all_to_all(self, rows: tf.Tensor, replica: int) -> tf.Tensor:
        """Row `r` goes to rank `r`; the row that comes from rank `r` takes its place: `[world_size, n]` to the same."""
        if self._is_alone:
            return rows
        way = self.way(ways.ALL_TO_ALL, rows.dtype)
        if way.operation == ways.ALL_GATHER:
            return self.all_gather(rows, replica)[:, self.rank(replica)]
        received = self._emit(tf.raw_ops.CollectiveAllToAllV2, _carried(rows, way), replica)
        return _restored(received, way, rows.dtype)

    def all_gather(self, row: tf.Tensor, replica: int, backward: bool = False) -> tf.Tensor:
        """Every rank's row: `[n]` to `[world_size, n]`, for a static shape and any dtype.

        `backward` puts it into the lane of gathers that are traced long after what needs them. [Note: ordering]
        """
        if self._is_alone:
            return tf.stack([row] * self.world_size)
        way = self.way(ways.ALL_GATHER, row.dtype)
        carried, lane = _carried(row, way), -1 if backward else None
        gathered = self._emit(tf.raw_ops.CollectiveGatherV2, carried, replica, lane=lane)
        return _restored(tf.reshape(gathered, [self.world_size, *row.shape]), way, row.dtype)

    def all_gather_parts(self, value: tf.Tensor, replica: int) -> list[tf.Tensor]:
        """Every rank's tensor, in rank order; their shapes may differ, also from step to step, but not the rank."""
        if self._is_alone:
            return [value] * self.world_size
        way = self.way(ways.ALL_GATHER, value.dtype)
        shapes = self.all_gather(tf.reshape(tf.shape(value, tf.int64), [-1]), replica)  # [world_size, rank]
        sizes = tf.reduce_prod(shapes, 1)
        flat, size = _pad_to_size(_carried(value, way), tf.reduce_max(sizes))
        gathered = self._emit(tf.raw_ops.CollectiveGatherV2, flat, replica, size)
        rows = tf.reshape(gathered, [self.world_size, -1])
        parts = [tf.reshape(rows[k, : sizes[k]], shapes[k]) for k in range(self.world_size)]
        static = [None, *value.shape[1:]] if value.shape.rank else []
        return [tf.ensure_shape(_restored(part, way, value.dtype), static) for part in parts]

    def broadcast(self, value: tf.Tensor, replica: int) -> tf.Tensor:
        """Rank 0's value on all, for a static shape and any dtype."""
        if self._is_alone or value.shape.num_elements() == 0:
            return tf.identity(value)
        way = self.way(ways.BROADCAST, value.dtype)
        return _restored(self._broadcast(_carried(value, way), replica), way, value.dtype)

    def launch(self, method: Callable, values: Sequence, *args) -> list:
        """Runs one collective for all local replicas at once, from outside a replica; gives one result for each.

        Args:
            method: one of this group's methods, e.g. `group.all_reduce`.
            values: one tensor per local replica.
        """

        def collective(*tensors):
            self.keys.align()
            results = []
            for replica, tensor in enumerate(tensors):
                with tf.device(self.devices[replica]):
                    results.append(method(tensor, replica, *args))
            return results

        if not tf.executing_eagerly():
            return collective(*values)
        tensors = [tf.convert_to_tensor(value) for value in values]
        is_ragged = method == self.all_gather_parts  # of a size that another worker may have seen before
        specs = tuple(tf.TensorSpec([None] * t.shape.rank if is_ragged else t.shape, t.dtype) for t in tensors)
        signature = (method, args, self._is_silent, specs)
        if signature not in self._launchers:
            self._launchers[signature] = tf.function(collective, autograph=False).get_concrete_function(*specs)
        return self._launchers[signature](*tensors)

    def _emit(
        self, operation: Callable, value: tf.Tensor, replica: int, size=None, lane: int | None = None, **attributes
    ) -> tf.Tensor:
        """Puts an operation into the graph. `size` is the index of that of `SIZES` to which a value is padded."""
        shape = None if size is not None else tuple(value.shape)
        content = (operation.__name__, value.dtype.name, shape)
        key, lane_of_key = self.keys.take(replica, content, lane, is_sized=size is not None)
        if self.links:
            return self._emit_over_links(operation, value, replica, 0 if lane is None else lane, key)
        lane = lane_of_key
        with tf.device(self.devices[replica]), self.lanes.counted(replica, lane, value) as ended:
            result = operation(
                input=value,
                group_size=self.world_size,
                group_key=self._group_keys[replica],
                instance_key=key if size is None else key + size,
                ordering_token=[self.lanes.tokens[replica][lane].handle],
                communication_hint=self.hint,
                **attributes,
            )
            ended(result)
        return self.lanes.noted(result, replica, lane)

    def _emit_over_links(self, operation: Callable, value: tf.Tensor, replica: int, lane: int, key: int) -> tf.Tensor:
        """The same collective over links. Those of one lane are in order, as their counts are. [Note: links]"""
        method = _OVER_LINKS[operation]
        run = functools.partial(method, self.links[lane], key=key)
        rows = [self.world_size] if operation is tf.raw_ops.CollectiveGatherV2 else []
        with tf.device(self.devices[replica]), self.lanes.counted(replica, lane, value) as ended:
            flat = tf.reshape(value, [-1])
            filled = graphs.fill(run, flat, tf.concat([rows, tf.shape(flat)], 0), method.__name__)
            result = tf.reshape(filled, tf.concat([rows, tf.shape(value)], 0))
            ended(result)
        return self.lanes.noted(tf.ensure_shape(result, [*rows, *value.shape]), replica, lane)

    def sums_by_gathering(self, size_bytes: int) -> bool:
        """Whether so many bytes are summed without a ring. [Note: small sums]"""
        limit = min(_MOST_GATHERED_BYTES, _MOST_RECEIVED_BYTES // max(1, self.world_size - 1))
        return self.lanes.is_counted and self.transport != ways.NCCL and size_bytes <= limit

    def _reduce(self, value: tf.Tensor, replica: int, size=None) -> tf.Tensor:
        elements = value.shape.num_elements() or 1
        is_gathered_as_it_is = not self.way(ways.ALL_GATHER, value.dtype).dtype
        if elements > 1 and is_gathered_as_it_is and self.sums_by_gathering(elements * value.dtype.size):
            rows = self._emit(tf.raw_ops.CollectiveGatherV2, tf.reshape(value, [-1]), replica)
            return tf.reduce_sum(tf.reshape(rows, [self.world_size, *value.shape]), 0)
        return self._emit(tf.raw_ops.CollectiveReduceV2, value, replica, size, merge_op="Add", final_op="Id")

    def _scatter_sum(self, rows: tf.Tensor, replica: int) -> tf.Tensor:
        """TensorFlow's own reduce-scatter, which NCCL alone has."""
        flat = tf.reshape(rows, [-1])
        row = self._emit(tf.raw_ops.CollectiveReduceScatterV2, flat, replica, merge_op="Add", final_op="Id")
        return tf.reshape(row, rows.shape[1:])

    def _broadcast(self, value: tf.Tensor, replica: int) -> tf.Tensor:
        key, lane = self.keys.take(replica, ("Broadcast", value.dtype.name, tuple(value.shape)), lane=0)
        attributes = {
            "group_size": self.world_size,
            "group_key": self._group_keys[replica],
            "instance_key": key,
            "communication_hint": self.hint,
        }
        with tf.device(self.devices[replica]), self.lanes.counted(replica, lane, value) as ended:
            if self.rank(replica) == 0:
                result = tf.raw_ops.CollectiveBcastSendV2(input=value, **attributes)
            else:
                result = tf.raw_ops.CollectiveBcastRecvV2(T=value.dtype, shape=value.shape, **attributes)
            ended(result)
        return result


def _carried(value: tf.Tensor, way: Way) -> tf.Tensor:
    """A value in the dtype in which it is carried."""
    if not way.dtype:
        return value
    return tf.bitcast(value, way.dtype) if way.is_disguise else tf.cast(value, way.dtype)


def _restored(value: tf.Tensor, way: Way, dtype: tf.DType) -> tf.Tensor:
    """What was carried, in its own dtype again."""
    if not way.dtype:
        return value
    return tf.bitcast(value, dtype) if way.is_disguise else tf.cast(value, dtype)


def _pad_to_size(value: tf.Tensor, elements: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Flattens and pads to the least of `SIZES` that is at least `elements`; also that one's index. [Note: keys]"""
    sizes = tf.constant(SIZES, tf.int64)
    index = tf.searchsorted(sizes, elements[tf.newaxis])[0]
    flat = tf.reshape(value, [-1])
    return tf.pad(flat, [[0, sizes[index] - tf.size(flat, tf.int64)]]), index
