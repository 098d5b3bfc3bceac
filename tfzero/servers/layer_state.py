"""The state of layers that training changes, as a server merges it: moving statistics and counters. No TensorFlow.

A worker sends what a step of its own has added to each. Counts add up. Of statistics the mean of the workers' changes
is added: weighted by their rows in a synchronous step; otherwise each worker's change counts as one of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfzero.rows.apart import ADDED


@dataclass(frozen=True)
class Change:
    """What one step of one worker has added to the state of a layer, in float64.

    Args:
        way: how changes are merged: "added", or "mean".
        before: the value before the step.
        change: what the step has added.
    """

    way: str
    before: np.ndarray
    change: np.ndarray

    @classmethod
    def empty(cls, spec: Any) -> tuple[str, "Change"]:
        """The name and an unfilled change, for `[name, way, shape]`.

        Raises:
            ValueError: if it is none.
        """
        try:
            name, way, shape = spec
            sizes = tuple(map(int, shape))
            return str(name), cls(str(way), np.empty(sizes, np.float64), np.empty(sizes, np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(f"A worker names a state of layers that cannot be read: {error}.") from None


class LayerState:
    """Values of the state of layers; the first worker that knows one gives its first value."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        self._changes: dict[int, tuple[int, Mapping[str, Change]]] = {}  # rows and changes by worker, until merged

    def note(self, worker: int, rows: int, changes: Mapping[str, Change]) -> None:
        """A worker's changes in a step."""
        for name, change in changes.items():
            self.values.setdefault(name, change.before)
        if changes:
            self._changes[worker] = rows, changes

    def merge(self, workers: int | None = None) -> None:
        """Merges the changes that were noted.

        Args:
            workers: of how many workers each change is one; None to weigh those that were noted by rows.
        """
        all_rows = sum(rows for rows, _ in self._changes.values())
        for worker in sorted(self._changes):
            rows, changes = self._changes[worker]
            weight = rows / max(all_rows, 1) if workers is None else 1 / workers
            for name, change in changes.items():
                factor = 1.0 if change.way == ADDED else weight
                self.values[name] = self.values[name] + factor * change.change
        self._changes.clear()

    def in_order(self) -> tuple[list[list], Sequence[np.ndarray]]:
        """Names and shapes, and the values in this order."""
        names = sorted(self.values)
        return [[name, list(self.values[name].shape)] for name in names], [self.values[name] for name in names]
