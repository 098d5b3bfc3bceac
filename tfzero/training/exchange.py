"""How one replica exchanges each bucket: it reduces gradients and gathers updated parameters.

[Note: differences] With compression at stages 1 and 2 an owner's updated float32 shard is ahead of the value that every
replica holds. The owner sends the difference, encoded in fewer bits, and every replica adds the decoded difference. The
owner keeps the encoding error as its *lag* (4/N bytes a parameter) and includes it in the next difference. Parameter
plus lag is the master shard, from which the optimizer continues. If someone assigns the parameter, the master follows,
up to the rounding of one difference.

[Note: error feedback] The replica that sends an encoded gradient keeps the encoding error as its *residual* (4 bytes a
parameter), and adds it to the next gradient. A gradient that is not finite leaves the residual as it is.

[Note: late gathers] At stages 1 and 2 an owner's updated values may wait until the next step begins. They wait in the
owner's variable, in their own place (with differences: in the lag). The next step gathers them in the order of the
forward pass, and a layer waits only for its own parameters. Between the update and the gather no one may read the
variable (`training/late_gathers.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tfzero.collectives.codec import Codec
from tfzero.collectives.group import Group
from tfzero.collectives.packing import (
    as_rows,
    pack,
    pack_for_owners,
    pack_owned,
    pack_row,
    unpack,
    unpack_for_owners,
    unpack_owned,
)
from tfzero.plan.placement import Bucket, Placement, Plan, Segment, shard_elements
from tfzero.variables.allocation import local_shard
from tfzero.variables.classes import ShardedParameter, VariableView
from tfzero.variables.gathering import RESIDUAL


@dataclass(frozen=True)
class Wire:
    """How a model's variables travel, and the values that replicas keep because of compression.

    Args:
        codec: encodes matrices; None for no compression.
        lags: lags of variables whose differences travel encoded, by variable index. [Note: differences]
        residuals: encoding errors of gradients, by variable index. [Note: error feedback]
    """

    codec: Codec | None = None
    lags: Mapping[int, keras.Variable] = field(default_factory=dict)
    residuals: Mapping[int, keras.Variable] = field(default_factory=dict)


class Exchange:
    """One replica's part in the exchanges of a step.

    Args:
        variables: the model's Keras variables, in the plan's order.
        plan: says who owns what.
        group: the replicas.
        wire: how the variables travel.
        replica: the local replica.
        across: the replicas of the same place in all workers, if `group` is only one worker's and the step is one of
            all; else None.
    """

    def __init__(self, variables: Sequence[keras.Variable], plan: Plan, group: Group, wire: Wire, replica: int,
                 across: Group | None = None) -> None:  # fmt: skip
        self.variables = variables
        self.plan = plan
        self.group = group
        self.wire = wire
        self.replica = replica
        self.across = across
        self.rank = group.rank(replica)

    # Gradients.

    def reduce(self, bucket: Bucket, gradients: Mapping[int, tf.Tensor]) -> tf.Tensor:
        """Sum over replicas of the part of a bucket that this replica updates: its row, or all of a whole bucket."""
        return self.over_workers(self._reduced(bucket, gradients))

    def over_workers(self, value: tf.Tensor) -> tf.Tensor:
        """The sum over workers of what is a sum over this worker's replicas, if it is not the sum over all already."""
        return value if self.across is None else self.across.all_reduce(value, self.replica)

    def _reduced(self, bucket: Bucket, gradients: Mapping[int, tf.Tensor]) -> tf.Tensor:
        if bucket.sharded_parameters:
            return self._row_of_shards(bucket, gradients)
        with self.group.lanes.purpose(self.replica, f"the gradients of {self._describe(bucket)}"):
            if bucket.compressed:
                return self._reduce_encoded(bucket, gradients)
            packed = pack(bucket, gradients, self.plan.shards)
            if bucket.placement is Placement.WHOLE:
                return self.group.all_reduce(packed, self.replica)
            return self.group.reduce_scatter(packed, self.replica)

    def _row_of_shards(self, bucket: Bucket, shards: Mapping[int, tf.Tensor]) -> tf.Tensor:
        """This replica's row, made from its shards of a bucket's variables; a missing one leaves zeros."""
        size = self.plan.shards
        given = {}
        for segment in bucket.segments:
            empty = tf.zeros([shard_elements(segment.elements, size)], tf.as_dtype(bucket.dtype))
            given[segment.index] = shards.get(segment.index, empty)
        if bucket.placement is Placement.OWNED:
            received = self.group.all_to_all(pack_for_owners(bucket, given, size), self.replica)
            given = unpack_owned(bucket, received, self.rank)
        return pack_row(bucket, self.rank, given)

    def _reduce_encoded(self, bucket: Bucket, gradients: Mapping[int, tf.Tensor]) -> tf.Tensor:
        size, codec = self.plan.shards, self.wire.codec
        is_whole = bucket.placement is Placement.WHOLE
        width = shard_elements(bucket.row_elements, size) if is_whole else bucket.row_elements
        residuals = {s.index: self._local(self.wire.residuals[s.index]) for s in bucket.segments if self.wire.residuals}

        def as_rows_of_ranks(tensors: Mapping[int, tf.Tensor]) -> tf.Tensor:
            """For each rank, the row that it sums; a whole bucket is cut evenly."""
            packed = pack(bucket, tensors, size)
            return as_rows(packed, size) if is_whole else packed

        def encode(gradients: Mapping[int, tf.Tensor]) -> tf.Tensor:
            rows = as_rows_of_ranks(gradients)
            if not residuals:
                return codec.encoded(rows)
            payload, lost = codec.encoded_with(rows, as_rows_of_ranks(residuals))
            lost = tf.reshape(lost, [-1])[: bucket.row_elements] if is_whole else lost
            for index, value in unpack(bucket, lost, self._shapes_of(bucket)).items():
                residuals[index].assign(value)
            return payload

        own = {s.index: gradients[s.index] for s in bucket.segments if s.index in gradients}
        if not self.group.exchanges_encoded:
            row = self.group.reduce_scatter(as_rows_of_ranks(own), self.replica)
            return self._gathered_encoded(bucket, row) if is_whole else row
        if self.group.within is None:
            payload = tf.function(encode, jit_compile=True, autograph=False)(own)
        else:
            payload = codec.encode(self.group.sum_within(as_rows_of_ranks(own), self.replica))
        row = codec.decode_sum(self.group.across.all_to_all(payload, self.replica), width)
        row = self._gathered_encoded(bucket, row) if is_whole else row
        return tf.cast(row, tf.as_dtype(bucket.dtype))

    def _gathered_encoded(self, bucket: Bucket, row: tf.Tensor) -> tf.Tensor:
        """Gathers a whole bucket after each replica has summed one row of it."""
        gathered = self.group.all_gather(self.wire.codec.encode(row[tf.newaxis])[0], self.replica)
        flat = tf.reshape(self.wire.codec.decode(gathered, row.shape[0], row.dtype), [-1])
        return flat[: bucket.row_elements]

    # Parameters.

    def master(self, bucket: Bucket, segment: Segment) -> tf.Tensor:
        """The value of a variable that this replica updates: flat if sharded, else whole. [Note: differences]"""
        value = self.component(segment.index)
        if bucket.sharded_parameters or bucket.placement is not Placement.SHARDED:
            return tf.convert_to_tensor(value)
        shard = self._shard_of(segment, value)
        lag = self.wire.lags.get(segment.index)
        return shard if lag is None else shard + self._local(lag)

    def _range_of(self, segment: Segment) -> tuple[int, int]:
        """The range of a flat variable that this replica updates: its shard, or all of a variable that it owns."""
        if segment.row is not None:
            return 0, segment.elements
        begin = min(self.rank * segment.width, segment.elements)
        return begin, min(begin + segment.width, segment.elements)

    def _shard_of(self, segment: Segment, value: tf.Tensor) -> tf.Tensor:
        begin, end = self._range_of(segment)
        return tf.pad(tf.reshape(value, [-1])[begin:end], [[0, segment.width - (end - begin)]])

    def _ahead(self, segment: Segment, row: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        """This replica's shard in a row minus the same shard of a whole value; zero in the padding."""
        begin, end = self._range_of(segment)
        own = row[segment.offset : segment.offset + end - begin]
        return tf.pad(own - tf.reshape(value, [-1])[begin:end], [[0, segment.width - (end - begin)]])

    def collect_owned(self, bucket: Bucket) -> dict[int, tf.Tensor]:
        """The whole values of variables that this replica owns, by variable index, if they are held in shards."""
        if not (bucket.sharded_parameters and bucket.placement is Placement.OWNED):
            return {}
        shards = {s.index: tf.convert_to_tensor(self.component(s.index)) for s in bucket.segments}
        row = self._row_of_shards(bucket, shards)
        return {
            s.index: tf.reshape(row[s.offset : s.offset + s.width], self._shape_of(s.index))
            for s in bucket.segments_of(self.rank)
        }

    def gather(self, bucket: Bucket, row: tf.Tensor, updated: Collection[int]) -> None:
        """Sends this replica's updated row of a bucket to all replicas, and assigns all replicas' rows.

        Args:
            bucket: the bucket.
            row: this replica's row, or all of a whole bucket.
            updated: the variables that had a gradient; constraints apply to these only.
        """
        if bucket.sharded_parameters:
            self._assign_shards(bucket, row, updated)
            return
        with self.group.lanes.purpose(self.replica, f"the parameters of {self._describe(bucket)}"):
            if bucket.compressed and bucket.placement is Placement.SHARDED:
                self._gather_differences(bucket, row)
                return
            packed = row if bucket.placement is Placement.WHOLE else self.group.all_gather(row, self.replica)

        values = unpack(bucket, packed, self._shapes_of(bucket))
        values = {index: self._constrained(index, value, updated) for index, value in values.items()}

        def assign(values: Mapping[int, tf.Tensor]) -> None:
            for index, value in values.items():
                self.component(index).assign(value)

        # XLA writes into the variables' memory; new memory at every step would leave holes in between.
        tf.function(assign, jit_compile=True, autograph=False)(values)

    # [Note: late gathers]

    def can_wait(self, bucket: Bucket) -> bool:
        """Whether a bucket's parameters may be gathered later. A constraint needs the whole variables at once."""
        is_gathered = self.plan.shards > 1 and bucket.placement is not Placement.WHOLE
        return is_gathered and not bucket.sharded_parameters and not self.is_constrained(bucket)

    def keep(self, bucket: Bucket, row: tf.Tensor) -> None:
        """Keeps this replica's updated part of a bucket for `gather_kept`."""

        def assign(row: tf.Tensor) -> None:
            for segment in bucket.segments_of(self.rank):
                value = self.component(segment.index)
                if segment.index in self.wire.lags:
                    self._local(self.wire.lags[segment.index]).assign(self._ahead(segment, row, value))
                    continue
                begin, end = self._range_of(segment)
                if begin == end:
                    continue
                own = row[segment.offset : segment.offset + end - begin]
                flat = tf.raw_ops.TensorStridedSliceUpdate(
                    input=tf.reshape(value, [-1]), begin=[begin], end=[end], strides=[1], value=own
                )
                value.assign(tf.reshape(flat, value.shape))

        tf.function(assign, jit_compile=True, autograph=False)(row)  # in the variable's memory, as in `gather`

    def gather_kept(self, bucket: Bucket) -> None:
        """Sends the part of a bucket that this replica kept to all replicas, and assigns all replicas' parts."""
        masters = {s.index: tf.reshape(self.master(bucket, s), [-1]) for s in bucket.segments_of(self.rank)}
        self.gather(bucket, pack_row(bucket, self.rank, masters), ())

    def _gather_differences(self, bucket: Bucket, row: tf.Tensor) -> None:
        def encode(row: tf.Tensor) -> tf.Tensor:
            ahead = {s.index: self._ahead(s, row, self.component(s.index)) for s in bucket.segments}
            return self.wire.codec.encoded(pack_row(bucket, self.rank, ahead)[tf.newaxis])[0]

        def assign(gathered: tf.Tensor, row: tf.Tensor) -> None:
            differences = tf.cast(self.wire.codec.decoded(gathered, bucket.row_elements), row.dtype)
            values = unpack(bucket, differences, self._shapes_of(bucket))
            for segment in bucket.segments:
                value = self.component(segment.index) + values[segment.index]
                self._local(self.wire.lags[segment.index]).assign(self._ahead(segment, row, value))
                self.component(segment.index).assign(value)

        payload = tf.function(encode, jit_compile=True, autograph=False)(row)
        gathered = self.group.all_gather(payload, self.replica)
        tf.function(assign, jit_compile=True, autograph=False)(gathered, row)

    def _assign_shards(self, bucket: Bucket, row: tf.Tensor, updated: Collection[int]) -> None:
        mine = {s.index: row[s.offset : s.offset + s.width] for s in bucket.segments_of(self.rank)}
        size = self.plan.shards
        if bucket.placement is Placement.OWNED:
            sent = pack_owned(bucket, mine, self.rank, size)
            mine = unpack_for_owners(bucket, self.group.all_to_all(sent, self.replica))
        for index, shard in mine.items():
            if self.variables[index].constraint is not None and index in updated:
                rows = tf.reshape(self.group.all_gather(shard, self.replica), [-1])
                shape = self._shape_of(index)
                whole = self._constrained(index, tf.reshape(rows[: shape.num_elements()], shape), updated)
                shard = local_shard(whole, None, self.rank, size)
            self.component(index).assign(shard)

    def _constrained(self, index: int, value: tf.Tensor, updated: Collection[int]) -> tf.Tensor:
        constraint = self.variables[index].constraint if index in updated else None
        return value if constraint is None else constraint(value)

    # Helpers.

    def is_constrained(self, bucket: Bucket) -> bool:
        """Whether a variable of a bucket has a constraint."""
        return any(self.variables[segment.index].constraint for segment in bucket.segments)

    def component(self, index: int) -> tf.Variable:
        """This replica's component of a model variable."""
        return self._local(self.variables[index])

    def _local(self, variable: keras.Variable) -> tf.Variable:
        return variable.value.values[self.replica]

    def _shape_of(self, index: int) -> tf.TensorShape:
        return self.variables[index].shape

    def _shapes_of(self, bucket: Bucket) -> list[tf.TensorShape]:
        return [self._shape_of(segment.index) for segment in bucket.segments]

    def _describe(self, bucket: Bucket) -> str:
        first = self.variables[bucket.segments[0].index].path
        return f"bucket {self.plan.buckets.index(bucket)} ({first} and so on)"


def make_wire(
    codec: Codec | None,
    views: Sequence[VariableView],
    plan: Plan,
    strategy: tf.distribute.Strategy,
    loss_scale: keras.optimizers.LossScaleOptimizer | None = None,
) -> Wire:
    """Creates the lags and residuals of the variables that travel encoded.

    Raises:
        ValueError: if no variable travels encoded, so that compression would have no effect.
    """
    if codec is None:
        return Wire()
    encoded = [views[s.index] for bucket in plan.buckets if bucket.compressed for s in bucket.segments]
    if not encoded and not any(_is_parameter(view) and codec.serves(view.shape, view.dtype) for view in views):
        raise ValueError(
            f"compression={strategy.settings.compression!r} has no effect: none of the optimizer's variables travels "
            "encoded. Float32 matrices without a constraint do, of min_shard_elements and more, if their optimizer is "
            f"element-wise; min_shard_elements={strategy.settings.min_shard_elements}. Leave `compression` away."
        )
    lags, residuals = {}, {}
    for view in encoded:
        with strategy.extended.colocate_vars_with(view):
            if view.sharded and not _is_parameter(view):
                lags[view.index] = _zeros_like(view, "lag")
            if strategy.settings.error_feedback:
                residuals[view.index] = _zeros_like(view, "residual", synchronization="on_read", aggregation="sum")
                if _is_parameter(view):
                    _hand_out(residuals[view.index], view, loss_scale)
    return Wire(codec, lags, residuals)


def _is_parameter(view: VariableView) -> bool:
    return isinstance(view.variable.value, ShardedParameter)


def _zeros_like(view: VariableView, name: str, **arguments: Any) -> keras.Variable:
    name = f"{view.variable.name}_{name}"
    return keras.Variable("zeros", view.shape, "float32", trainable=False, name=name, **arguments)


def _hand_out(
    residual: keras.Variable, view: VariableView, loss_scale: keras.optimizers.LossScaleOptimizer | None
) -> None:
    """Attaches its replica's residual to each shard of a parameter: the gradient tape needs it there."""
    for replica, shard in enumerate(view.variable.value.values):
        scale = None if loss_scale is None else loss_scale.dynamic_scale.value.values[replica]
        setattr(shard, RESIDUAL, (residual.value.values[replica], scale))
