"""Notices workers that are lost or stuck, and ends the collectives that would wait for them for ever.

[Note: pulse] TensorFlow's own timeout starts a thread for each collective, and the thread sleeps until the time is
over. Instead each replica counts what it begins and what it ends (`Group.counts`): an odd count is a collective in
flight. Every second the workers exchange their counts over a control channel of their own. A worker that does not
answer is lost or stopped; one whose counts lag behind is elsewhere in its program.

A worker that ends with an error because of that exits with a code of its own, and at once: leaving TensorFlow in good
order takes the others.
"""

import atexit
import os
import re
import sys
import threading
import weakref
from collections.abc import Sequence
from time import monotonic

import tensorflow as tf

from tfzero import _compat
from tfzero.cluster import Channel, Cluster
from tfzero.collectives import Group
from tfzero.links import Links
from tfzero.stopping import EXIT_WORKER_LOST, AgreedStop

_INTERVAL_SECONDS = 1.0
# When a worker is lost, for a collective that has all it needs to end by itself.
_GRACE_SECONDS = 2.0
# After so much of the timeout a worker that does not answer counts as lost, so that all know in time.
_PATIENCE = 0.8
# As which TensorFlow reports that another worker is gone; it may notice before the pulse does.
_LOSSES = (
    tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError,
    ConnectionError, TimeoutError,
)  # fmt: skip
_TASK = re.compile(r"/job:(\w+)/replica:0/task:(\d+)")


class _Watched:
    """A group's counts, also when it has been dropped with its strategy: then they stay what they were, and even."""

    def __init__(self, group: Group) -> None:
        self._group = weakref.ref(group)
        self._counts = group.lanes.counts()

    def counts(self) -> list[int]:
        group = self._group()
        self._counts = [count + count % 2 for count in self._counts] if group is None else group.lanes.counts()
        return self._counts

    def places(self) -> list[str]:
        """What its collectives in flight are for."""
        group = self._group()
        if group is None:
            return []
        return [group.lanes.describe(place) for place, count in enumerate(group.lanes.counts()) if count % 2]


class Pulse:
    """Watches the collectives of this process in a thread, for the life of the process.

    Args:
        cluster: the workers.
        channel: a control channel that nothing else uses.
        timeout_seconds: how long a collective may take, and a worker may not answer.
        links: what collectives may wait for beside TensorFlow's own.
    """

    def __init__(self, cluster: Cluster, channel: Channel, timeout_seconds: float, links: Sequence[Links]) -> None:
        self._cluster = cluster
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._links = links
        self._groups: list[_Watched] = []
        self._since: list[tuple[int, float]] = []  # each count and when it came to it
        self._lock = threading.Lock()  # held while the thread is in TensorFlow
        self._stopped = threading.Event()
        self.stop_together = AgreedStop(timeout_seconds)
        self._reason = ""  # why the watch has ended
        self._has_reason = threading.Event()
        atexit.register(self.stop)
        sys.excepthook = self._exit_hook(sys.excepthook)
        threading.Thread(target=self._watch, name="tfzero pulse", daemon=True).start()

    def add(self, group: Group) -> None:
        """Watches one more group while its strategy lives; all workers add the same ones in the same order."""
        self._groups.append(_Watched(group))

    def stop(self) -> None:
        """Ends the watch; the other workers take it for the end of this one."""
        with self._lock:
            self._stopped.set()
        self._channel.close()

    def _watch(self) -> None:
        reason = ""
        counts_of_all: list[list[int]] = []
        while not self._stopped.wait(_INTERVAL_SECONDS):
            with self._lock:
                if self._stopped.is_set():
                    return
                counts = [count for watched in self._groups for count in watched.counts()]
            if not reason:
                try:
                    beat = [counts, self.stop_together.tell()]
                    beats = self._channel.all_gather("the pulse", beat, _PATIENCE * self._timeout_seconds)
                    counts_of_all = [counts for counts, _ in beats]
                    self.stop_together.hear([told for _, told in beats])
                except (OSError, RuntimeError, ValueError) as error:
                    reason = self._note(str(error))
            stuck = self._stuck_lanes(counts, _GRACE_SECONDS if reason else self._timeout_seconds)
            if stuck:
                reason = self._note(reason or self._describe(counts_of_all, stuck))
                self._abort(f"{reason} {self._where()}")
                return

    def _note(self, reason: str) -> str:
        self._reason = reason
        self._has_reason.set()
        return reason

    def _where(self) -> str:
        """What this worker waits for; a collective that was aborted stays in flight."""
        places = [place for watched in self._groups for place in watched.places()]
        return f"{self._cluster.name} was {' and '.join(dict.fromkeys(places))}." if places else ""

    def _exit_hook(self, former):
        """What to do with an error that ends the process, after `former` has shown it."""

        def show_and_exit(kind, error, trace):
            former(kind, error, trace)
            if not isinstance(error, _LOSSES) and not any(links.is_lost for links in self._links):
                return
            lost = self._reason if self._has_reason.wait(self._timeout_seconds) else self._named_in(str(error))
            if lost:
                text = f"tfzero: {self._cluster.name} exits with code {EXIT_WORKER_LOST}: {lost} {self._where()}"
                print(text, file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_WORKER_LOST)

        return show_and_exit

    def _named_in(self, text: str) -> str:
        """What TensorFlow says of another worker, by our name for it."""
        names = {f"{job} {index}" for job, index in _TASK.findall(text)} - {self._cluster.name}
        lost = [name for name in self._cluster.names if name in names]
        return f"{', '.join(lost)} was lost, as TensorFlow noticed." if lost else ""

    def _stuck_lanes(self, counts: list[int], limit_seconds: float) -> list[int]:
        """Places of the counts that have been odd, and the same, for too long."""
        now = monotonic()
        for place, count in enumerate(counts):
            if place == len(self._since):
                self._since.append((count, now))
            elif self._since[place][0] != count:
                self._since[place] = (count, now)
        return [k for k, (count, since) in enumerate(self._since) if count % 2 and now - since >= limit_seconds]

    def _describe(self, counts_of_all: list[list[int]], stuck: list[int]) -> str:
        mine = counts_of_all[self._cluster.index]
        behind = [
            index
            for index, theirs in enumerate(counts_of_all)
            if any(place >= len(theirs) or theirs[place] < mine[place] for place in stuck)
        ]
        where = f"{self._cluster.name} has waited in a collective for {self._timeout_seconds:g} s."
        if not behind:
            return f"{where} All workers wait, but not for the same: run the same program on every worker."
        return (
            f"{where} {self._cluster.describe(*behind)} did not arrive there. "
            "Look there whether it is stuck or elsewhere in the program, or give a longer timeout."
        )

    def _abort(self, reason: str) -> None:
        for links in self._links:
            links.close(reason)
        with self._lock:
            if not self._stopped.is_set():
                _compat.abort_collectives(reason)
