"""The step of one replica.

[Note: the walk of one gradient] From the backward pass to the variable a gradient goes

    backward -> unscale -> dense -> reduce-scatter (or keep, when accumulating whole) -> accumulate
    -> all-replica finite vote -> clip by the true norm -> weight decay -> inner update on the shard
    -> moving average -> all-gather -> constraint -> assign

At stage 3 the tape has already reduce-scattered ([Note: gather]), and the all-gather is left to the next reader.
Gradients are summed over replicas; the loss has already been divided by the global count (`training/losses.py`). The
vote takes place only with a loss scale, once per micro-step, as in Keras.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.collectives.packing import pack_row
from tfzero.host import keras_objects, runtime
from tfzero.plan.placement import Bucket, Placement, Plan, Segment
from tfzero.plan.settings import Choice
from tfzero.training.clipping import Clipper
from tfzero.training.exchange import Exchange, Wire
from tfzero.training.merging import Merger
from tfzero.training.overwriting import Overwriting
from tfzero.training.pacing import WINDOW_BUCKETS, Pacer
from tfzero.variables.classes import VariableView


@dataclass(frozen=True)
class Trained:
    """The variables that one wrapper trains, and everything that it trains them with.

    Args:
        variables: the model's Keras variables, in the plan's order.
        optimizers: the inner optimizers; variable `i` uses number `plan.specs[i].optimizer`.
        counting: all optimizers that count steps: the inner ones and a `MultiOptimizer` around them.
        compiled: for each inner optimizer, whether XLA compiles its update.
        plan: says who owns what.
        group: the replicas.
        slots: the optimizers' slots for each variable.
        wire: how variables travel.
        bucket_bytes: size of a full bucket, and the reason for it.
        sharded_gradients: whether gradients are kept in shards, and reduced before they are accumulated (stage 2).
        loss_scale: Keras's loss scale optimizer, if there is one.
        squared_norms: for each inner optimizer, the square of its gradient's norm in the latest update; empty unless
            requested.
        pending: bool, `[variables]`: whether a variable's latest values have yet to be gathered; None if all are always
            gathered at once. [Note: late gathers]
        overwritten: variables that their gradients overwrite, each with its optimizer. [Note: overwriting]
        merger: merges what workers have trained apart; None if they never do.
        across: as in `Exchange`.
        remote: the servers' part, which update in place of the replicas; None without servers.
    """

    variables: tuple[keras.Variable, ...]
    optimizers: tuple[keras.optimizers.Optimizer, ...]
    counting: tuple[keras.optimizers.Optimizer, ...]
    compiled: tuple[bool, ...]
    plan: Plan
    group: Group
    slots: tuple[tuple, ...]
    wire: Wire
    bucket_bytes: Choice
    sharded_gradients: bool
    loss_scale: keras.optimizers.LossScaleOptimizer | None
    squared_norms: tuple[keras.Variable, ...] = ()
    pending: keras.Variable | None = None
    overwritten: tuple[tuple[keras.Variable, keras.optimizers.Optimizer], ...] = ()
    merger: Merger | None = None
    across: Group | None = None
    remote: Any = None

    def exchange(self, replica: int) -> Exchange:
        """A local replica's part in the exchanges."""
        return Exchange(self.variables, self.plan, self.group, self.wire, replica, self.across)


def with_norms(trained: Trained, strategy: tf.distribute.Strategy) -> Trained:
    """The same, except that each step also computes the gradient's norm. All workers call it together."""
    with strategy.extended.creation.of_optimizer_state():
        norms = [keras.Variable("zeros", (), "float32", False, name="squared_norm") for _ in trained.optimizers]
    return replace(trained, squared_norms=tuple(norms))


class ReplicaStep:
    """One step of one replica, while it is traced.

    Args:
        trained: what is trained.
        replica: the local replica.
        gradients: by variable index, followed by those of `trained.overwritten`; a variable without gradient is missing
            and stays as it is.
        gathers_late: whether parameters are kept until the next step gathers them. [Note: late gathers]
        rows: that the worker has of the batch; None if that makes no difference. [Note: apart]
    """

    def __init__(self, trained: Trained, replica: int, gradients: Mapping[int, tf.Tensor], gathers_late: bool = False,
                 rows: tf.Tensor | None = None) -> None:  # fmt: skip
        self.trained = trained
        self.plan = trained.plan
        self.group = trained.group
        self.replica = replica
        self.rank = trained.group.rank(replica)
        self.exchange = trained.exchange(replica)
        count = len(trained.variables)
        self.gradients = {i: gradient for i, gradient in gradients.items() if i < count}
        nexts = {i - count: value for i, value in gradients.items() if i >= count}
        self.overwriting = Overwriting(trained.overwritten, nexts, trained.group, replica)
        self.gathers_late = gathers_late
        self.rows = rows
        self.buckets = [b for b in self.plan.buckets if any(s.index in self.gradients for s in b.segments)]

    def run(self) -> None:
        """The whole walk. [Note: the walk of one gradient]"""
        self._unscale()
        rows = self._reduce() if self._exchanges_first else None
        if self.trained.loss_scale is None:
            self._if_fed(lambda: self._advance(rows))
            return
        tensors = list(rows.values()) if rows is not None else list(self.gradients.values())
        finite = self._vote([*tensors, *self.overwriting.values.values()])
        self._if_fed(lambda: tf.cond(finite, lambda: self._advance_and_grow_scale(rows), self._shrink_scale))

    def _if_fed(self, advance: Callable[[], object]) -> None:
        """Advances, except where a worker that trains apart has no rows: there only the step counts."""
        if self.rows is None or any(optimizer.gradient_accumulation_steps for optimizer in self.trained.optimizers):
            advance()
        else:
            tf.cond(self.rows > 0, lambda: (advance(), None)[1], self._count)

    @property
    def _exchanges_first(self) -> bool:
        accumulates = any(optimizer.gradient_accumulation_steps for optimizer in self.trained.optimizers)
        return self.trained.sharded_gradients or not accumulates

    # Unscale, vote.

    def _unscale(self) -> None:
        if self.trained.loss_scale is not None:
            scale = tf.convert_to_tensor(self.trained.loss_scale.dynamic_scale.value)
            self.gradients = {i: g / tf.cast(scale, g.dtype) for i, g in self.gradients.items()}
            return
        for i, gradient in self.gradients.items():
            factor = self._optimizer_of(i).loss_scale_factor
            if factor is not None:
                self.gradients[i] = gradient / tf.cast(factor, gradient.dtype)

    def _vote(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Whether every element on every replica is finite."""
        flawed = tf.add_n([tf.cast(tf.reduce_any(~tf.math.is_finite(t)), tf.int64) for t in tensors])
        return self.exchange.over_workers(self.group.all_reduce(flawed, self.replica)) == 0

    def _advance_and_grow_scale(self, rows: dict[Bucket, tf.Tensor] | None) -> None:
        self._advance(rows)
        scaler = self.trained.loss_scale
        counter, scale = self._local(scaler.step_counter), self._local(scaler.dynamic_scale)
        grows = tf.equal(counter, tf.cast(scaler.dynamic_growth_steps - 1, counter.dtype))
        scale.assign(tf.where(grows, 2.0 * scale, scale))
        counter.assign(tf.where(grows, tf.zeros_like(counter), counter + 1))

    def _shrink_scale(self) -> None:
        scaler = self.trained.loss_scale
        self._local(scaler.step_counter).assign(0)
        scale = self._local(scaler.dynamic_scale)
        scale.assign(0.5 * scale)

    # Reduce-scatter.

    def _reduce(self) -> dict[Bucket, tf.Tensor]:
        """Sums gradients over replicas: of each bucket the row that this replica updates, or all of a whole bucket."""
        rows = {}
        pacer = Pacer(WINDOW_BUCKETS * self.trained.bucket_bytes.value)
        for bucket in self.buckets:
            rows[bucket] = self.exchange.reduce(bucket, self.gradients)
            if self.trained.sharded_gradients and self.plan.shards > 1 and not bucket.sharded_parameters:
                large = [self.gradients[s.index] for s in bucket.segments if len(bucket.segments) == 1]
                pacer.add(rows[bucket], large, self.plan.bucket_bytes(bucket))
        return rows

    # Accumulate.

    def _advance(self, rows: dict[Bucket, tf.Tensor] | None) -> None:
        self.overwriting.assign()
        for index, optimizer in enumerate(self.trained.optimizers):
            buckets = [bucket for bucket in self.buckets if bucket.optimizer == index]
            if optimizer.gradient_accumulation_steps:
                self._accumulate_or_update(optimizer, buckets, rows)
            else:
                given = rows or {}
                reduced = {b: given[b] if b in given else self.exchange.reduce(b, self.gradients) for b in buckets}
                self._update(optimizer, buckets, reduced)
        self._count()

    def _count(self) -> None:
        for optimizer in self.trained.counting:
            counter = self._local(runtime.iteration_counter(optimizer))
            counter.assign_add(tf.ones_like(counter))

    def _accumulate_or_update(
        self, optimizer: keras.optimizers.Optimizer, buckets: Sequence[Bucket], rows: Mapping[Bucket, tf.Tensor] | None
    ) -> None:
        counter = self._local(runtime.iteration_counter(optimizer))
        steps = optimizer.gradient_accumulation_steps

        def update() -> None:
            if self.trained.sharded_gradients:
                totals = {b: (rows[b] + self._accumulated_row(b)) / steps for b in buckets}
            else:
                means = {i: (self.gradients[i] + self._accumulator(i)) / steps for i in self._indices(buckets)}
                totals = {b: self.exchange.reduce(b, means) for b in buckets}
            for i in self._indices(buckets):
                self._accumulator(i).assign(tf.zeros_like(self._accumulator(i)))
            self._update(optimizer, buckets, totals)

        def accumulate() -> None:
            for bucket in buckets:
                for segment in self._active(bucket):
                    if self.trained.sharded_gradients:
                        gradient = rows[bucket][segment.offset : segment.offset + segment.width]
                    else:
                        gradient = self.gradients[segment.index]
                    accumulator = self._accumulator(segment.index)
                    accumulator.assign_add(tf.reshape(gradient, accumulator.shape))
            if optimizer.use_ema:
                self._update(optimizer, [], {})

        tf.cond(tf.equal((counter + 1) % steps, 0), update, accumulate)

    def _accumulated_row(self, bucket: Bucket) -> tf.Tensor:
        shards = {s.index: tf.reshape(self._accumulator(s.index), [-1]) for s in self._mine(bucket)}
        return pack_row(bucket, self.rank, shards)

    # Update, gather, assign.

    def _update(
        self, optimizer: keras.optimizers.Optimizer, buckets: Sequence[Bucket], rows: Mapping[Bucket, tf.Tensor]
    ) -> None:
        """Updates the variables of `buckets`; with a moving average, also the averages of all others."""
        learning_rate = None
        clip = None
        if buckets:
            clip = Clipper(self.trained, self.replica, optimizer, self.gradients).of(rows)
            if self.trained.remote is not None:
                self._push(optimizer, rows, clip)
                return
            learning_rate = keras_objects.rate_now(optimizer)
            runtime.begin_update(optimizer, learning_rate)
        compiled = self.trained.compiled[self.trained.optimizers.index(optimizer)]
        for batch in self.plan.coalesced(self._buckets_to_visit(optimizer, buckets), self.trained.bucket_bytes.value):

            def updated_rows(
                given: Mapping[int, tf.Tensor],
                masters: Mapping[int, Mapping[int, tf.Tensor]],
                batch: Sequence[Bucket] = batch,
            ) -> dict[int, tf.Tensor | None]:
                return {
                    place: self._updated_row(optimizer, bucket, given.get(place), masters[place], learning_rate, clip)
                    for place, bucket in enumerate(batch)
                }

            given = {place: rows[bucket] for place, bucket in enumerate(batch) if bucket in rows}
            # Outside the function that XLA compiles, which has no collectives.
            masters = {place: self.exchange.collect_owned(bucket) for place, bucket in enumerate(batch)}
            updated = tf.function(updated_rows, jit_compile=compiled, autograph=False)(given, masters)
            for place, bucket in enumerate(batch):
                if (bucket in rows or optimizer.ema_overwrite_frequency) and not self._is_updated_in_place(bucket):
                    self._gather_or_keep(bucket, updated[place])

    def _push(self, optimizer: keras.optimizers.Optimizer, rows: Mapping[Bucket, tf.Tensor], clip: Callable) -> None:
        """Leaves the update to the servers. [Note: servers] in `plan/serving.py`"""
        rate = keras_objects.rate_without_schedule(optimizer)
        for bucket, row in rows.items():
            updated = [s.index for s in bucket.segments if s.index in self.gradients]
            parts = {s.index: row[s.offset : s.offset + s.width] for s in bucket.segments}
            clipped = [clip(part, index) if index in updated else part for index, part in parts.items()]
            self.trained.remote.push(self.replica, bucket, tf.concat(clipped, 0), updated, self.rows, rate)

    def _gather_or_keep(self, bucket: Bucket, row: tf.Tensor) -> None:
        if not (self.gathers_late and self.exchange.can_wait(bucket)):
            self.exchange.gather(bucket, row, self.gradients)
            return
        self.exchange.keep(bucket, row)
        kept = [segment.index for segment in bucket.segments]
        self._local(self.trained.pending).scatter_update(tf.IndexedSlices(tf.fill([len(kept)], True), kept))

    def _updated_row(
        self,
        optimizer: keras.optimizers.Optimizer,
        bucket: Bucket,
        row: tf.Tensor | None,
        masters: Mapping[int, tf.Tensor],
        learning_rate: tf.Tensor | None,
        clip: Callable[[tf.Tensor, int], tf.Tensor] | None,
    ) -> tf.Tensor | None:
        updated = {}
        for segment in self._mine(bucket):
            master = masters[segment.index] if masters else self.exchange.master(bucket, segment)
            updated[segment.index] = self._updated_shard(optimizer, segment, row, master, learning_rate, clip)
            if self._is_updated_in_place(bucket):
                component = self.exchange.component(segment.index)
                component.assign(tf.reshape(updated[segment.index], component.shape))
        return None if self._is_updated_in_place(bucket) else pack_row(bucket, self.rank, updated)

    def _is_updated_in_place(self, bucket: Bucket) -> bool:
        """Whether this replica updates everything that it holds of a bucket."""
        is_all = bucket.placement is Placement.WHOLE or self.plan.shards == 1
        is_shard = bucket.sharded_parameters and bucket.placement is Placement.SHARDED
        return (is_all or is_shard) and not self.exchange.is_constrained(bucket)

    def _buckets_to_visit(self, optimizer: keras.optimizers.Optimizer, buckets: Sequence[Bucket]) -> list[Bucket]:
        if not optimizer.use_ema:
            return list(buckets)
        index = self.trained.optimizers.index(optimizer)
        return [bucket for bucket in self.plan.buckets if bucket.optimizer == index]

    def _updated_shard(
        self,
        optimizer: keras.optimizers.Optimizer,
        segment: Segment,
        row: tf.Tensor | None,
        master: tf.Tensor,
        learning_rate: tf.Tensor | None,
        clip: Callable[[tf.Tensor, int], tf.Tensor] | None,
    ) -> tf.Tensor:
        """The updated master of one variable, flat."""
        view = VariableView(self.trained.variables[segment.index], self.plan, segment.index, master)
        if row is not None and segment.index in self.gradients:
            gradient = clip(row[segment.offset : segment.offset + segment.width], segment.index)
            runtime.decay_weight(optimizer, view)
            optimizer.update_step(tf.reshape(gradient, view.shape), view, learning_rate)
        if optimizer.use_ema:
            self._average(optimizer, view)
        return tf.reshape(view.current, [-1])

    def _average(self, optimizer: keras.optimizers.Optimizer, view: VariableView) -> None:
        average = self._local(runtime.moving_average(optimizer, view))
        iterations = tf.convert_to_tensor(optimizer.iterations)
        momentum = tf.cast(iterations != 0, view.dtype) * tf.cast(optimizer.ema_momentum, view.dtype)
        value = tf.reshape(view.current, average.shape)
        averaged = momentum * average + (1 - momentum) * value
        average.assign(averaged)
        if optimizer.ema_overwrite_frequency:
            overwrite = tf.equal((iterations + 1) % optimizer.ema_overwrite_frequency, 0)
            view.assign(tf.where(overwrite, averaged, value))

    # Helpers.

    def _local(self, variable: keras.Variable) -> tf.Variable:
        """This replica's component of a distributed variable."""
        return variable.value.values[self.replica]

    def _optimizer_of(self, index: int) -> keras.optimizers.Optimizer:
        return self.trained.optimizers[self.plan.specs[index].optimizer]

    def _accumulator(self, index: int) -> tf.Variable:
        variable = self.trained.variables[index]
        return self._local(runtime.accumulator(self._optimizer_of(index), variable))

    def _active(self, bucket: Bucket) -> list:
        """Segments that have a gradient and that this replica accumulates, at least in part."""
        if self.trained.sharded_gradients:
            return [s for s in self._mine(bucket) if s.index in self.gradients]
        return [s for s in bucket.segments if s.index in self.gradients]

    def _mine(self, bucket: Bucket) -> tuple:
        return bucket.segments_of(self.rank)

    def _indices(self, buckets: Iterable[Bucket]) -> list[int]:
        return [s.index for bucket in buckets for s in bucket.segments if s.index in self.gradients]
