"""The state of outer optimizers, which merge workers that train apart. [Note: merging] in `training/merging.py`"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfzero.checkpoint.state import OUTER, Item, state_of
from tfzero.plan.mesh import Mesh
from tfzero.training.merging import Merger
from tfzero.training.outer import MASTER, RESIDUAL


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


def mergers_of(model: keras.Model) -> dict[str, Merger]:
    """What merges a model's variables, by the attribute that holds the optimizer."""
    found = ((name, getattr(getattr(value, "trained", None), "merger", None)) for name, value in vars(model).items())
    return {name: merger for name, merger in sorted(found, key=lambda each: each[0]) if merger is not None}


def whole_state_of(model: keras.Model) -> list[Item]:
    """All variables that a resumed run needs."""
    items = state_of(model)
    names = {id(item.variable): item.of for item in items if item.section == "model"}
    for owner, merger in mergers_of(model).items():
        items += _outer_items(merger, owner, lambda variable: names[id(variable)])
    return items


def _spans(merger: Merger, index: int, is_whole: bool) -> Callable[[int, int], tuple[int, int]]:
    if is_whole:
        return lambda worker, replica: merger.whole_span(index, replica)
    return functools.partial(merger.span, index)


def _outer_items(merger: Merger, owner: str, names: Callable[[keras.Variable], str]) -> Iterator[OuterItem]:
    """What a merger keeps.

    Args:
        merger: of one of the model's optimizers.
        owner: the model's attribute that holds this optimizer.
        names: gives the name of a variable of the model within its section.
    """
    begin, places = f"{OUTER}/{owner}.{merger.title}.", range(len(merger.group.devices))
    for index, variable in enumerate(merger.variables):
        of = names(variable)
        for kind, kept in merger.kept(index).items():
            yield OuterItem(
                f"{begin}{kind}/{of}",
                variable,
                is_local=kind == RESIDUAL,
                components=tuple(map(kept.get, places)),
                spans=_spans(merger, index, is_whole=kind == RESIDUAL),
                of=of,
                unknown=math.nan if kind == MASTER else 0.0,
            )
    scalars = [place.scalars() for place in merger.places]
    for name in scalars[0]:
        components = tuple(each.get(name) for each in scalars)
        yield OuterItem(f"{begin}{name}", components[0], components=components)
