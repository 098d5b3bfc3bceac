"""How many steps each worker has ended, and for whom the others wait. No TensorFlow.

[Note: who is awaited] A worker counts from the start of the server on, whether it has come or not. It is not waited for
any longer once it is lost (its connection has ended, or its pulse has stopped for `timeout_seconds`), or while it takes
no steps for `timeout_seconds`: it may not have come yet, have ended its training early, or validate alone. When it
trains again, it is waited for again.
"""

from time import monotonic


class Clocks:
    """The workers as one server sees them. Its owner locks it.

    Args:
        workers: their number.
        max_staleness: how many steps a worker may be ahead of the slowest; None for any number.
        timeout_seconds: as in the note.
    """

    def __init__(self, workers: int, max_staleness: int | None, timeout_seconds: float) -> None:
        self.max_staleness, self.timeout_seconds = max_staleness, timeout_seconds
        self.done = [0] * workers  # steps that each has ended
        self.is_here = [False] * workers
        self._was_here = [False] * workers
        self.at_end: set[int] = set()  # workers that have come to the end of `fit`
        self._trained_at = [monotonic()] * workers

    @property
    def workers(self) -> int:
        return len(self.done)

    def come(self, worker: int) -> None:
        """A worker has connected, perhaps again."""
        self.is_here[worker] = self._was_here[worker] = True
        self._trained_at[worker] = monotonic()

    def lose(self, worker: int) -> None:
        """A worker is lost, or has left."""
        self.is_here[worker] = False

    def is_lost(self, worker: int) -> bool:
        """Whether a worker has come, and is here no more."""
        return self._was_here[worker] and not self.is_here[worker]

    def trains(self, worker: int, idle_seconds: float = 0.0) -> None:
        """A worker says how long ago it was busy with a step."""
        self._trained_at[worker] = max(self._trained_at[worker], monotonic() - idle_seconds)

    def awaited(self, but: int | None = None) -> list[int]:
        """The workers that others wait for. [Note: who is awaited]"""
        now = monotonic()
        return [
            worker
            for worker in range(self.workers)
            if worker != but and not self.is_lost(worker) and now - self._trained_at[worker] < self.timeout_seconds
        ]

    def end(self, worker: int, step: int) -> bool:
        """A worker has ended a step. Returns whether this is new."""
        is_new = self.done[worker] <= step
        self.done[worker] = max(self.done[worker], step + 1)
        self.at_end.discard(worker)
        self.trains(worker)
        return is_new

    def have_ended(self, step: int) -> bool:
        """Whether all that are awaited have ended a step."""
        return all(self.done[worker] > step for worker in self.awaited())

    def floor(self, worker: int) -> int:
        """The number of steps that the slowest of the others has ended; of those that have come and are awaited."""
        return min((self.done[each] for each in self.awaited(but=worker) if self.is_here[each]), default=0)

    def lead(self, worker: int) -> int:
        """How many steps a worker is ahead of the slowest that is awaited; at the end of `fit`, and still trains."""
        others = set(self.awaited()) - (self.at_end if worker in self.at_end else set())
        return self.done[worker] - min((self.done[each] for each in others), default=self.done[worker])
