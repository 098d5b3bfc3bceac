"""The contract of a transport: how the values of a group's replicas travel.

[Note: transports] `Group` knows ranks, dtypes that travel in disguise, shapes that are not known yet, and two levels.
What is left is one of five primitives on a value as it travels, and that is a `Transport`'s: `rings.py`, `nccl.py` and
`over_links.py` are three. `transport_choice.py` chooses; nothing else asks which one carries. Another is one file with
one class, and its row in `transport_choice.TRANSPORTS`.

A transport says what it can do: on which devices and in which topology (`device_types`, `obstacle`, `check_group`), in
which dtypes (`rows` of the table of `ways.py`), and what orders its collectives (`ordering`). A group refuses what
would leave them without order, and counts and keys every collective itself, so that no transport can leave that out.
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
BY_TOKENS = "tokens"  # TensorFlow's: each collective is given its lane's
BY_COUNTS = "counts"  # each waits for its lane's count, which the last one adds to when it ends

# What machines may have in different versions, for errors.
LIBRARIES = "(NCCL on GPUs)"


class Connection(Protocol):
    """What collectives may wait for beside TensorFlow's own."""

    timeout_seconds: float
    at_odds: str  # how another worker's collective differs; "" as long as none does
    is_lost: bool

    def close(self, reason: str) -> None:
        """Ends it: what waits for it raises for this reason."""


@dataclass(frozen=True)
class Surroundings:
    """Where a strategy's replicas compute, which is what a transport is chosen by.

    Args:
        device_type: "CPU" or "GPU".
        devices: how many of them this process has, as every other.
        workers: how many processes there are.
        connections: what was connected when the workers met, by the name of its transport; none before.
    """

    device_type: str
    devices: int = 1
    workers: int = 1
    connections: Mapping[str, Sequence[Connection]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One collective, as one replica puts it into a graph, on its device and in its place of the order.

    Args:
        members: how many replicas take part.
        rank: of this replica among them.
        group_key: by which TensorFlow knows the group.
        key: which collective it is. [Note: keys]
        size: index of that of `keys.SIZES` to which the value is padded, if its shape is not known; a scalar tensor.
        lane: in which it is ordered; the last one is -1 or the highest.
        token: of that lane, on this replica's device.
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

    A primitive gets a value in a dtype that the transport's rows of `ways.TABLE` name, on the replica's device, and is
    traced once for each replica of every process, in the same order. It gives a tensor of that dtype.

    Args:
        reason: why it was chosen, as `python -m tfzero.doctor` says it.
    """

    name = ""  # as the self-test's rows have it, and as workers agree on it
    title = ""  # for people
    device_types: tuple[str, ...] = ("CPU", "GPU")
    rows = ways.RINGS  # which rows of `ways.TABLE` are its own
    ordering = BY_TOKENS
    lanes = LANES + 1  # [Note: ordering]
    gathers_small_sums = True  # [Note: small sums] in `collectives/group.py`
    is_tested_in_every_dtype = False  # by the self-test of every start

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    # Before it carries anything.

    @classmethod
    def connect(cls, cluster: Cluster, channel: Channel, timeout_seconds: float) -> Sequence[Connection]:
        """What it needs between the workers, who all call this as they meet, before TensorFlow listens."""
        del cluster, channel, timeout_seconds
        return ()

    @classmethod
    def configure(cls, is_clustered: bool) -> contextlib.AbstractContextManager:
        """Within it TensorFlow's server starts, of a process of a cluster or of one without others."""
        del is_clustered
        return contextlib.nullcontext()

    @classmethod
    def obstacle(cls, where: Surroundings) -> str:
        """Why it cannot carry there, for devices of its types; "" if it can."""
        del where
        return ""

    @classmethod
    def make(cls, where: Surroundings, reason: str) -> "Transport":
        """One that carries there."""
        del where
        return cls(reason)

    @classmethod
    def merit(cls, where: Surroundings) -> str:
        """Why it is chosen where it can carry; "" if that is what hinders those before it."""
        del where
        return ""

    def check(self, settings: Settings, workers: int) -> None:
        """Raises ValueError if one of the settings has no effect over it."""
        del settings, workers

    def check_group(self, devices: int, world_size: int) -> None:
        """Raises ValueError if it cannot carry, in order, what so many devices of this process and all others exchange.

        [Note: ordering]
        """
        if self.ordering == BY_COUNTS and devices >= world_size:
            raise ValueError(
                f"Collectives over {self.name!r} are ordered by their counts, which are kept between processes only: "
                f"all {world_size} replicas are in this one. Choose a transport that is ordered by tokens."
            )

    def obstacle_of_levels(self, device_type: str) -> str:
        """Why sums are taken in one level, though there could be two; "" if they need not. [Note: two levels]"""
        del device_type
        return ""

    def prepare(self) -> None:
        """What must be before TensorFlow makes its devices."""

    def meeting(self, worker: str, timeout_seconds: float) -> contextlib.AbstractContextManager:
        """Within it the replicas' first collectives run, as seen by `worker`; for errors that tell more."""
        del worker, timeout_seconds
        return contextlib.nullcontext()

    # What it is.

    def describe(self, is_between: bool) -> str:
        """How it carries, for `strategy.report()`: between processes, or within one."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        """What else `python -m tfzero.doctor` says of it; "" for nothing."""
        return ""

    def of_tensorflow(self, primitive: str, place: Place) -> "Transport | None":
        """That of TensorFlow's own operation for a primitive, to compare this one with; None if there is none."""
        del primitive, place
        return None

    def way(self, primitive: str, dtype: str, place: Place) -> Way:
        """As what, and in which dtype, a primitive is carried. [Note: ways]"""
        return ways.choose(primitive, dtype, place)

    def lane(self, lane: int, backward: bool) -> int:
        """In which lane a collective is ordered, whose key has this one. [Note: ordering]"""
        del backward
        return lane

    # The primitives. A value's rows, or all of it, lie flat or in any shape of as many elements.

    def all_reduce(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """The sum of all members' values."""
        raise self._cannot(ways.ALL_REDUCE)

    def reduce_scatter(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """The sum of this rank's rows, of those of all members: `[members * n]` to `[n]`."""
        raise self._cannot(ways.REDUCE_SCATTER)

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Row `r` goes to rank `r`; the row that comes from rank `r` takes its place: `[members, n]` to the same."""
        raise self._cannot(ways.ALL_TO_ALL)

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """The members' values, one after the other: `[n, ...]` to as many elements as `[members, n, ...]`."""
        raise self._cannot(ways.ALL_GATHER)

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Rank 0's value, of a static shape."""
        raise self._cannot(ways.BROADCAST)

    def ended(self, primitive: str, result: tf.Tensor, value: tf.Tensor, call: Call) -> tf.Tensor:
        """A result outside of what is counted; it may be told its shape."""
        del primitive, value, call
        return result

    def _cannot(self, primitive: str) -> Exception:
        return NotImplementedError(f"{self.name!r} has no {primitive}: its rows of `ways.TABLE` must give another way.")


class Silent:
    """Sends nothing: each replica gets its own values, in the shapes of results, and there is no order.

    For a group of one, and for measuring what is not communication. What else it is asked, `transport` answers.
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
        """The own row of `[members, n]`."""
        return rows[call.rank]

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """The rows themselves."""
        del call
        return rows

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """The own row in all places: `[n]` to `[members, n]`."""
        return tf.stack([row] * call.members)

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """The value itself."""
        del call
        return tf.identity(value)
