"""All replicas as one group, or as two levels: all-reduce, reduce-scatter, all-gather and broadcast.

A `Transport` carries the collectives ([Note: transports] in `collectives/transport.py`). The table in
`collectives/ways.py` says which primitive carries what, and in which dtype; keys come from `collectives/keys.py`. This
module knows the rest:

[Note: two levels] In an all-to-all each of a worker's K replicas sends rows to all other workers. With two levels the
replicas of a worker first add up their rows: each replica sums the rows for the ranks that have its own place in their
workers (`within`). Then the replicas of one place exchange these sums (`across`): the network carries one K-th, in W-1
messages instead of N-K. Intermediate sums are at least float32. All-gather is a ring, which leaves a worker only once
anyway.

[Note: small sums] Between processes on CPU, a tensor of a few KiB is summed sooner if all replicas gather all of it
and add: N-1 messages one after the other instead of 2(N-1). Milliseconds, ring and gathered, on two cores
(`benchmarks/collectives.py`): two workers 1.8 and 1.2 at 4 KiB, 2.4 and 2.1 at 64 KiB, 3.2 and 3.8 at 512 KiB; four
workers 7.5 and 6.4, 9.1 and 7.4, 10.5 and 10.4. A ring passes a single number on whole, which is faster with four:
4.0 and 5.2. So tensors of up to 64 KiB are gathered, except single numbers, as long as no replica receives more than
256 KiB. Within a process there is no difference. Reduce-scatter and all-gather instead of a large ring gain nothing.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.counts import Lanes
from tfzero.collectives.keys import BOUND_TO, SIZES, Keys
from tfzero.collectives.transport import Call, Silent, Transport
from tfzero.collectives.ways import Place, Way

# Far from the keys of TensorFlow's own collectives, which count up from 1. All workers must make the same groups: the
# workers of a strategy compare `Group.key` when they meet.
_group_keys = itertools.count(1_000_000)
# [Note: small sums]
_MOST_GATHERED_BYTES, _MOST_RECEIVED_BYTES = 2**16, 2**18


class Group:
    """The replicas of one strategy as a collective group.

    Call each method that takes `replica` while that local replica is traced (in a `tf.function`). It emits the
    operations of the collective on the replica's device. Every replica of every worker must call it, in the same order.

    Args:
        devices: this process's devices, one per local replica.
        world_size: number of replicas in all processes.
        first_rank: rank of this process's first replica.
        transport: carries the collectives.
        two_level: whether sums are taken within each worker first. [Note: two levels]

    Raises:
        ValueError: if the transport cannot carry these replicas' collectives in order.
    """

    def __init__(
        self,
        devices: Sequence[str],
        world_size: int,
        first_rank: int,
        transport: Transport,
        two_level: bool = False,
    ) -> None:
        transport.check_group(len(devices), world_size)
        self.devices = tuple(devices)
        self.world_size = world_size
        self.transport: Transport | Silent = transport
        self._silent = Silent(transport)
        self._members_here = len(self.devices)
        self._ranks = [first_rank + replica for replica in range(len(self.devices))]
        self._group_keys = [next(_group_keys)] * len(self.devices)
        self._launchers: dict = {}
        self.keys = Keys(len(self.devices), transport.lanes)
        self.lanes = Lanes(self.devices, transport.lanes, is_counted=len(self.devices) < world_size)
        self.within: Group | None = None
        self.across = self
        if two_level:
            self._make_levels(first_rank)

    def _make_levels(self, first_rank: int) -> None:
        """Makes the groups of [Note: two levels]. They share this group's keys, lanes and counts."""
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

    @property
    def key(self) -> int:
        """The key by which TensorFlow knows this group in all processes."""
        return self._group_keys[0]

    def rank(self, replica: int) -> int:
        """Rank of a local replica."""
        return self._ranks[replica]

    @property
    def place(self) -> Place:
        """Where its collectives run. [Note: ways]"""
        return ways.place_of(self.transport.rows, self._members_here, self.world_size)

    @property
    def is_between(self) -> bool:
        """Whether some members are in other processes."""
        return self.world_size > self._members_here

    @property
    def exchanges_encoded(self) -> bool:
        """Whether encoded gradients can be exchanged. [Note: ways]"""
        return self.across.place.exchanges_encoded

    def way(self, primitive: str, dtype: tf.DType) -> Way:
        """The way that one of `ways.PRIMITIVES` takes here."""
        return self.transport.way(primitive, dtype.name, self.place)

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """While active, nothing is sent: traced collectives return this replica's own values, in the shapes of results.

        No keys are taken, so replicas may trace different collectives. Used to measure a step without communication.
        """
        groups = {self, self.across, *([] if self.within is None else [self.within])}
        former = {group: group.transport for group in groups}
        for group in groups:
            group.transport = self._silent
        try:
            yield
        finally:
            for group, transport in former.items():
                group.transport = transport

    def wait_for(self, tensors: Sequence[tf.Tensor], replica: int) -> None:
        """Makes a local replica's next collectives in this graph wait for tensors of it. [Note: batch first]"""
        if not self._is_alone:
            self.lanes.wait_for(tensors, replica)

    @property
    def _is_alone(self) -> bool:
        return self.world_size == 1 or self.transport is self._silent

    def _alone(self, primitive: str, value: tf.Tensor, replica: int) -> tf.Tensor:
        """The result of a primitive for a replica when nothing is sent."""
        return getattr(self._silent, primitive)(value, Call(self.world_size, self.rank(replica)))

    # Each returns the sum or the rows of all replicas' values.

    def all_reduce(self, value: tf.Tensor, replica: int) -> tf.Tensor:
        """Sum over replicas of a tensor of any dtype, with the same shape on all of them."""
        if self._is_alone or value.shape.num_elements() == 0:
            return self._alone(ways.ALL_REDUCE, value, replica)
        if value.dtype.is_complex:
            sums = self.all_reduce(tf.stack([tf.math.real(value), tf.math.imag(value)]), replica)
            return tf.complex(sums[0], sums[1])
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
            rows: this replica's contribution to every rank's row; travels in its own dtype.
            replica: the local replica.
            dtype: dtype of the sum; by default that of `rows`.
        """
        dtype = rows.dtype if dtype is None else dtype
        if self._is_alone:
            return tf.cast(self._alone(ways.REDUCE_SCATTER, rows, replica), dtype)
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
        """The first of two levels: reduces `[world_size, n]` to the rows that `across` has yet to exchange.

        These are `[workers, n]`, sums over this worker's replicas; 16-bit floats become float32 when they are added.
        With one level this returns `rows` themselves, and `across` is this group.
        """
        if self.within is None:
            return rows
        by_place = tf.reshape(rows, [self.across.world_size, self.within.world_size, -1])
        dtype = tf.float32 if rows.dtype in (tf.bfloat16, tf.float16) else rows.dtype
        return self.within.reduce_scatter(tf.transpose(by_place, [1, 0, 2]), replica, dtype)

    def all_to_all(self, rows: tf.Tensor, replica: int) -> tf.Tensor:
        """Sends row `r` to rank `r` and returns the rows received, in rank order; both are `[world_size, n]`."""
        if self._is_alone:
            return self._alone(ways.ALL_TO_ALL, rows, replica)
        way = self.way(ways.ALL_TO_ALL, rows.dtype)
        if way.operation == ways.ALL_GATHER:
            return self.all_gather(rows, replica)[:, self.rank(replica)]
        received = self._emit(ways.ALL_TO_ALL, _carried(rows, way), replica)
        return _restored(received, way, rows.dtype)

    def all_gather(self, row: tf.Tensor, replica: int, backward: bool = False) -> tf.Tensor:
        """Every rank's row: `[n]` to `[world_size, n]`, for a static shape and any dtype.

        `backward` puts it into the lane of gathers that are traced long after their consumers. [Note: ordering]
        """
        if self._is_alone:
            return self._alone(ways.ALL_GATHER, row, replica)
        way = self.way(ways.ALL_GATHER, row.dtype)
        gathered = self._emit(ways.ALL_GATHER, _carried(row, way), replica, backward=backward)
        return _restored(tf.reshape(gathered, [self.world_size, *row.shape]), way, row.dtype)

    def all_gather_ragged(self, value: tf.Tensor, replica: int) -> list[tf.Tensor]:
        """Every rank's tensor, in rank order. Shapes may differ between ranks and steps; the number of axes may not."""
        if self._is_alone:
            return [value] * self.world_size
        way = self.way(ways.ALL_GATHER, value.dtype)
        shapes = self.all_gather(tf.reshape(tf.shape(value, tf.int64), [-1]), replica)  # [world_size, rank]
        sizes = tf.reduce_prod(shapes, 1)
        flat, size = _pad_to_size(_carried(value, way), tf.reduce_max(sizes))
        gathered = self._emit(ways.ALL_GATHER, flat, replica, size)
        rows = tf.reshape(gathered, [self.world_size, -1])
        tensors = [tf.reshape(rows[k, : sizes[k]], shapes[k]) for k in range(self.world_size)]
        static = [None, *value.shape[1:]] if value.shape.rank else []
        return [tf.ensure_shape(_restored(tensor, way, value.dtype), static) for tensor in tensors]

    def broadcast(self, value: tf.Tensor, replica: int) -> tf.Tensor:
        """Rank 0's value on all replicas, for a static shape and any dtype."""
        if self._is_alone or value.shape.num_elements() == 0:
            return self._alone(ways.BROADCAST, value, replica)
        way = self.way(ways.BROADCAST, value.dtype)
        return _restored(self._emit(ways.BROADCAST, _carried(value, way), replica), way, value.dtype)

    def launch(self, method: Callable, values: Sequence, *args: Any) -> list:
        """Runs one collective for all local replicas at once, from outside a replica; returns one result for each.

        Args:
            method: one of this group's methods, e.g. `group.all_reduce`.
            values: one tensor per local replica.
        """

        def collective(*tensors: tf.Tensor) -> list:
            self.keys.align()
            results = []
            for replica, tensor in enumerate(tensors):
                with tf.device(self.devices[replica]):
                    results.append(method(tensor, replica, *args))
            return results

        if not tf.executing_eagerly():
            return collective(*values)
        tensors = [tf.convert_to_tensor(value) for value in values]
        is_ragged = method == self.all_gather_ragged  # another worker may have seen this size before
        specs = tuple(tf.TensorSpec([None] * t.shape.rank if is_ragged else t.shape, t.dtype) for t in tensors)
        signature = (method, args, self.transport, specs)
        if signature not in self._launchers:
            self._launchers[signature] = tf.function(collective, autograph=False).get_concrete_function(*specs)
        return self._launchers[signature](*tensors)

    def _emit(
        self, primitive: str, value: tf.Tensor, replica: int, size: tf.Tensor | None = None, backward: bool = False
    ) -> tf.Tensor:
        """Has the transport carry a primitive. `size` is the index in `SIZES` of the padded size, if there is one."""
        content = (BOUND_TO[primitive], value.dtype.name, None if size is not None else tuple(value.shape))
        # A broadcast has no token, and a count only between processes: it always uses the same lane.
        lane = 0 if primitive == ways.BROADCAST else -1 if backward else None
        key, lane = self.keys.take(replica, content, lane, is_sized=size is not None)
        lane = self.transport.lane(lane, backward)
        call = Call(
            self.world_size,
            self.rank(replica),
            self._group_keys[replica],
            key,
            size,
            lane,
            self.lanes.tokens[replica][lane],
        )
        with tf.device(self.devices[replica]), self.lanes.counted(replica, lane, value) as ended:
            result = getattr(self.transport, primitive)(value, call)
            ended(result)
        result = self.transport.ended(primitive, result, value, call)
        return result if primitive == ways.BROADCAST else self.lanes.noted(result, replica, lane)

    def sums_by_gathering(self, size_bytes: int) -> bool:
        """Whether sums of so many bytes avoid the ring. [Note: small sums]"""
        limit = min(_MOST_GATHERED_BYTES, _MOST_RECEIVED_BYTES // max(1, self.world_size - 1))
        return self.lanes.is_counted and self.transport.gathers_small_sums and size_bytes <= limit

    def _reduce(self, value: tf.Tensor, replica: int, size: tf.Tensor | None = None) -> tf.Tensor:
        elements = value.shape.num_elements() or 1
        is_gathered_as_it_is = not self.way(ways.ALL_GATHER, value.dtype).dtype
        if elements > 1 and is_gathered_as_it_is and self.sums_by_gathering(elements * value.dtype.size):
            rows = self._emit(ways.ALL_GATHER, tf.reshape(value, [-1]), replica)
            return tf.reduce_sum(tf.reshape(rows, [self.world_size, *value.shape]), 0)
        return self._emit(ways.ALL_REDUCE, value, replica, size)

    def _scatter_sum(self, rows: tf.Tensor, replica: int) -> tf.Tensor:
        """The transport's own reduce-scatter, used where its rows of the table have one."""
        row = self._emit(ways.REDUCE_SCATTER, tf.reshape(rows, [-1]), replica)
        return tf.reshape(row, rows.shape[1:])


def _carried(value: tf.Tensor, way: Way) -> tf.Tensor:
    """A value in the dtype that carries it."""
    if not way.dtype:
        return value
    return tf.bitcast(value, way.dtype) if way.is_disguise else tf.cast(value, way.dtype)


def _restored(value: tf.Tensor, way: Way, dtype: tf.DType) -> tf.Tensor:
    """A carried value, back in its own dtype."""
    if not way.dtype:
        return value
    return tf.bitcast(value, dtype) if way.is_disguise else tf.cast(value, dtype)


def _pad_to_size(value: tf.Tensor, elements: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Flattens and pads to the least of `SIZES` that is at least `elements`; returns its index too. [Note: keys]"""
    sizes = tf.constant(SIZES, tf.int64)
    index = tf.searchsorted(sizes, elements[tf.newaxis])[0]
    flat = tf.reshape(value, [-1])
    return tf.pad(flat, [[0, sizes[index] - tf.size(flat, tf.int64)]]), index
