"""What a step costs by formula, for any number of replicas and workers. Pure arithmetic, no TensorFlow.

    python -m tfzero.costs --parameters 7e9 --gbit 100 --microseconds 20

prints what 8, 64, 1024 and 16384 replicas hold and send, and how long that takes on such links.

A reduce-scatter sends each of N rows to its owner. An all-gather sends each owner's row to all. In both, each replica
sends (N-1)/N of all elements, in N-1 messages. An all-reduce in a ring is one of each
(https://arxiv.org/abs/1910.02054, section 7). `tests/test_costs.py` compares this with the collectives of real steps.

With `--sync-every` workers train apart. Each is then a small fleet by itself, and a merge, once in so many steps, sends
between workers what an all-reduce does. With `--servers` each worker pushes its gradients to parameter servers, and
pulls parameters. The servers' links are then the narrow ones, if they are fewer than the workers.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from tfzero.plan.formats import BLOCK_ELEMENTS, FORMATS
from tfzero.plan.scheme import STAGES, Scheme, scheme_of


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        world_size: number of replicas.
        stage: of ZeRO, 0 to 3.
        compression: as in `ZeroStrategy`; None, "bf16", "fp16" or "int8".
        error_feedback: as in `ZeroStrategy`.
        reshard_after_forward: as in `ZeroStrategy`.
        replicas_per_worker: how many replicas share a worker, and reach each other without the network.
        two_level: whether gradients are summed within each worker first, in float32 (`collectives/group.py`).
        sync_every: as in `ZeroStrategy`; `compression` and `error_feedback` are then those of merges.
        servers: number of parameter servers; None without. [Note: servers] in `plan/serving.py`
    """

    world_size: int
    stage: int
    compression: str | None = None
    error_feedback: bool = False
    reshard_after_forward: bool = True
    replicas_per_worker: int = 1
    two_level: bool = False
    sync_every: int | None = None
    servers: int | None = None

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.stage, self.reshard_after_forward)

    @property
    def passes(self) -> int:
        """How often all elements travel in a step (`Scheme.passes`)."""
        return self.scheme.passes

    @property
    def workers(self) -> int:
        return self.world_size // self.replicas_per_worker

    @property
    def of_one_worker(self) -> "Setup":
        """One worker by itself, which takes steps alone."""
        return Setup(self.replicas_per_worker, self.stage, None, False, self.reshard_after_forward)

    def sent_bytes(self) -> float:
        """Bytes that a replica sends in a step, for each parameter. Of whole parameters the first one merges all."""
        if self.sync_every is not None:
            own_part = 1 / self.replicas_per_worker if self.scheme.shards_parameters else 1.0
            return self.of_one_worker.sent_bytes() + own_part * self.network_bytes()
        if self.servers is not None:  # of what is whole on all replicas the first one pushes all
            own_part = 1 / self.replicas_per_worker if self.scheme.shards_slots else 1.0
            return self.of_one_worker.sent_bytes() + own_part * self.network_bytes()
        item = item_bytes(self.compression)
        once = item * (self.world_size - 1) / self.world_size
        if not self.two_level:
            return self.passes * once
        here, workers = self.replicas_per_worker, self.workers
        return 4 * (here - 1) / here + item * (workers - 1) / workers / here + (self.passes - 1) * once

    def network_bytes(self) -> float:
        """Bytes that leave a worker in a step, for each parameter.

        An all-to-all sends from each replica straight to all others. A ring crosses a worker's boundary once.
        """
        if self.sync_every is not None:
            return 2 * item_bytes(self.compression) * (self.workers - 1) / self.workers / self.sync_every
        if self.servers is not None:
            return 4.0
        inside = min(self.replicas_per_worker, self.world_size)
        if inside == self.world_size:
            return 0.0
        size = item_bytes(self.compression)
        ring = size * (self.world_size - 1) / self.world_size
        straight = size * (1 if self.two_level else inside) * (self.world_size - inside) / self.world_size
        if self.scheme.reduces_to_all and self.compression is None:
            return 2 * ring
        return straight + (self.passes - 1) * ring

    def bytes_of_server(self) -> float:
        """Bytes that leave a parameter server in a step of all workers, for each parameter; as many come."""
        return 0.0 if self.servers is None else 4.0 * self.workers / self.servers

    def messages(self, exchanges: int) -> int:
        """Messages that a replica sends in a step, if variables travel in this many exchanges (buckets, or layers)."""
        if self.sync_every is not None:
            of_merge = 2 * exchanges * (self.workers - 1)
            return self.of_one_worker.messages(exchanges) + -(-of_merge // self.sync_every)
        if self.servers is not None:
            return self.of_one_worker.messages(exchanges) + exchanges * self.servers
        once = self.world_size - 1
        of_gradients = self.replicas_per_worker - 1 + self.workers - 1 if self.two_level else once
        return exchanges * (of_gradients + (self.passes - 1) * once)

    def held_bytes(self, slots: int = 2) -> float:
        """Bytes that a replica holds between steps, for each float32 parameter: parameter, slots, lag and residual.

        With `sync_every` that is the first replica, with what merges it: this worker's part of the outer optimizer's
        values and of one slot, and with compression the values of the latest merge and a residual. With servers it is
        without slots, which they hold.
        """
        if self.sync_every is not None:
            own_part = 1 / self.replicas_per_worker if self.scheme.shards_parameters else 1.0
            kept = 8 / self.workers + (4 if self.compression else 0) + (4 if self.error_feedback else 0)
            return self.of_one_worker.held_bytes(slots) + own_part * kept
        if self.servers is not None:
            return self.of_one_worker.held_bytes(slots=0)
        fraction, scheme = 1 / self.world_size, self.scheme
        parameter = 4 * fraction if scheme.shards_parameters else 4.0
        slot = 4 * fraction if scheme.shards_slots else 4.0
        is_encoded = self.compression is not None and self.world_size > 1
        lag = 4 * fraction if is_encoded and scheme.gathers_updates else 0.0
        return parameter + slots * slot + lag + (4 if is_encoded and self.error_feedback else 0)


def item_bytes(compression: str | None) -> float:
    """Bytes of one float32 element on the wire, its part of a scale included."""
    return 4.0 if compression is None else FORMATS[compression].size_bytes(BLOCK_ELEMENTS) / BLOCK_ELEMENTS


def projection(options: argparse.Namespace) -> str:
    """A table of what replicas hold and send, and how long a step's traffic takes if nothing overlaps it."""
    lines = ["replicas  stage  wire  held GB  sent GB  messages  seconds on the wire"]
    giga = options.parameters / 1e9
    for world_size in (8, 64, 1024, 16384):
        for stage in STAGES:
            for name in (None, "int8") if options.servers is None else (None,):
                here = min(options.replicas_per_worker, world_size)
                is_two_level = 1 < here < world_size and (name is not None or not scheme_of(stage).reduces_to_all)
                every = options.sync_every if here < world_size else None
                is_two_level = is_two_level and every is None and options.servers is None
                setup = Setup(
                    world_size, stage, name, replicas_per_worker=here, two_level=is_two_level, sync_every=every,
                    servers=options.servers,
                )  # fmt: skip
                over_network = max(setup.network_bytes(), setup.bytes_of_server())
                sent = max(setup.sent_bytes() / options.local_speedup, over_network) * options.parameters
                messages = setup.messages(options.exchanges)
                seconds = sent * 8 / (options.gbit * 1e9) + messages * options.microseconds * 1e-6
                held, all_sent = setup.held_bytes() * giga, setup.sent_bytes() * giga
                lines.append(
                    f"{world_size:8}  {stage:5}  {name or 'f32':>4}  {held:7.2f}  {all_sent:7.2f}  {messages:8}  "
                    f"{seconds:19.3f}"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tfzero.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, required=True)
    parser.add_argument("--gbit", type=float, required=True, help="bandwidth of each worker's link, in Gbit/s")
    parser.add_argument("--microseconds", type=float, required=True, help="latency of a message")
    parser.add_argument("--exchanges", type=int, default=32, help="buckets or layers that travel one after the other")
    parser.add_argument("--replicas-per-worker", type=int, default=1)
    parser.add_argument("--local-speedup", type=float, default=10.0, help="how much faster links within a worker are")
    parser.add_argument("--sync-every", type=int, help="steps that workers take apart before they are merged")
    parser.add_argument("--servers", type=int, help="parameter servers that hold the slots, and update")
    options = parser.parse_args(arguments)
    if options.servers is not None and (options.servers < 1 or options.sync_every is not None):
        parser.error(f"--servers must be at least 1, and excludes --sync-every. Received: {options.servers}")
    print(projection(options))


if __name__ == "__main__":
    main()
