"""How the rows of a batch are dealt to replicas of different speed: pure arithmetic, no TensorFlow.

[Note: uneven rows] Sums and means over a batch are divided by counts of the whole batch, so it makes no difference to
the result which replica computes which row. A replica that takes twice as long for a row may get half as many. Shares
are whole numbers, one for each part of a batch; part `p` of a batch of `rows` begins at the nearest whole number to
`rows * (shares before p) / (all shares)`.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from tfzero.plan.mesh import Mesh
from tfzero.plan.scheme import scheme_of

EVEN, MEASURED = "even", "measured"
WHOLE = 2**20  # all measured shares together
_LEAST = 16  # a measured replica keeps this part of an even share, so that it can be seen to recover
_LEAST_GAIN = 1.1  # times as fast, for which shares are changed


def check_rows(rows: Any, stage: int, named: Sequence[str], devices: Sequence[str]) -> str | tuple[float, ...]:
    """The setting `rows`, checked as far as one worker can.

    Args:
        rows: the setting.
        stage: of ZeRO.
        named: this process's devices, as the user names them.
        devices: the same, as replicas have them.

    Raises:
        ValueError: if it is neither "even", "measured" nor a list of positive numbers, or cannot be measured.
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
    if list(named) != list(devices):
        raise ValueError(
            "Shares are given in the order of device numbers. Name the devices in that order. "
            f"Received: rows={rows!r}, devices={list(named)}"
        )
    return tuple(map(float, rows))


def check_length(rows: str | tuple[float, ...], replicas: int) -> None:
    """Raises ValueError unless there is a share for each replica."""
    if not isinstance(rows, str) and len(rows) != replicas:
        raise ValueError(
            f"`rows` must have a share for each of {replicas} replicas, those of the first worker first. "
            f"Received: rows={list(rows)}, {len(rows)} shares"
        )


def _is_positive(share: Any) -> bool:
    return not isinstance(share, bool) and isinstance(share, numbers.Real) and 0 < float(share) < math.inf


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


def moved(shares: Sequence[int], seconds: Sequence[float], rates: Sequence[float]) -> tuple[int, ...] | None:
    """Shares with which replicas would take equally long; None if that would not be notably faster.

    Args:
        shares: as they are.
        seconds: median compute time of each in a step.
        rates: rows a second of each.
    """
    rows = math.fsum(each * rate for each, rate in zip(seconds, rates, strict=True))
    if max(seconds) < _LEAST_GAIN * rows / math.fsum(rates):
        return None
    least = WHOLE // (_LEAST * len(shares))
    return tuple(max(least, share) for share in whole_shares(rates))


def seconds_if_even(seconds: Sequence[float], rates: Sequence[float]) -> float:
    """How long the slowest would take with as many rows as any other."""
    rows = math.fsum(each * rate for each, rate in zip(seconds, rates, strict=True))
    return rows / len(rates) / min(rates)
