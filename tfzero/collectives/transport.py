"""The contract of a transport, which carries the values of a group's replicas.

[Note: transports] `Group` handles ranks, dtypes that travel in disguise, shapes that are not known yet, and two levels.
A `Transport` does the rest: one of five primitives on a value in its wire dtype. There are three, in `rings.py`,
`nccl.py` and `over_links.py`. `transport_choice.py` chooses; no other module asks which one is in use. To add another,
write one file with one class, and add its row to `transport_choice.TRANSPORTS`.

A transport declares what it can do: its devices and topologies (`device_types`, `obstacle`, `check_group`), its dtypes
(`rows` of the table of `ways.py`), and what orders its collectives (`ordering`). A group refuses a transport that would
leave its collectives without order. It counts and keys every collective itself, so that no transport can omit that.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.counts import LANES
from tfzero.collectives.ways import Place, Way
from tfzero.plan.settings import Settings
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster

# What orders the collectives of one replica's lane. [Note: ordering]
BY_TOKENS = "tokens"  # TensorFlow's: each collective takes its lane's token
BY_COUNTS = "counts"  # each waits for its lane's count, which the previous one increments when it ends

# What machines may have in different versions; for error messages.
LIBRARIES = "(NCCL on GPUs)"


class Connection(Protocol):
    """A connection that collectives may wait for beside TensorFlow's own."""

    timeout_seconds: float
    at_odds: str  # how another worker's collective differs; "" as long as none does
    is_lost: bool

    def close(self, reason: str) -> None:
        """Ends it: whatever waits for it raises an error with this reason."""


@dataclass(frozen=True)
class Surroundings:
    """Where a strategy's replicas compute. The choice of a transport depends on it.

    Args:
        device_type: "CPU" or "GPU".
        devices: number of these devices in this process, and in every other.
        workers: number of processes.
        connections: those made when the workers met, by the name of their transport; empty before that.
    """

    device_type: str
    devices: int = 1
    workers: int = 1
    connections: Mapping[str, Sequence[Connection]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One collective as one replica puts it into a graph, on the replica's device and in its lane.

    Args:
        members: number of replicas that take part.
        rank: this replica's rank among them.
        group_key: the key by which TensorFlow knows the group.
        key: identifies the collective. [Note: keys]
        size: a scalar tensor, for a value of unknown shape: index in `keys.SIZES` of the size to which it is padded.
        lane: the lane that orders it; the last one is -1 or the highest.
        token: that lane's token on this replica's device.
    """

    members: int
    rank: int
    group_key: int = 0
    key: int = 0
    size: tf.Tensor | None = None
    lane: int = 0
    token: tf.Variable | None = None

    @property
    def instance_key(self) -> int | tf.Tensor:
        """The key of this size."""
        return self.key if self.size is None else self.key + self.size


class Transport:
    """How values travel. [Note: transports]

    A primitive takes a value on the replica's device, in a dtype that the transport's rows of `ways.TABLE` name, and
    returns a tensor of that dtype. It is traced once for each replica of every process, in the same order.

    Args:
        reason: why it was chosen, for `python -m tfzero.doctor`.
    """

    name = ""  # in the self-test's rows, and in the agreement of workers
    title = ""  # for people
    device_types: tuple[str, ...] = ("CPU", "GPU")
    rows = ways.RINGS  # the name of its rows of `ways.TABLE`
    ordering = BY_TOKENS
    lanes = LANES + 1  # [Note: ordering]
    gathers_small_sums = True  # [Note: small sums] in `collectives/group.py`
    is_tested_in_every_dtype = False  # by the self-test at every start

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    # Before it carries anything.

    @classmethod
    def connect(cls, cluster: Cluster, channel: Channel, timeout_seconds: float) -> Sequence[Connection]:
        """Makes its connections. All workers call it as they meet, before TensorFlow's server listens."""
        del cluster, channel, timeout_seconds
        return ()

    @classmethod
    def configure(cls, is_clustered: bool) -> contextlib.AbstractContextManager:
        """While active, TensorFlow's server starts, for a process of a cluster or for one without others."""
        del is_clustered
        return contextlib.nullcontext()

    @classmethod
    def obstacle(cls, where: Surroundings) -> str:
        """Why it cannot work there, for devices of its types; "" if it can."""
        del where
        return ""

    @classmethod
    def make(cls, where: Surroundings, reason: str) -> "Transport":
        """A transport for these surroundings."""
        del where
        return cls(reason)

    @classmethod
    def merit(cls, where: Surroundings) -> str:
        """Why it is chosen where it can work; "" if the reason is the obstacle of the transports before it."""
        del where
        return ""

    def check(self, settings: Settings, workers: int) -> None:
        """Raises ValueError if one of the settings has no effect with this transport."""
        del settings, workers

    def check_group(self, devices: int, world_size: int) -> None:
        """Raises ValueError if it cannot order the collectives of such a group. [Note: ordering]

        Args:
            devices: number of replicas in this process.
            world_size: number of replicas in all processes.
        """
        if self.ordering == BY_COUNTS and devices >= world_size:
            raise ValueError(
                f"Collectives over {self.name!r} are ordered by their counts, which are kept between processes only: "
                f"all {world_size} replicas are in this one. Choose a transport that is ordered by tokens."
            )

    def obstacle_of_levels(self, device_type: str) -> str:
        """Why sums take one level where two are possible; "" if nothing speaks against two. [Note: two levels]"""
        del device_type
        return ""

    def prepare(self) -> None:
        """Prepares the process before TensorFlow makes its devices."""

    def meeting(self, worker: str, timeout_seconds: float) -> contextlib.AbstractContextManager:
        """While active, the replicas' first collectives run on `worker`; it makes errors more informative."""
        del worker, timeout_seconds
        return contextlib.nullcontext()

    # What it is.

    def describe(self, is_between: bool) -> str:
        """How it carries values, for `strategy.report()`: between processes, or within one."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        """A remark for `python -m tfzero.doctor`; "" for none."""
        return ""

    def of_tensorflow(self, primitive: str, place: Place) -> "Transport | None":
        """The transport of TensorFlow's own operation for a primitive, for comparison; None if there is none."""
        del primitive, place
        return None

    def way(self, primitive: str, dtype: str, place: Place) -> Way:
        """The way of a primitive: operation and dtype. [Note: ways]"""
        return ways.choose(primitive, dtype, place)

    def lane(self, lane: int, backward: bool) -> int:
        """The lane that orders a collective whose key has this lane. [Note: ordering]"""
        del backward
        return lane

    # The primitives. A value may be flat, or have any shape with as many elements.

    def all_reduce(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Sum of all members' values."""
        raise self._cannot(ways.ALL_REDUCE)

    def reduce_scatter(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Sum over members of this rank's row: `[members * n]` to `[n]`."""
        raise self._cannot(ways.REDUCE_SCATTER)

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Sends row `r` to rank `r` and returns the rows received, in rank order; both are `[members, n]`."""
        raise self._cannot(ways.ALL_TO_ALL)

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """The members' values, one after the other: `[n, ...]` to as many elements as `[members, n, ...]` has."""
        raise self._cannot(ways.ALL_GATHER)

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Rank 0's value, for a static shape."""
        raise self._cannot(ways.BROADCAST)

    def ended(self, primitive: str, result: tf.Tensor, value: tf.Tensor, call: Call) -> tf.Tensor:
        """A collective's result once its end is counted; may set its static shape."""
        del primitive, value, call
        return result

    def _cannot(self, primitive: str) -> Exception:
        return NotImplementedError(f"{self.name!r} has no {primitive}: its rows of `ways.TABLE` must give another way.")


class Silent:
    """Sends nothing: each replica gets its own values, in the shapes of results, and nothing is ordered.

    Used for a group of one, and to measure a step without communication. All other questions go to `transport`.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def all_reduce(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """The value itself."""
        del call
        return tf.identity(value)

    def reduce_scatter(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """This replica's row of `[members, n]`."""
        return rows[call.rank]

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """The rows themselves."""
        del call
        return rows

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """This replica's row in all places: `[n]` to `[members, n]`."""
        return tf.stack([row] * call.members)

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """The value itself."""
        del call
        return tf.identity(value)
