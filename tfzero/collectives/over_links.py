"""Transport over the workers' own connections (`workers/links.py`): CPUs of processes with one replica each.

Links carry everything except broadcasts, which use rings. There is one link per lane. Only the lane's count orders its
collectives, so that lanes proceed side by side. A group refuses this transport where nothing is counted, and `Links`
refuses two collectives at once. A number and a key travel with each collective: they reveal workers whose collectives
differ.
"""

import functools
import os
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.rings import Rings
from tfzero.collectives.transport import BY_COUNTS, Call, Connection, Surroundings, Transport
from tfzero.collectives.ways import Place
from tfzero.host import graphs
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.links import Links, link

# One connection for most collectives and one for gathers in the backward pass. [Note: ordering]
USUAL, BACKWARD = LANES = (0, -1)


class OverLinks(Transport):
    """Collectives over `Links`.

    Args:
        links: this worker's links, one for each of `LANES`.
        reason: why this transport was chosen.
    """

    name = "links"
    title = "connections between every two workers"
    device_types = ("CPU",)
    ordering = BY_COUNTS

    def __init__(self, links: Sequence[Links], reason: str = "") -> None:
        super().__init__(reason)
        self._links = dict(zip(LANES, links, strict=True))
        self._rings = Rings(reason)

    @classmethod
    def connect(cls, cluster: Cluster, channel: Channel, timeout_seconds: float) -> Sequence[Connection]:
        """Connects every two workers, if each has enough threads. [Note: links]"""
        threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1
        if cluster.size == 1 or min(channel.all_gather("counting threads", threads)) < len(LANES):
            return ()
        return link(cluster, channel, len(LANES), timeout_seconds)

    @classmethod
    def obstacle(cls, where: Surroundings) -> str:
        """Links need several workers with one device each."""
        if where.workers == 1:
            return "all replicas are CPU devices of one process"
        if where.devices > 1:
            return "workers have several CPU devices each: their own connections are for one"
        if not where.connections.get(cls.name):
            return "a worker has too few threads to wait in connections of its own"
        return ""

    @classmethod
    def make(cls, where: Surroundings, reason: str) -> "Transport":
        """Uses the connections made when the workers met."""
        return cls(where.connections[cls.name], reason)  # type: ignore[arg-type]

    @classmethod
    def merit(cls, where: Surroundings) -> str:
        """Everything that links need is there."""
        return "each worker has one CPU device, and threads enough to wait for others"

    def check_group(self, devices: int, world_size: int) -> None:
        """Requires one device here and one in each connected worker."""
        super().check_group(devices, world_size)
        for links in self._links.values():
            if (devices, world_size) != (1, links.workers):
                raise ValueError(
                    f"Connections of {links.workers} workers carry what one replica of each exchanges. "
                    f"Received: {devices} devices in this process, {world_size} replicas in all"
                )

    def describe(self, is_between: bool) -> str:
        """The primitives in use and the order of sums."""
        return "all-to-all and all-gather over connections between every two workers, sums in rank order"

    def of_tensorflow(self, primitive: str, place: Place) -> Transport | None:
        """The same as for rings."""
        return self._rings.of_tensorflow(primitive, place)

    def lane(self, lane: int, backward: bool) -> int:
        """One of `LANES`."""
        return BACKWARD if backward else USUAL

    def all_reduce(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Sum of all members' values, added in rank order."""
        return self._fill(Links.all_reduce, value, call)

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Sends row `r` to rank `r`: `[members, n]` to the same shape."""
        return self._fill(Links.all_to_all, rows, call)

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """Every member's value: `[n, ...]` to `[members, n, ...]`."""
        return self._fill(Links.all_gather, row, call, [call.members])

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Rank 0's value, sent by TensorFlow."""
        return self._rings.broadcast(value, call)

    def ended(self, primitive: str, result: tf.Tensor, value: tf.Tensor, call: Call) -> tf.Tensor:
        """The result with the static shape that is known."""
        if primitive == ways.BROADCAST:
            return result
        rows = [call.members] if primitive == ways.ALL_GATHER else []
        return tf.ensure_shape(result, [*rows, *value.shape])

    def _fill(self, method: Callable, value: tf.Tensor, call: Call, rows: Sequence[int] = ()) -> tf.Tensor:
        """Runs a method of the lane's `Links` on a value; the result has the value's shape, with `rows` before it."""
        run = functools.partial(method, self._links[call.lane], key=call.key)
        flat = tf.reshape(value, [-1])
        filled = graphs.fill(run, flat, tf.concat([[*rows], tf.shape(flat)], 0), method.__name__)
        return tf.reshape(filled, tf.concat([[*rows], tf.shape(value)], 0))
