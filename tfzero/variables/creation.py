"""Chooses the kind of each new variable, and what each local replica holds of it.

[Note: creation in a trace] A step may create variables while it is traced, for example the metrics of `compile` under a
user's own `train_step`. Several workers broadcast the initial value. In the graph that broadcast would come after the
first local replica's gradients, and before those of the next replica, which is traced later: replicas would wait for
each other in different orders. So the variable is created at once, outside the graph.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.host import batch_rows, graphs, runtime, versions
from tfzero.plan.mesh import Mesh
from tfzero.variables.allocation import component, initial_value, local_shard, on_host
from tfzero.variables.classes import (
    LayerVariable,
    OnReadVariable,
    ReplicatedVariable,
    ShardedParameter,
    ShardedVariable,
    VariableView,
)
from tfzero.variables.remote_slots import SERVERS, RemoteSlot
from tfzero.variables.row_state import RowsVariable


class VariableCreation:
    """Makes a strategy's variables. All workers make the same ones in the same order.

    Args:
        strategy: the strategy.
        group: its replicas.
        mesh: the positions of its replicas.
    """

    def __init__(self, strategy: tf.distribute.Strategy, group: Group, mesh: Mesh) -> None:
        self._of_strategy = weakref.ref(strategy)
        self._settings = strategy.settings
        self._channel = strategy.channel
        self._group = group
        self._mesh = mesh
        self._creating_optimizer_state = False
        self.view_at_hand: VariableView | None = None  # the view that an optimizer's loop has reached
        # Variables that are equal on all replicas, by numbers that are the same on all workers.
        self.layer_variables: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    @property
    def _strategy(self) -> tf.distribute.Strategy:
        return self._of_strategy()

    @contextlib.contextmanager
    def of_optimizer_state(self) -> Iterator[None]:
        """While active, new variables are optimizer state of this strategy: all replicas or one owner update them."""
        self._creating_optimizer_state = True
        try:
            with tf.init_scope(), self._strategy.scope():
                yield
        finally:
            self._creating_optimizer_state = False
            self.view_at_hand = None

    def create(
        self,
        next_creator: Callable[..., tf.Variable],
        view: VariableView | runtime.DistributedVariable | None,
        kwargs: dict,
    ) -> tf.Variable:
        """Creates a new variable.

        Args:
            next_creator: makes one replica's variable.
            view: if the variable is a slot, the view of its model variable.
            kwargs: arguments for creating the variable.
        """
        versions.refuse_variables_of_keras_2(kwargs.get("name"))
        if self._mesh.workers > 1:
            kwargs["initial_value"] = _outside_of_graphs(kwargs["initial_value"], kwargs.get("name"))
        with tf.init_scope() if self._mesh.workers > 1 else contextlib.nullcontext():
            with tf.device(self._group.devices[0]):
                value = initial_value(kwargs)
            return self._create(next_creator, view, value, kwargs)

    def _create(
        self,
        next_creator: Callable[..., tf.Variable],
        view: VariableView | runtime.DistributedVariable | None,
        value: tf.Tensor,
        kwargs: dict,
    ) -> tf.Variable:
        if view is None and self.view_at_hand is not None and self.view_at_hand.owner is not None:
            view = self.view_at_hand
        if isinstance(view, VariableView):
            return self._create_slot(next_creator, view, on_host(value), kwargs)
        self._agree_on_variable(kwargs.get("name"), value)
        if value.dtype != tf.string and self._mesh.workers > 1:
            value = self._group.launch(self._group.broadcast, [value] * len(self._group.devices))[0]
        is_sharded = self._is_sharded(value, kwargs)
        value = on_host(value)
        if is_sharded:
            components = self._make_components(next_creator, value, None, kwargs)
            return ShardedParameter(self._strategy, components, tf.TensorShape(value.shape))
        return self._replicate(next_creator, value, kwargs)

    def _is_sharded(self, initial_value: tf.Tensor, kwargs: dict) -> bool:
        """Whether stage 3 shards a new variable. A layer's own state, created as untrainable, is not sharded."""
        return (
            self._settings.scheme.shards_parameters
            and not self._creating_optimizer_state
            and initial_value.dtype.is_floating
            and kwargs.get("trainable") is not False
            and kwargs.get("synchronization") is not tf.VariableSynchronization.ON_READ
            and initial_value.shape.num_elements() >= max(1, self._settings.min_shard_elements)
        )

    def _make_components(
        self, next_creator: Callable[..., tf.Variable], value: np.ndarray | tf.Tensor, owner: int | None, kwargs: dict
    ) -> list[tf.Variable]:
        """One variable for each local replica, holding its shard of a value."""
        kwargs.pop("shape", None)
        components: list[tf.Variable] = []
        for rank, device in zip(self._mesh.ranks, self._group.devices, strict=True):
            shard = local_shard(value, owner, self._mesh.shard_rank(rank), self._mesh.shards)
            components.append(component(next_creator, device, shard, components, kwargs))
        return components

    def _agree_on_variable(self, name: str | None, initial_value: tf.Tensor) -> None:
        what = {"shape": str(initial_value.shape), "dtype": initial_value.dtype.name}
        self._channel.agree("creating a variable", what, f"models (at the variable {name!r})")

    def _replicate(
        self, next_creator: Callable[..., tf.Variable], value: np.ndarray | tf.Tensor, kwargs: dict
    ) -> tf.Variable:
        """A distributed variable with one component for each local replica."""

        def components(**kwargs: Any) -> list[tf.Variable]:
            values: list[tf.Variable] = []
            for device in self._group.devices:
                values.append(component(next_creator, device, value, values, kwargs))
            return values

        kind: type = ReplicatedVariable if self._creating_optimizer_state else LayerVariable
        if batch_rows.is_moving_statistic(kwargs) and kind is LayerVariable:
            # The variance is about the replica's own mean; docs/limits.md lists it among the exceptions.
            kwargs["aggregation"] = tf.VariableAggregation.MEAN
        if batch_rows.is_recurrent_state(kwargs) and not self._creating_optimizer_state:
            if self._settings.merging is not None:
                raise ValueError(
                    f"The variable {kwargs.get('name')!r} carries a row of state for each sample from batch to batch, "
                    "which workers that train apart cannot share. Leave `sync_every` away, or `stateful=True`."
                )
            kind = RowsVariable
        classes = {
            tf.VariableSynchronization.ON_WRITE: kind,
            tf.VariableSynchronization.ON_READ: OnReadVariable,
        }
        variable = runtime.create_mirrored_variable(self._strategy, components, classes, {}, **kwargs)
        if isinstance(variable, LayerVariable | RowsVariable):
            variable.number = next(self._numbers)
            self.layer_variables[variable.number] = variable
        return variable

    def _create_slot(
        self, next_creator: Callable[..., tf.Variable], view: VariableView, value: np.ndarray | tf.Tensor, kwargs: dict
    ) -> tf.Variable:
        """An optimizer's slot, placed as the plan places its variable, or private to each replica."""
        adds_up = not getattr(view, "overwrite_with_gradient", False)
        accumulates_whole = self._settings.scheme.exchanges_when_accumulated
        if adds_up and accumulates_whole and runtime.is_accumulator_name(kwargs.get("name") or ""):
            kwargs |= {
                "synchronization": tf.VariableSynchronization.ON_READ,
                "aggregation": tf.VariableAggregation.SUM,
            }
        is_own = kwargs.get("synchronization") is tf.VariableSynchronization.ON_READ
        if is_own or not view.sharded:
            slot = self._replicate(next_creator, value, kwargs)
        else:
            components = self._make_components(next_creator, value, view.owner, kwargs)
            kind = RemoteSlot if view.owner == SERVERS else ShardedVariable
            slot = kind(self._strategy, components, tf.TensorShape(value.shape), view.owner)
        view.slots.append(slot)
        return slot


def _outside_of_graphs(value: Any, name: str | None) -> Any:
    """An initial value that can be computed outside the graph being traced. [Note: creation in a trace]"""
    given = getattr(value, "wrapped_value", value)
    if not tf.is_symbolic_tensor(given):
        return value
    lifted = graphs.lifted(given)
    if lifted is None:
        raise ValueError(
            f"The initial value of the variable {name!r} depends on the arguments of the traced function that creates "
            "it. Workers cannot agree on such a value. Create the variable before, or give it a value of its own, for "
            f"example by an initializer. Received: {given}"
        )
    return lifted
