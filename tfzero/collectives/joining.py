"""The cluster that a process has joined: channels, connections and pulse, once for all its strategies."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tfzero.collectives import transport_choice
from tfzero.collectives.pulse import Pulse
from tfzero.collectives.transport import Connection
from tfzero.host import distributed, runtime
from tfzero.workers.addresses import host_of
from tfzero.workers.agreement import versions
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.host_names import Lookup, advice_on, is_number, problem_of
from tfzero.workers.stopping import let_children_end


@dataclass(frozen=True)
class Joined:
    """Control channels of the program, of background saving and of batches; the transports' connections; the pulse."""

    channel: Channel
    saving_channel: Channel
    batch_channel: Channel
    connections: Mapping[str, Sequence[Connection]] = field(default_factory=dict)  # by the transport's name
    pulse: Pulse | None = None

    def wait_at_most(self, timeout_seconds: float) -> None:
        """Sets the timeout for every strategy of this process. All workers call it together."""
        for each in (
            self.channel,
            self.saving_channel,
            self.batch_channel,
            *in_a_row(self.connections),
            *(() if self.pulse is None else (self.pulse,)),
        ):
            each.timeout_seconds = timeout_seconds


_joined: dict[Cluster, Joined] = {}


def join(cluster: Cluster | None, timeout_seconds: float) -> Joined:
    """Joins the other workers, which all call this; returns the existing `Joined` if the process has joined already.

    Raises:
        RuntimeError: if TensorFlow has been used before.
        TimeoutError: if a worker does not arrive in time. See `Channel.join`.
    """
    let_children_end()
    if cluster is None:
        return Joined(channel_of_one(), channel_of_one(), channel_of_one())
    if cluster not in _joined:
        if runtime.runtime_is_initialized():
            raise RuntimeError(
                "TensorFlow was used before the ZeroStrategy was made, and then it cannot join other workers any more. "
                "Make the strategy at the start of the program, before any tensor, variable or model."
            )
        distributed.leave_watch_out()
        channel, of_saving, of_pulse, of_batches = _meet(cluster, timeout_seconds)
        channel.agree("comparing versions", versions(), "versions")
        connections = transport_choice.connect(cluster, channel, timeout_seconds)
        pulse = Pulse(cluster, of_pulse, timeout_seconds, in_a_row(connections))
        _joined[cluster] = Joined(channel, of_saving, of_batches, connections, pulse)
    return _joined[cluster]


def _meet(cluster: Cluster, timeout_seconds: float) -> list[Channel]:
    """Four channels among the workers, each of which finds the hosts of all others. [Note: host names]

    Raises:
        OSError: if a worker does not find one; else as `Channel.join`.
    """
    hosts = list(map(host_of, cluster.addresses))
    lookup = Lookup([host for index, host in enumerate(hosts) if index != cluster.index], timeout_seconds)
    with contextlib.ExitStack() as opened:
        try:
            channels = [_opened(cluster, timeout_seconds, opened) for _ in range(4)]
        except TimeoutError as error:
            if missing := advice_on(lookup, cluster):
                raise TimeoutError(f"{error}{missing}") from error
            raise
        if not all(map(is_number, hosts)):  # the same on all workers
            told = channels[0].all_gather("looking up host names", lookup.missing(wait=True))
            if problem := problem_of(told, cluster):
                raise OSError(problem)
        opened.pop_all()
    return channels


def _opened(cluster: Cluster, timeout_seconds: float, opened: contextlib.ExitStack) -> Channel:
    channel = Channel.join(cluster, timeout_seconds)
    opened.callback(channel.close)
    return channel


def in_a_row(connections: Mapping[str, Sequence[Connection]]) -> list[Connection]:
    """The connections of all transports in one list."""
    return [each for several in connections.values() for each in several]


def channel_of_one() -> Channel:
    """A control channel for a process without other workers."""
    return Channel(Cluster(("localhost:1",), ("worker 0",), 0), {}, timeout_seconds=1.0)
