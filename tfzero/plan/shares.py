"""How the rows of a batch are dealt to replicas of different speed: pure arithmetic, no TensorFlow.

[Note: uneven rows] Sums and means over a batch are divided by counts of the whole batch, so it makes no difference to
the result which replica computes which row. A replica that takes twice as long for a row may get half as many. Shares
are whole numbers, one for each part of a batch; part `p` of a batch of `rows` begins at the nearest whole number to
`rows * (shares before p) / (all shares)`.
"""

import math
from collections.abc import Sequence
from typing import Any

from tfzero.plan.mesh import Mesh
from tfzero.plan.scheme import scheme_of

EVEN, MEASURED = "even", "measured"
WHOLE = 2**20  # all measured shares together
_LEAST = 16  # a measured replica keeps this part of an even share, so that it can be seen to recover
_LEAST_GAIN = 1.1  # times as fast, for which shares are changed


def check_rows(rows: Any, replicas: int, stage: int) -> str | tuple[float, ...]:
    """The setting `rows`, checked.

    Raises:
        ValueError: if it is neither "even", "measured" nor a positive number for each replica, or cannot be measured.
    """
    if isinstance(rows, str) and rows in (EVEN, MEASURED):
        if rows == MEASURED and scheme_of(stage).shards_parameters:
            raise ValueError(
                "`rows='measured'` works at stages 0 to 2. At stage 3 replicas wait for each other in every layer, so "
                "a step does not tell which of them is slow. Give a share for each replica, such as `rows=[2, 1]`. "
                f"Received: rows={rows!r}, stage={stage}"
            )
        return rows
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str)
    if not is_list or not all(_is_positive(share) for share in rows):
        raise ValueError(
            "`rows` must be 'even', 'measured', or a list of a positive number for each replica, those of the first "
            f"worker first. Received: rows={rows!r}"
        )
    if len(rows) != replicas:
        raise ValueError(
            f"`rows` must have a share for each of {replicas} replicas, those of the first worker first. "
            f"Received: rows={rows!r}, {len(rows)} shares"
        )
    return tuple(map(float, rows))


def _is_positive(share: Any) -> bool:
    return not isinstance(share, bool) and isinstance(share, int | float) and 0 < share < math.inf


def whole_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """Shares as whole numbers, each at least 1, whose sum is about `WHOLE`."""
    total = math.fsum(shares)
    return tuple(max(1, round(WHOLE * share / total)) for share in shares)


def span(rows: int, part: int, shares: Sequence[int]) -> tuple[int, int]:
    """The rows `[begin, end)` of a part of a batch. [Note: uneven rows]"""
    total, before = sum(shares), sum(shares[:part])
    begin, end = ((2 * rows * share + total) // (2 * total) for share in (before, before + shares[part]))
    return begin, end


def by_part(of_ranks: Sequence[Any], mesh: Mesh) -> tuple[Any, ...]:
    """What belongs to ranks, in the order of the parts of a batch that they take."""
    ranks = sorted(range(mesh.replicas), key=mesh.part_of_rank)
    return tuple(of_ranks[rank] for rank in ranks)


def moved(shares: Sequence[int], seconds: Sequence[float]) -> tuple[int, ...] | None:
    """Shares with which replicas would take equally long; None if that would not be notably faster.

    Args:
        shares: with which they took these times.
        seconds: compute time of each.
    """
    rates = [share / max(1e-6, each) for share, each in zip(shares, seconds, strict=True)]
    if max(seconds) < _LEAST_GAIN * sum(shares) / math.fsum(rates):
        return None
    least = WHOLE // (_LEAST * len(shares))
    return tuple(max(least, share) for share in whole_shares(rates))


def seconds_if_even(shares: Sequence[int], seconds: Sequence[float]) -> float:
    """How long the slowest would take with even shares, if its time goes with its rows."""
    even = sum(shares) / len(shares)
    return max(each * even / share for share, each in zip(shares, seconds, strict=True))
