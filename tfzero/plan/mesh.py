"""Who is where: pure arithmetic, no TensorFlow.

[Note: the mesh] Every device of every worker has a rank; worker `w` has those from `w * devices_per_worker` on. Ranks
are places in a mesh of three axes:

* `shards`: ranks over which state is split. They are neighbours, so that what is exchanged most travels least.
* `copies`: groups of ranks that hold the same state, each split over its shards.
* `stages` of a model, one after the other, each with copies and shards of its own. (Not of ZeRO: `plan/scheme.py`.)

Ranks of one stage are its replicas, `copies * shards` of them: each computes with its own rows of a batch. What is cut
by rows, and means over a batch, go by `replicas`; what is split goes by `shards`. A strategy's mesh has the one axis
`shards`, so that both are as many.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """All devices of all workers, and this process among them. [Note: the mesh]

    Args:
        workers: number of processes.
        devices_per_worker: number of devices of each.
        worker: this process's place among the workers.
        copies: how many times state is held.
        stages: of the model.

    Raises:
        ValueError: if the ranks cannot be dealt to such axes.
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
        """Into how many parts a batch is cut."""
        return self.size // self.stages

    @property
    def shards(self) -> int:
        """Into how many parts state is split."""
        return self.replicas // self.copies

    @property
    def is_chief(self) -> bool:
        """Whether this process speaks for all."""
        return self.worker == 0

    # Ranks. `replica` counts the devices of this process.

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
        """Which copy of its stage's state a rank holds a shard of."""
        return rank % self.replicas // self.shards

    def shard_rank(self, rank: int) -> int:
        """Which shard a rank holds."""
        return rank % self.shards

    # Rows of a batch.

    def part_of_rank(self, rank: int) -> int:
        """The part of a batch that a rank takes.

        Keras puts predictions back in order as (replica, worker), so part `p` goes to worker `p % workers`.
        """
        here = min(self.devices_per_worker, self.replicas)  # of one stage, on one worker
        worker, replica = divmod(rank % self.replicas, here)
        return replica * (self.replicas // here) + worker

    def part(self, replica: int) -> int:
        """The part of a batch that a local replica takes."""
        return self.part_of_rank(self.rank(replica))
