"""The state of a model's training: every variable that a resumed run needs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import batch_rows
from tfzero.plan.mesh import Mesh
from tfzero.plan.placement import shard_elements
from tfzero.training.exchange import Wire
from tfzero.variables.classes import OnReadVariable, ShardedVariable
from tfzero.variables.remote_slots import RemoteSlot

# Sections of the training state, beside "model" and the optimizers.
LAG, RESIDUAL = "lag", "residual"  # what compression keeps for a variable (`training/exchange.py`)
OUTER = "outer-state"  # what merges workers that train apart (`checkpoint/outer.py`)
METRICS = "metrics"
OPTIONAL = (LAG, RESIDUAL, OUTER)


@dataclass(frozen=True)
class HeldPart:
    """The flat elements `[begin, end)` of a variable, where this process reads and assigns them.

    Args:
        rank: of the replica.
        component: a variable of this replica, or what can be read and assigned like one; None if it holds nothing.
        begin, end: its elements.
    """

    rank: int
    component: Any
    begin: int
    end: int


@dataclass(frozen=True)
class Item:
    """One variable of the training state.

    Args:
        name: as in the file: "model/dense/kernel", "optimizer/adam/dense_kernel_momentum".
        variable: the Keras variable.
        is_local: whether each worker has its own, as workers train apart.
    """

    name: str
    variable: keras.Variable
    is_local: bool = False

    @property
    def section(self) -> str:
        """The section: "model", "metrics", one of `OPTIONAL`, or the model's attribute that holds the optimizer."""
        return self.name.split("/")[0]

    @property
    def is_optional(self) -> bool:
        """Whether a checkpoint may be without it. Its name ends with that of a variable of the model, if it has one."""
        return self.section in OPTIONAL

    @property
    def of(self) -> str:
        """Its name within its section; if it is optional, that of the model's variable it is kept for, "" for none."""
        return self.name.partition("/")[2]

    @property
    def unknown(self) -> float:
        """What stands for its value, if it is optional and not in a checkpoint."""
        return 0.0

    @property
    def value(self) -> tf.Variable:
        return self.variable.value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> tf.DType:
        return tf.as_dtype(self.value.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    def stored_bytes(self, mesh: Mesh) -> int:
        """Bytes in a checkpoint."""
        return self.bytes * (mesh.copies if self.is_local else 1)

    @property
    def is_per_replica(self) -> bool:
        return isinstance(self.value, OnReadVariable)

    @property
    def is_in_shards(self) -> bool:
        """Whether replicas hold different parts of it."""
        return isinstance(self.value, ShardedVariable)

    @property
    def is_equal_everywhere(self) -> bool:
        """Whether every replica holds all of it, with equal values."""
        return not (self.is_in_shards or self.is_per_replica or self.is_local)

    def component(self, replica: int) -> tf.Variable | None:
        """What a local replica holds of it."""
        return self.value.values[replica] if hasattr(self.value, "values") else self.value

    def span(self, rank: int, mesh: Mesh) -> tuple[int, int]:
        """The flat elements `[begin, end)` that a rank holds."""
        elements = math.prod(self.shape)
        if not self.is_in_shards:
            return 0, elements
        shard = mesh.shard_rank(rank)
        if self.value.owner is not None:
            return (0, elements) if self.value.owner == shard else (0, 0)
        width = shard_elements(elements, mesh.shards)
        return min(shard * width, elements), min((shard + 1) * width, elements)

    def held(self, mesh: Mesh) -> Iterator[HeldPart]:
        """What this process holds of it: a part for each local replica."""
        for replica, rank in enumerate(mesh.ranks):
            yield HeldPart(rank, self.component(replica), *self.span(rank, mesh))

    def describe(self, mesh: Mesh) -> dict:
        """Its entry in the manifest of a checkpoint."""
        stored_by = mesh.replicas if self.is_per_replica else None
        entry = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name, "replicas": stored_by}
        return {**entry, "copies": mesh.copies} if self.is_local else entry


def mesh_of(strategy: tf.distribute.Strategy) -> Mesh:
    """The mesh of a ZeroStrategy, or of plain Keras on one device."""
    return strategy.extended.mesh if hasattr(strategy, "settings") else Mesh()


def state_of(model: keras.Model) -> list[Item]:
    """What a resumed run needs of a model, its optimizers, its metrics and compression; without outer optimizers."""
    sections = {"model": [*model.variables, *batch_rows.recurrent_states(model)]}
    sections |= {name: optimizer.variables for name, optimizer in _optimizers(model).items()}
    sections[METRICS] = model.metrics_variables
    local = _optimizers(model) if mesh_of(model.distribute_strategy).copies > 1 else {}
    items: list[Item] = []
    seen: dict[str, int] = {}
    for section, variables in sections.items():
        for variable in variables:
            name = f"{section}/{variable.path}"
            seen[name] = seen.get(name, 0) + 1
            is_local = section in local and not isinstance(variable.value, OnReadVariable)
            items.append(Item(name if seen[name] == 1 else f"{name}#{seen[name]}", variable, is_local))
    return items + _state_of_compression(model, {id(item.variable): item.name for item in items})


def _state_of_compression(model: keras.Model, names: Mapping[int, str]) -> list[Item]:
    items = []
    for optimizer in _optimizers(model).values():
        wire = getattr(optimizer, "wire", Wire())
        for section, variables in ((LAG, wire.lags), (RESIDUAL, wire.residuals)):
            for index, variable in variables.items():
                of = names[id(optimizer.trained_variables[index])]
                items.append(Item(f"{section}/{of.partition('/')[2]}", variable))
    return items


def build_optimizer(model: keras.Model) -> None:
    """Makes the variables of a model's optimizer, which Keras makes only in the first step.

    Raises:
        ValueError: if the model itself is not built.
    """
    if not model.built:
        raise ValueError(
            "A checkpoint is saved of, and loaded into, a built model: call `model.build(...)` or the model first."
        )
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


class LocalValues:
    """A copy of this process's components of variables, made and restored without a collective."""

    def __init__(self, variables: Iterable[keras.Variable]) -> None:
        self._copies = [(component, component.numpy()) for component in components_of(variables)]

    def restore(self) -> None:
        for component, copy in self._copies:
            component.assign(copy)


def components_of(variables: Iterable[keras.Variable]) -> Iterator[tf.Variable]:
    """The components of variables that this process holds: one for each local replica."""
    for variable in variables:
        yield from getattr(variable.value, "values", [variable.value])


def optimizers_of(model: keras.Model) -> dict[str, str]:
    """The classes of a model's optimizers, by the attribute that holds each."""
    return {name: type(_innermost(optimizer)).__name__ for name, optimizer in _optimizers(model).items()}


def bucket_bytes_of(model: keras.Model) -> dict[str, int]:
    """The bucket sizes chosen for a model's optimizers, by the attribute that holds each optimizer."""
    choices = {name: getattr(optimizer, "bucket_bytes", None) for name, optimizer in _optimizers(model).items()}
    return {name: choice.value for name, choice in choices.items() if choice is not None}


def scalars_of(model: keras.Model) -> list[keras.Variable]:
    """What a model's optimizers hold beside slots: steps, learning rates, loss scales."""
    variables = [variable for optimizer in _optimizers(model).values() for variable in optimizer.variables]
    return [variable for variable in variables if not isinstance(variable.value, RemoteSlot)]


def _optimizers(model: keras.Model) -> dict[str, keras.optimizers.Optimizer]:
    return {name: value for name, value in sorted(vars(model).items()) if isinstance(value, keras.optimizers.Optimizer)}


def _innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    inner = getattr(optimizer, "inner_optimizer", None)
    return optimizer if inner is None else _innermost(inner)
