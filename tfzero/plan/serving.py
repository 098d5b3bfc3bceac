"""The settings of parameter servers, and which of them holds what. No TensorFlow.

[Note: servers] Servers hold the parameters and the optimizer's slots, each a part of every large variable. A worker
trains alone, with the ZeRO stage among its own devices, and without an optimizer: it pushes its gradients to the
servers, which update, and pulls the new parameters. `max_staleness` bounds how many steps a worker may be ahead of the
slowest: at 0 the servers take the mean of all workers' gradients, weighted by their rows, and update once; above 0
they update by each worker's gradient as it comes (stale synchronous parallel,
https://www.cs.cmu.edu/~seunghak/SSPTable_NIPS2013.pdf); None sets no bound (Downpour SGD,
https://research.google/pubs/large-scale-distributed-deep-networks).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfzero.plan.placement import shard_elements
from tfzero.plan.shares import EVEN


@dataclass(frozen=True)
class Serving:
    """How workers train with parameter servers. [Note: servers]

    Args:
        servers: number of servers.
        workers: number of workers.
        max_staleness: how many steps a worker may be ahead of the slowest; None for any number.
        staleness_aware: whether the learning rate of an update is divided by its staleness.
    """

    servers: int
    workers: int
    max_staleness: int | None
    staleness_aware: bool = False

    @property
    def is_synchronous(self) -> bool:
        """Whether each step is one of all workers."""
        return self.max_staleness == 0


@dataclass(frozen=True)
class Piece:
    """Flat elements `[begin, end)` of a variable, which one server holds."""

    variable: int
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return self.end - self.begin


def check_serving(
    servers: int, workers: int, max_staleness: Any, staleness_aware: Any, **others: Any
) -> Serving | None:
    """The settings of training with servers; None without servers.

    Args:
        servers: number of servers of the cluster.
        workers: number of its workers.
        max_staleness, staleness_aware: as given.
        others: settings that servers cannot serve unless they are as the default, by name.

    Raises:
        ValueError: for an invalid bound, one without servers, and settings that have no effect with servers.
    """
    is_number = isinstance(max_staleness, int) and not isinstance(max_staleness, bool) and max_staleness >= 0
    if max_staleness is not None and not is_number:
        raise ValueError(
            f"`max_staleness` must be None or an integer of at least 0. Received: max_staleness={max_staleness!r}"
        )
    if not isinstance(staleness_aware, bool) or (staleness_aware and (max_staleness == 0 or not servers)):
        raise ValueError(
            "`staleness_aware` must be True or False, and has an effect with parameter servers and a `max_staleness` "
            f"that is not 0 only. Received: staleness_aware={staleness_aware!r}, max_staleness={max_staleness!r}, "
            f"{servers} servers"
        )
    if not servers:
        if max_staleness != 0:
            raise ValueError(
                "`max_staleness` bounds how far workers of parameter servers are apart, and the cluster has none. Name "
                'servers under "ps" of TF_CONFIG, start with `python -m tfzero.launch --servers 1`, or leave it away. '
                f"Received: max_staleness={max_staleness!r}"
            )
        return None
    defaults = {"compression": None, "error_feedback": False, "overlap_param_gather": False, "rows": EVEN,
                "sync_every": None}  # fmt: skip
    given = {name: value for name, value in others.items() if value != defaults[name]}
    if given:
        text = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"Workers of parameter servers exchange nothing with each other, and so cannot use {text}. Leave that "
            'away, or leave "ps" out of TF_CONFIG.'
        )
    return Serving(servers, workers, max_staleness, staleness_aware)


def deal(elements: Sequence[int], servers: int, min_shard_elements: int) -> list[list[Piece]]:
    """Which elements of variables each server holds: a part of each large one, and some of the small ones.

    Args:
        elements: number of elements of each variable.
        servers: number of servers.
        min_shard_elements: a variable with fewer lies whole on one server, that with the least so far.

    Returns:
        For each server its pieces, in the order of the variables.
    """
    dealt: list[list[Piece]] = [[] for _ in range(servers)]
    load = [0] * servers
    for variable, count in enumerate(elements):
        if count < max(min_shard_elements, servers):
            pieces = {load.index(min(load)): Piece(variable, 0, count)}
        else:
            width = shard_elements(count, servers)
            pieces = {
                server: Piece(variable, min(server * width, count), min((server + 1) * width, count))
                for server in range(servers)
            }
        for server, piece in pieces.items():
            if piece.elements:
                dealt[server].append(piece)
                load[server] += piece.elements
    return dealt


def within(piece: Piece, begin: int, end: int) -> Piece | None:
    """What a piece has of the elements `[begin, end)` of its variable; None for nothing."""
    begin, end = max(begin, piece.begin), min(end, piece.end)
    return Piece(piece.variable, begin, end) if begin < end else None
