"""Which device holds and computes what: pure arithmetic, no TensorFlow.

[Note: the mesh] Every device of every worker has a rank. The ranks of worker `w` begin at `w * devices_per_worker`.
They form a mesh with three axes:

* `shards`: ranks that split one copy of the state. They are neighbours, so the heaviest traffic takes the shortest way.
* `copies`: groups of ranks that hold the same state. Each group splits it over its shards.
* `stages` of a model, one after the other. Each has its own copies and shards. (Not the stage of ZeRO:
  `plan/scheme.py`.)

The ranks of one stage are its `copies * shards` replicas. Each computes with its own rows of a batch. Splits of a batch
and means over it go by `replicas`; splits of state go by `shards`. A strategy's mesh has only the axis `shards`, so the
two numbers are equal, unless workers train apart: then each has a copy ([Note: local steps] in `plan/merging.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """All devices of all workers, and which of them are this process's. [Note: the mesh]

    Args:
        workers: number of processes.
        devices_per_worker: number of devices of each.
        worker: index of this process among the workers.
        copies: number of copies of the state.
        stages: number of stages of the model.

    Raises:
        ValueError: if the ranks cannot be divided along these axes.
    """

    workers: int = 1
    devices_per_worker: int = 1
    worker: int = 0
    copies: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        if min(self.workers, self.devices_per_worker, self.copies, self.stages) < 1:
            raise ValueError(f"Every axis of a mesh has a length of at least 1. Received: {self!r}")
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"Workers are numbered from 0 to {self.workers - 1}. Received: {self!r}")
        if self.size % (self.copies * self.stages):
            raise ValueError(
                f"{self.size} devices cannot be dealt to {self.stages} stages of a model with {self.copies} copies "
                f"each, as {self.copies * self.stages} does not divide {self.size}. Received: {self!r}"
            )
        if self.replicas % self.devices_per_worker and self.devices_per_worker % self.replicas:
            raise ValueError(
                f"A stage of the model must take whole workers, or a worker whole stages, but each stage takes "
                f"{self.replicas} devices, and a worker has {self.devices_per_worker}. Received: {self!r}"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.workers * self.devices_per_worker

    @property
    def replicas(self) -> int:
        """Number of replicas of a stage; a batch is cut into as many parts."""
        return self.size // self.stages

    @property
    def shards(self) -> int:
        """Number of shards that a copy of the state is split into."""
        return self.replicas // self.copies

    @property
    def is_chief(self) -> bool:
        """Whether this process is the leader, worker 0."""
        return self.worker == 0

    # Ranks. `replica` is the index of a device within this process.

    @property
    def ranks(self) -> range:
        """The ranks of this process's replicas."""
        first = self.worker * self.devices_per_worker
        return range(first, first + self.devices_per_worker)

    def rank(self, replica: int) -> int:
        """The rank of a local replica."""
        return self.ranks[replica]

    def stage(self, rank: int) -> int:
        """The stage of the model that a rank computes."""
        return rank // self.replicas

    def copy(self, rank: int) -> int:
        """The copy of its stage's state that a rank's shard belongs to."""
        return rank % self.replicas // self.shards

    def shard_rank(self, rank: int) -> int:
        """The index of the shard that a rank holds."""
        return rank % self.shards

    # Rows of a batch.

    def part_of_rank(self, rank: int) -> int:
        """The part of a batch that a rank takes.

        Keras puts predictions back in (replica, worker) order, so part `p` goes to worker `p % workers`.
        """
        here = min(self.devices_per_worker, self.replicas)  # replicas of one stage on one worker
        worker, replica = divmod(rank % self.replicas, here)
        return replica * (self.replicas // here) + worker

    def part(self, replica: int) -> int:
        """The part of a batch that a local replica takes."""
        return self.part_of_rank(self.rank(replica))
