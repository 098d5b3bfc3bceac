"""One optimizer's variables on a server, and the gradients that have come for them.

[Note: steps in flight] A checkpoint is written while workers go on. So it holds for each server how many steps of each
worker have ended there, and which messages of the next step have come. A worker resumes at the least number of all
servers. What has come to a server counts as pushed, and is dropped when the worker pushes it again: each step of each
worker counts once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfzero.servers.store import Definition, Store


@dataclass(frozen=True)
class Flight:
    """Which steps a server has. [Note: steps in flight]

    Args:
        done: by worker, how many it has ended.
        pushed: model, worker and message, of the messages that have come of the next step.
    """

    done: list[int]
    pushed: list[list[int]] = field(default_factory=list)

    @classmethod
    def read(cls, value: Any, workers: int) -> "Flight | None":
        """From JSON.

        Raises:
            ValueError: if it is none.
        """
        if value is None:
            return None
        done, pushed = ([*map(int, value["done"])], [[*map(int, each)] for each in value["pushed"]])
        if len(done) != workers or any(count < 0 for count in done) or any(len(each) != 3 for each in pushed):
            raise ValueError(f"A worker names steps that are none of {workers} workers: {str(value)[:200]}")
        return cls(done, pushed)


@dataclass(frozen=True)
class Snapshot:
    """What belongs to the copies of parameters and slots.

    Args:
        flight: the steps.
        scalars: of the optimizers, as in `Store`, by model.
        names: name and shape of the state of layers.
        state: its values.
    """

    flight: Flight
    scalars: list[list[list[float]]]
    names: list[list]
    state: Sequence[np.ndarray]


@dataclass(frozen=True)
class Assignments:
    """What a program has assigned beside parameters and slots.

    Args:
        state: of layers, by name.
        scalars: of optimizers, as in `Store`, by model.
        flight: the steps, if a run resumes.
    """

    state: Mapping[str, np.ndarray]
    scalars: Mapping[int, list[list[float]]]
    flight: Flight | None


@dataclass
class Push:
    """One worker's gradients for a message, in a synchronous step."""

    active: tuple[int, ...]
    gradient: np.ndarray
    rows: int
    rates: dict[int, float]


@dataclass
class Model:
    """The variables of one optimizer, and who has pushed what.

    Args:
        definition: as the first worker gave it, as JSON.
        store: masters and slots.
        pushed: by worker and message, the number of the next step that counts.
        waiting: by message and synchronous step, the pushes by worker.
        is_updated: whether the current step, of a worker or of all, has changed it.
        updates: how often it was updated, by any worker.
        pulled: by worker, `updates` when it pulled last.
    """

    definition: dict
    store: Store
    pushed: dict[tuple[int, int], int] = field(default_factory=dict)
    waiting: dict[tuple[int, int], dict[int, Push]] = field(default_factory=dict)
    is_updated: set[int] = field(default_factory=set)
    updates: int = 0
    pulled: dict[int, int] = field(default_factory=dict)

    def staleness_of(self, worker: int) -> int:
        """The number of updates since a worker has pulled."""
        return self.updates - self.pulled.get(worker, self.updates)

    def in_flight(self, key: int, flight: Flight) -> list[list[int]]:
        """What has come of each worker's next step, and does not wait. [Note: steps in flight]"""
        return [
            [key, worker, message]
            for (worker, message), number in self.pushed.items()
            if number > flight.done[worker] and (message, number - 1) not in self.waiting
        ]

    def resume(self, key: int, flight: Flight) -> None:
        """Goes on with the next step of each worker. [Note: steps in flight]"""
        own = [(worker, message) for of, worker, message in flight.pushed if of == key]
        self.waiting.clear()
        self.pushed = {(worker, message): flight.done[worker] + 1 for worker, message in own}
        self.is_updated = {worker for worker, _ in own}


def spread(definition: Definition, message: int, places: Sequence[int], push: Push) -> np.ndarray:
    """A gradient, with zeros for the parts that only other workers have, in float32 at least."""
    wide = np.promote_types(np.float32, push.gradient.dtype)
    if list(push.active) == list(places):
        return push.gradient.astype(wide)
    widths = definition.widths(message)
    ends = np.cumsum([widths[place] for place in push.active])
    parts = dict(zip(push.active, np.split(push.gradient, ends[:-1]), strict=True))
    return np.concatenate([parts.get(place, np.zeros(widths[place])).astype(wide) for place in places])


def difference_of(ours: dict, theirs: dict) -> str:
    """What differs first between two definitions."""
    for what in sorted({*ours, *theirs}):
        if ours.get(what) != theirs.get(what):
            return f"its {what} are {str(ours.get(what))[:200]}, and this worker's {str(theirs.get(what))[:200]}"
    return "nothing differs"
