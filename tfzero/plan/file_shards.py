"""Which worker reads which files: files are dealt to virtual shards, and shards to workers. No TensorFlow.

[Note: virtual shards] The number of shards is the user's and does not depend on the workers. File `f` belongs to shard
`f % shards`. Batch `k` consists of the `k`-th chunk of every shard, so it is the same for every number of workers.
Worker `w` of W reads the shards `s` with `s % W == w`, so W must divide the number of shards. Shuffling changes the
order of files within their shard only: else passes would differ in length, and Keras takes the first one's for all.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """Where one worker begins to read in a pass.

    Args:
        files: for each of its shards, the files that are left, by index, in reading order.
        seeds: for each of these files, the seed of its shuffle.
        skips: for each shard, number of elements to skip in what is left.
    """

    files: list[list[int]]
    seeds: list[list[int]]
    skips: list[int]


@dataclass(frozen=True)
class FileShards:
    """How files are dealt to shards. [Note: virtual shards]

    Args:
        files: number of files.
        shards: number of virtual shards.
        batch_size: elements of a whole batch, over all shards.
        shuffles: whether the order of files changes from pass to pass.
        seed: of the order.
        counts: number of elements of each file, if known.
    """

    files: int
    shards: int
    batch_size: int
    shuffles: bool = False
    seed: int = 0
    counts: tuple[int, ...] | None = None

    @property
    def chunk(self) -> int:
        """Elements that each shard gives to a batch."""
        return self.batch_size // self.shards

    def shards_of(self, worker: int, workers: int) -> list[int]:
        """The shards that a worker reads.

        Raises:
            ValueError: if the number of workers does not divide that of shards.
        """
        if self.shards % workers:
            fitting = [n for n in range(1, self.shards + 1) if self.shards % n == 0]
            raise ValueError(
                f"A sharded_dataset of {self.shards} shards can be read by {fitting} workers, as every worker reads "
                f"as many shards. Received: {workers} workers."
            )
        return list(range(worker, self.shards, workers))

    def deal(self, epoch: int) -> list[list[int]]:
        """The files of each shard in a pass, by index, in reading order."""
        dealt = [list(range(shard, self.files, self.shards)) for shard in range(self.shards)]
        if self.shuffles:
            for files in dealt:
                files.sort(key=lambda file: (number_of("order", self.seed, epoch, file), file))
        return dealt

    def start(self, epoch: int, batches: int, shards: Sequence[int]) -> Start:
        """Where to begin in a pass after so many batches. Files that lie before are left out if counts are known."""
        dealt, starting = self.deal(epoch), Start([], [], [])
        for shard in shards:
            files, skip = dealt[shard], batches * self.chunk
            while self.counts is not None and files and self.counts[files[0]] <= skip:
                skip -= self.counts[files[0]]
                files = files[1:]
            starting.files.append(files)
            starting.seeds.append([number_of("shuffle", self.seed, epoch, file) for file in files])
            starting.skips.append(skip)
        return starting

    @property
    def batches(self) -> int | None:
        """Number of batches of every pass; None if counts are unknown."""
        if self.counts is None:
            return None
        elements = [sum(self.counts[file] for file in files) for files in self.deal(0)]
        return max(-(-count // self.chunk) for count in elements)


def number_of(*parts: object) -> int:
    """A number of 62 bits that depends on nothing but these parts: the same for every version and machine."""
    text = repr(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2
