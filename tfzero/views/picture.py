"""Draws how many bytes of each variable the plan places on which rank. Uses matplotlib."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfzero.plan.placement import shard_elements
from tfzero.report import text_of
from tfzero.training.walk import Trained
from tfzero.variables.classes import ShardedVariable

MOST_ROWS, MOST_RANKS = 25, 16  # drawn at most
_COLOURS = {"whole": "#9a9a9a", "owned": "#d95f02", "sharded": "#1b6ca8"}
_SHARE = 0.9  # of a rank's column, taken by the widest bar


@dataclass(frozen=True)
class Holding:
    """What each rank holds of one variable, its slots included.

    Args:
        name: its path, or the number of variables if it stands for several.
        ranks: for each rank the bytes that it holds, by "whole", "owned" and "sharded".
    """

    name: str
    ranks: tuple[Counter, ...]

    @property
    def most_bytes(self) -> int:
        """Bytes of the rank that holds most."""
        return max(rank.total() for rank in self.ranks)

    @property
    def total_bytes(self) -> int:
        """Bytes of all ranks together."""
        return sum(rank.total() for rank in self.ranks)


def holdings(trained: Iterable[Trained]) -> list[Holding]:
    """What the ranks hold of each trained variable, largest first."""
    found = []
    for each in trained:
        for variable, slots in zip(each.variables, each.slots, strict=True):
            held = [_bytes_by_rank(value, each.plan.shards) for value in (variable.value, *slots)]
            ranks = tuple(sum((each_held[rank] for each_held in held), Counter()) for rank in range(each.plan.shards))
            found.append(Holding(variable.path, ranks))
    return sorted(found, key=lambda holding: -holding.total_bytes)


def _bytes_by_rank(value: tf.Variable, shards: int) -> list[Counter]:
    """Bytes that each rank holds of a variable or slot."""
    elements, item_bytes = math.prod(value.shape), tf.as_dtype(value.dtype).size
    if not isinstance(value, ShardedVariable):
        return [Counter(whole=elements * item_bytes)] * shards
    if value.owner is None:
        return [Counter(sharded=shard_elements(elements, shards) * item_bytes)] * shards
    return [Counter(owned=elements * item_bytes * (rank == value.owner)) for rank in range(shards)]


def draw(rows: Sequence[Holding]) -> np.ndarray:
    """Draws variables by ranks, with bars as wide as what is held. Returns bytes `[height, width, 4]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if len(rows) > MOST_ROWS:
        rest = rows[MOST_ROWS:]
        ranks: tuple[Counter, ...] = tuple(
            sum(of_rank, Counter()) for of_rank in zip(*(row.ranks for row in rest), strict=True)
        )
        rows = [*rows[:MOST_ROWS], Holding(f"{len(rest)} smaller variables", ranks)]
    shards = len(rows[0].ranks)
    shown = min(shards, MOST_RANKS)
    figure = Figure(figsize=(4 + 1.2 * shown, 1.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    scale = _SHARE / max(1, *(row.most_bytes for row in rows))
    for rank in range(shown):
        left = np.full(len(rows), float(rank))
        for kind, colour in _COLOURS.items():
            widths = np.array([row.ranks[rank][kind] * scale for row in rows])
            axes.barh(range(len(rows)), widths, 0.7, left, color=colour)
            left = left + widths
    axes.set_yticks(range(len(rows)), [f"{row.name}  {text_of(row.total_bytes)}" for row in rows], fontsize=8)
    held = [sum(row.ranks[rank].total() for row in rows) for rank in range(shown)]
    labels = [f"rank {rank}\n{text_of(size_bytes)}" for rank, size_bytes in enumerate(held)]
    axes.set_xticks([rank + _SHARE / 2 for rank in range(shown)], labels, fontsize=8)
    axes.set(xlim=(-0.05, shown), ylim=(len(rows) - 0.4, -0.6))
    axes.set_title(f"Parameters and slots, on {shown} of {shards} ranks", fontsize=9)
    axes.legend(handles=[Patch(color=c, label=k) for k, c in _COLOURS.items()], ncols=3, fontsize=8, loc="lower right",
                bbox_to_anchor=(1, 1.02 + 0.4 / len(rows)), frameon=False)  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())
