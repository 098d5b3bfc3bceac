"""The state of outer optimizers, which merge workers that train apart. [Note: merging] in `training/merging.py`"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfzero.checkpoint.state import OUTER, Item, state_of
from tfzero.plan.mesh import Mesh
from tfzero.training.merging import Merger


@dataclass(frozen=True)
class OuterItem(Item):
    """What an outer optimizer keeps: for a variable of the model, or for itself.

    Args:
        components: this process's part on each local replica; None where it holds none.
        spans: the flat elements of the variable that a worker (the first argument) holds on one of its replicas; None
            for what is equal everywhere.
        of: the name of that variable within its section; "" for none.
        unknown: its value if a checkpoint is without it.
    """

    components: tuple[tf.Variable | None, ...] = ()
    spans: Callable[[int, int], tuple[int, int]] | None = None
    of: str = ""
    unknown: float = 0.0

    @property
    def value(self) -> Any:
        return next(component for component in self.components if component is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    @property
    def is_in_shards(self) -> bool:
        return self.spans is not None

    def component(self, replica: int) -> tf.Variable | None:
        return self.components[replica]

    def span(self, rank: int, mesh: Mesh) -> tuple[int, int]:
        worker, replica = divmod(rank, mesh.devices_per_worker)
        if self.spans is None:
            return super().span(rank, mesh)
        return self.spans(worker, replica) if self.components[replica] is not None else (0, 0)


def whole_state_of(model: keras.Model) -> list[Item]:
    """All variables that a resumed run needs."""
    items = state_of(model)
    names = {id(item.variable): item.of for item in items if item.section == "model"}
    for owner, optimizer in sorted(vars(model).items()):
        merger = getattr(getattr(optimizer, "trained", None), "merger", None)
        if merger is not None:
            items += _outer_items(merger, owner, lambda variable: names[id(variable)])
    return items


def _outer_items(merger: Merger, owner: str, names: Callable[[Any], str]) -> Iterator[OuterItem]:
    """What a merger keeps.

    Args:
        merger: of one of the model's optimizers.
        owner: the model's attribute that holds this optimizer.
        names: gives the name of a variable of the model within its section.
    """
    devices = len(merger.group.devices)
    for index, variable in enumerate(merger.variables):
        parts = merger.parts_of(index)

        def of(replica: int, take: Callable, parts: dict = parts) -> Any:
            return take(*parts[replica]) if replica in parts else None

        def spans(worker: int, replica: int, index: int = index) -> tuple[int, int]:
            return merger.span(index, worker, replica, devices)

        def all_of(worker: int, replica: int, index: int = index) -> tuple[int, int]:
            return merger.component_span(index, replica, devices)

        slots = {place.replica: place.slots() for place in merger.places}
        kept: dict[str, tuple[Callable, Callable, bool]] = {}
        for slot in dict.fromkeys(name for name, _ in slots[0]):
            kept[slot] = (lambda part, number, at, slot=slot: slots[at][slot, number].value, spans, False)
        first = parts[0][0]
        if first.common is not None:
            kept["master"] = (lambda part, number, at: part.master.value, spans, False)
        if first.residual is not None:
            kept["residual"] = (lambda part, number, at: part.residual, all_of, True)
        for kind, (take, own_spans, is_local) in kept.items():
            components = tuple(
                of(replica, lambda part, number, at=replica, take=take: take(part, number, at))
                for replica in range(devices)
            )
            name = f"{OUTER}/{owner}.{merger.title}.{kind}"
            of_variable, unknown = names(variable), math.nan if kind == "master" else 0.0
            yield OuterItem(
                f"{name}/{of_variable}", variable, is_local, components, own_spans, of_variable, unknown
            )
    for name, of_replicas in merger.own_scalars().items():
        components = tuple(of_replicas.get(replica) for replica in range(devices))
        yield OuterItem(f"{OUTER}/{owner}.{merger.title}.{name}", components[0], False, components)
