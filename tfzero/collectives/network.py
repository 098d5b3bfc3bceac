"""The network between replicas, measured when training begins, and the bucket size that follows from it.

[Note: bucket size] P bytes in buckets of B bytes wait P/B times for the network's latency, and the last bucket's
transfer has nothing left to hide behind. The sum of both, P/B * latency + B / bandwidth, is least at
B = sqrt(P * latency * bandwidth). The result is rounded to a power of two, so that small differences between
measurements change nothing.
"""

import math
import statistics
import time
from dataclasses import dataclass

import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.plan.settings import Choice
from tfzero.workers.channel import Channel

DEFAULT_BUCKET_BYTES = 25 * 2**20
_LEAST, _MOST = 2**20, 2**26
# Float32 elements of the two exchanges that measure latency and bandwidth.
_SMALL, _LARGE = 2**8, 2**20
_ROUNDS = 5


@dataclass(frozen=True)
class Network:
    """Cost of an exchange: a reduce-scatter and an all-gather over all replicas."""

    latency_seconds: float
    bytes_per_second: float

    def bucket_bytes(self, model_bytes: int) -> Choice:
        """Bucket size for a model with so many bytes of gradients. [Note: bucket size]"""
        best = math.sqrt(max(1, model_bytes) * self.latency_seconds * self.bytes_per_second)
        chosen = 2 ** round(math.log2(min(max(best, _LEAST), _MOST)))
        return Choice(
            chosen,
            f"the square root of {model_bytes / 2**20:.1f} MiB of gradients x {self.latency_seconds * 1e3:.2f} ms x "
            f"{self.bytes_per_second / 2**20:.0f} MiB/s, as measured, is {best / 2**20:.1f} MiB",
        )


def measure_network(group: Group, channel: Channel) -> Network:
    """The network as the first worker measures it. All workers call this together."""

    def exchange(rows: tf.Tensor, replica: int) -> tf.Tensor:
        return group.all_gather(group.reduce_scatter(rows, replica), replica)

    def seconds(elements: int) -> float:
        rows = tf.zeros([group.world_size, -(-elements // group.world_size)])
        taken = []
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            for result in group.launch(exchange, [rows] * len(group.devices)):
                result[0, 0].numpy()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    small, large = seconds(_SMALL), seconds(_LARGE)
    size_bytes = 4 * (_LARGE - _SMALL)
    small, rate = channel.broadcast("measuring the network", [small, size_bytes / max(large - small, 1e-9)])
    return Network(small, rate)
