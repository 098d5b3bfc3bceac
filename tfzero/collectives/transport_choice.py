"""Chooses the transport of a group's collectives, with its reason, here and nowhere else. [Note: transports]"""

import contextlib
from collections.abc import Iterator, Sequence

from tfzero.collectives.nccl import Nccl
from tfzero.collectives.over_links import OverLinks
from tfzero.collectives.rings import Rings
from tfzero.collectives.transport import Connection, Surroundings, Transport
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster

# The first transport that can carry is chosen. Add another transport as one more row.
TRANSPORTS: list[type[Transport]] = [Nccl, OverLinks, Rings]


def choose(where: Surroundings) -> Transport:
    """The transport of a strategy. Before the workers meet, no transport that needs connections is chosen."""
    obstacles = [""]
    for kind in TRANSPORTS:
        if where.device_type not in kind.device_types:
            continue
        obstacle = kind.obstacle(where)
        if not obstacle:
            return kind.make(where, kind.merit(where) or obstacles[-1])
        obstacles.append(obstacle)
    raise ValueError(f"No transport carries collectives among {where}: {'; '.join(obstacles[1:])}.")


def connect(cluster: Cluster, channel: Channel, timeout_seconds: float) -> dict[str, Sequence[Connection]]:
    """Makes the transports' connections, by transport name. All workers call it together when they meet."""
    return {kind.name: kind.connect(cluster, channel, timeout_seconds) for kind in TRANSPORTS}


@contextlib.contextmanager
def configured(is_clustered: bool) -> Iterator[None]:
    """While active, TensorFlow's server starts with the transports' configuration. See `Transport.configure`."""
    with contextlib.ExitStack() as stack:
        for kind in TRANSPORTS:
            stack.enter_context(kind.configure(is_clustered))
        yield
