"""Variables of a ZeroStrategy: replicated or sharded."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.host import distributed, runtime
from tfzero.host.keras_objects import SlotKey
from tfzero.plan.placement import Placement, Plan
from tfzero.rows.apart import FIRST
from tfzero.rows.combining import combined, is_eager_sum
from tfzero.rows.padding import added, kept, updated
from tfzero.variables.allocation import fill, local_shard
from tfzero.workers.channel import Channel


class ReplicatedVariable(distributed.VariableBase):
    """A variable with an equal copy on every replica.

    Within a replica, a write with aggregation `only_first_replica` takes rank 0's value. This also works in a nested
    graph, where TensorFlow's own variable cannot do it.
    """

    def __int__(self) -> int:
        return int(self.numpy())

    def __index__(self) -> int:
        return int(self.numpy())

    def __float__(self) -> float:
        return float(self.numpy())

    def update_in_replica(
        self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        first = self.aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA
        if first and tf.is_tensor(value) and not tf.executing_eagerly():
            extended = self.distribute_strategy.extended
            value = extended.replica_collective(extended.group.broadcast, value)
            return update(self.own_component, value, **kwargs)
        return super().update_in_replica(update, value, **kwargs)

    def update_outside(self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any) -> Any:
        # Read a sharded variable here, where it is whole, and not on each device, which has only a shard.
        if isinstance(value, tf.Variable | keras.Variable):
            value = tf.convert_to_tensor(value)
        self.distribute_strategy.extended.apart.note_assigned(self)
        return super().update_outside(update, value, **kwargs)


class LayerVariable(ReplicatedVariable):
    """A replicated variable of a layer or a program, such as a counter or BatchNormalization's moving statistics.

    Each replica computes a value from its part of the batch. All replicas then take the value that one device would
    compute, so that they stay equal. [Note: layer state]
    """

    def assign(self, value: tf.types.experimental.TensorLike, *args: Any, **kwargs: Any) -> Any:
        if is_eager_sum(self):  # sum only the change
            return self.assign_add(tf.convert_to_tensor(value, self.dtype) - self.value(), *args, **kwargs)
        return super().assign(value, *args, **kwargs)

    is_adding = False  # whether what it is given now is a change

    def assign_add(self, *args: Any, **kwargs: Any) -> Any:
        return self.adding(super().assign_add, *args, **kwargs)

    def assign_sub(self, *args: Any, **kwargs: Any) -> Any:
        return self.adding(super().assign_sub, *args, **kwargs)

    def adding(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method that adds to the variable."""
        self.is_adding = True
        try:
            return method(*args, **kwargs)
        finally:
            self.is_adding = False

    def update_in_replica(
        self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        extended = self.distribute_strategy.extended
        if self.aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA or self.dtype == tf.string:
            if self.dtype.is_floating or self.dtype.is_integer:
                extended.apart.note(self, FIRST)
            return super().update_in_replica(update, value, **kwargs)
        if isinstance(value, tf.IndexedSlices):
            raise TypeError(
                f"The variable {self.name!r} is updated in some rows only (`scatter_...`), which replicas cannot "
                "combine. Assign a whole value, for example with `tf.tensor_scatter_nd_add`."
            )
        own, (value, depends) = self.own_component, combined(self, tf.convert_to_tensor(value, self.dtype), extended)
        return updated(lambda: update(own, value, **kwargs), own, depends, extended)


class OnReadVariable(distributed.OnReadBase):
    """A variable that each replica accumulates by itself and that is combined when read, such as a metric's.

    A replica without rows of the batch adds nothing. [Note: padding row]
    """

    def assign(self, value: tf.types.experimental.TensorLike, *args: Any, **kwargs: Any) -> Any:
        if runtime.replica_index() is not None:
            own = self.own_component
            value = kept(own, tf.convert_to_tensor(value, self.dtype), self.distribute_strategy.extended)
        return super().assign(value, *args, **kwargs)

    def assign_add(self, value: tf.types.experimental.TensorLike, *args: Any, **kwargs: Any) -> Any:
        return super().assign_add(_added_to(self, value), *args, **kwargs)

    def assign_sub(self, value: tf.types.experimental.TensorLike, *args: Any, **kwargs: Any) -> Any:
        return super().assign_sub(_added_to(self, value), *args, **kwargs)

    def __int__(self) -> int:
        return int(self.numpy())

    def __float__(self) -> float:
        return float(self.numpy())


def _added_to(variable: OnReadVariable, value: tf.types.experimental.TensorLike) -> tf.types.experimental.TensorLike:
    if runtime.replica_index() is None:
        return value
    return added(tf.convert_to_tensor(value, variable.dtype), variable.distribute_strategy.extended)


class ShardedVariable(ReplicatedVariable):
    """A variable with a different component on each replica: a shard, or all or nothing of an owned variable.

    Within a replica it reads and writes the replica's component, which is flat (`[shard_elements]`) if sharded. Outside
    it behaves as the whole variable: reading gathers, assigning cuts. Both are collectives, so all workers must take
    part.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, values: Sequence[tf.Variable], shape: tf.TensorShape, owner: int | None
    ) -> None:
        self._whole_shape = shape
        self._owner = owner
        self._held: tf.Variable | None = None
        self._room: tf.Variable | None = None  # what `hold` fills
        self._holders = 0
        self.number = next(strategy.sharded_numbers)
        super().__init__(strategy, values, tf.VariableAggregation.NONE)

    @property
    def shape(self) -> tf.TensorShape:
        return self._whole_shape

    @property
    def owner(self) -> int | None:
        """The rank that holds everything, or None if every rank holds a shard."""
        return self._owner

    def __array__(self, dtype: np.dtype | None = None) -> np.ndarray:
        return self.numpy().astype(dtype or self.dtype.as_numpy_dtype)

    @property
    def held(self) -> tf.Variable | None:
        """The whole value, between `hold` and `let_go`."""
        return self._held

    def hold(self, to_export: bool = False) -> None:
        """Holds the whole value here, for reading and assigning outside replicas, until `let_go`. A collective.

        Nested holds share the value. A `tf.function` that is traced meanwhile reads the variable that holds it for
        ever. So every hold takes the same variable, except for functions that are traced to be exported only.
        """
        if self._held is None:
            whole = self.value_outside()
            if to_export:
                self._held = runtime.plain_variable(whole, self.name.split(":")[0])
            else:
                if self._room is None:
                    self._room = runtime.plain_variable(whole, shape=tf.TensorShape(None))
                fill(self._room, whole)
                self._held = self._room
        self._holders += 1

    def let_go(self, write_back: bool) -> None:
        """Ends a `hold`. Writing back is a collective; the value on the first worker counts."""
        self._holders -= 1
        held, self._held = self._held, None
        if write_back:
            group = self.distribute_strategy.extended.group
            value = group.launch(group.broadcast, [tf.convert_to_tensor(held)] * len(self.values))[0]
            self.assign(value)
            held.assign(value)
        if self._holders:
            self._held = held
        elif held is self._room:
            fill(held, tf.zeros([0], held.dtype))  # which takes no memory

    def value_here(self) -> tf.Tensor | tf.Variable:
        # Outside any scope, and while saving a SavedModel, TensorFlow takes the first component for the whole variable.
        is_outside = self._held is not None and runtime.replica_index() is None
        return self.value_outside() if is_outside or not tf.distribute.has_strategy() else super().value_here()

    def value_outside(self) -> tf.Tensor:
        if self._held is not None:
            return self.held_value()
        extended = self.distribute_strategy.extended
        return extended.whole_value(self.values, self._whole_shape, self._owner)

    def value(self) -> tf.Tensor | tf.Variable:
        if tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy():
            return self.value_outside()
        return super().value()

    def update_outside(self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any) -> Any:
        value = self.fitting(value)
        self.distribute_strategy.extended.apart.note_assigned(self)
        if self._held is not None:
            with tf.control_dependencies([] if tf.executing_eagerly() else [self.held_value()]):
                update(self._held, value, **kwargs)
            return self
        for replica, component in enumerate(self.values):
            shard = self._shard_of(value, replica)
            with tf.device(component.device):
                update(component, shard, **kwargs)
        return self

    def held_value(self) -> tf.Tensor:
        """The value that is held. In a graph, an error when it runs later while none is held."""
        value = tf.convert_to_tensor(self._held)
        if tf.executing_eagerly() or self._held is not self._room:
            return value
        message = (
            f"The variable {self.name} lies in shards, and is read or assigned by a tf.function that was traced within "
            "`strategy.gathered`. Call the function within `strategy.gathered` only."
        )
        with tf.control_dependencies([tf.debugging.Assert(tf.size(value) > 0, [message])]):
            value = tf.identity(value)
        value.set_shape(self._whole_shape)  # no operation: Grappler would take it for certain and drop the check
        return value

    def exported_as(self) -> tf.Variable:
        """An ordinary variable with the whole value. [Note: export]"""
        if self._held is None:
            raise RuntimeError(
                f"The variable {self.name!r} lies in shards, and is read by a function that belongs to nothing which "
                "is saved. Save an object that the model is an attribute of."
            )
        return self._held

    def fitting(self, value: tf.types.experimental.TensorLike) -> np.ndarray | tf.Tensor:
        """A value for the whole variable; what it is written to would take other shapes as well."""
        value = value if isinstance(value, np.ndarray) else tf.convert_to_tensor(value)
        if not self._whole_shape.is_compatible_with(value.shape):
            raise ValueError(
                f"The variable {self.name!r} of shape {self._whole_shape} cannot take a value of shape {value.shape}."
            )
        return value if tf.TensorShape(value.shape).is_fully_defined() else tf.ensure_shape(value, self._whole_shape)

    def _shard_of(self, value: tf.types.experimental.TensorLike, replica: int) -> tf.Tensor:
        """A local replica's component of a value of the whole variable."""
        mesh = self.distribute_strategy.extended.mesh
        return local_shard(value, self._owner, mesh.shard_rank(mesh.rank(replica)), mesh.shards)


def agree_on_sharded(channel: Channel, topic: str, variables: Sequence[ShardedVariable], what: str) -> None:
    """Raises ValueError on all workers unless all name the same variables; ignores names, which differ by process."""
    numbered = {f"sharded variable {v.number}": str(list(v.shape)) for v in variables}
    if differences := channel.compare(topic, numbered)[1]:
        names = ", ".join(variable.name for variable in variables) or "none"
        raise ValueError(
            f"The workers' {what} differ: {differences}. Give every worker the same {what}. Received here: {names}."
        )


class ShardedParameter(ShardedVariable):
    """A model's variable that is sharded over the replicas. A replica that reads it gathers it.

    See [Note: gather] in `variables/gathering.py`. Within a replica the tape's gradient is that of the shard,
    `[shard_elements]`, summed over replicas. Outside replicas it is that of the whole variable, as computed by this
    process.
    """

    def __init__(self, strategy: tf.distribute.Strategy, values: Sequence[tf.Variable], shape: tf.TensorShape) -> None:
        super().__init__(strategy, values, shape, owner=None)

    def whole(self, dtype: tf.DType | None = None) -> tf.Tensor:
        """Within a replica: the whole value, gathered in `dtype`."""
        if tf.distribute.get_strategy() is not self.distribute_strategy:
            raise RuntimeError(
                f"The parameter {self.name!r} belongs to another strategy than the one whose replica reads it. "
                "Make the model under the `scope()` of the strategy that runs it."
            )
        shard = self.values[runtime.replica_index()]
        return self.distribute_strategy.extended.gathered(shard, self._whole_shape, dtype or self.dtype, self.name)

    def value_here(self) -> tf.Tensor | tf.Variable:
        return super().value_here() if runtime.replica_index() is None else self.whole()

    def value(self) -> tf.Tensor | tf.Variable:
        return self.value_here()

    def value_outside(self) -> tf.Tensor:
        # A tape cannot follow how the whole value is made, so it is recorded as a read of the first shard. If a tape is
        # around the call of a function that reads it, the value is a constant to that tape.
        with runtime.unrecorded():
            whole = tf.stop_gradient(super().value_outside())
        runtime.record_read(self.values[0], whole)
        return whole

    def as_tensor(self, dtype: tf.DType | None = None, name: str | None = None, as_ref: bool = False) -> tf.Tensor:
        if runtime.replica_index() is None:
            return super().as_tensor(dtype, name, as_ref)
        return tf.convert_to_tensor(self.value_here(), dtype, name=name)

    def update_in_replica(
        self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        extended = self.distribute_strategy.extended
        value, depends = combined(self, tf.convert_to_tensor(value, self.dtype), extended)
        extended.forget_gathered()
        own, shard = self.values[runtime.replica_index()], self._shard_of(value, runtime.replica_index())
        return updated(lambda: update(own, shard, **kwargs), own, depends, extended)


class VariableView(SlotKey):
    """A model variable as an inner optimizer sees it.

    While the optimizer is built it stands for the whole variable. In a step it holds `value`, the replica's shard. The
    optimizer's `assign` methods change that value as they would change a variable.

    Args:
        variable: the model's Keras variable.
        plan: the plan that places it.
        index: its place in the plan.
        value: this replica's shard, `[shard_elements]` when sharded.
    """

    def __init__(self, variable: keras.Variable, plan: Plan, index: int, value: tf.Tensor | None = None) -> None:
        self.variable = variable
        self.plan = plan
        self.index = index
        self.current = value
        self.slots: list = []  # created for this view
        self.path = variable.path
        # On one device Keras builds with its own variables, and updates TensorFlow's.
        self.name = variable.name if value is None else variable.value.name
        self.dtype = variable.value.dtype
        self.shape = variable.shape if value is None else value.shape

    @property
    def sharded(self) -> bool:
        """Whether slots made for this view are held in shards."""
        return self.plan.placements[self.index] is not Placement.WHOLE

    @property
    def owner(self) -> int | None:
        """The rank that owns the variable, if one does."""
        return self.plan.owners[self.index]

    def identity(self) -> tf.Variable:
        return self.variable.value

    def assign(self, value: tf.types.experimental.TensorLike, **_: Any) -> None:
        self.current = tf.cast(value, self.dtype)

    def assign_add(self, value: tf.types.experimental.TensorLike, **_: Any) -> None:
        self.current = self.current + tf.cast(value, self.dtype)

    def assign_sub(self, value: tf.types.experimental.TensorLike, **_: Any) -> None:
        self.current = self.current - tf.cast(value, self.dtype)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        value = self.variable.value if self.current is None else self.current
        return tf.convert_to_tensor(value, dtype, name=name)

    def __add__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return tf.convert_to_tensor(self) + other

    def __radd__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return other + tf.convert_to_tensor(self)

    def __sub__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return tf.convert_to_tensor(self) - other

    def __rsub__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return other - tf.convert_to_tensor(self)

    def __mul__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return tf.convert_to_tensor(self) * other

    def __rmul__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return other * tf.convert_to_tensor(self)

    def __truediv__(self, other: tf.types.experimental.TensorLike) -> tf.Tensor:
        return tf.convert_to_tensor(self) / other

    def __neg__(self) -> tf.Tensor:
        return -tf.convert_to_tensor(self)
