"""Notices workers that are lost or stuck, and ends the collectives that would wait for them for ever.

[Note: pulse] TensorFlow's own timeout starts a thread for each collective, and the thread sleeps until the time is
over. Instead each replica counts the collectives that it begins and ends (`Lanes.counts`): an odd count is a collective
in flight. Every second the workers exchange their counts, as a heartbeat, over a control channel of their own. A worker
that does not answer is lost or stopped; a worker whose counts lag behind is elsewhere in its program.

A worker that ends with an error because of another one exits at once, with a code of its own: leaving TensorFlow in
good order would take the others with it.
"""

import atexit
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any

import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.collectives.transport import Connection
from tfzero.host import runtime
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.stopping import EXIT_WORKER_LOST, AgreedStop, blamed_by, note_blame

_INTERVAL_SECONDS = 1.0
# When a worker is lost, collectives that have everything they need get this long to end by themselves.
_GRACE_SECONDS = 2.0
# The pulse's message when nobody is behind the others.
NOT_FOR_THE_SAME = "All workers wait, but not for the same"
# A worker that does not answer for this fraction of the timeout counts as lost, so that all know in time.
_PATIENCE = 0.8
# How TensorFlow reports that another worker is gone; it may notice before the pulse does. tfzero marks the errors that
# it raises itself in this case. [Note: blame] in `workers/stopping.py`
_LOSSES = (
    tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError
)  # fmt: skip
_TASK = re.compile(r"/job:(\w+)/replica:0/task:(\d+)")


class _Watched:
    """A group's counts. After the group is dropped with its strategy, they stay as they were, rounded up to even."""

    def __init__(self, group: Group) -> None:
        self._group = weakref.ref(group)
        self._counts = group.lanes.counts()

    def counts(self) -> list[int]:
        group = self._group()
        self._counts = [count + count % 2 for count in self._counts] if group is None else group.lanes.counts()
        return self._counts

    def traced(self) -> dict[str, int]:
        """How often this worker has traced functions with its collectives, by name. [Note: keys]"""
        group = self._group()
        return {} if group is None else dict(group.keys.traced)

    def places(self) -> list[str]:
        """Purposes of its collectives in flight."""
        group = self._group()
        if group is None:
            return []
        return [group.lanes.describe(place) for place, count in enumerate(group.lanes.counts()) if count % 2]


class Pulse:
    """Watches the collectives of this process in a thread, for the life of the process.

    Args:
        cluster: the workers.
        channel: a control channel that nothing else uses.
        timeout_seconds: the longest that a collective may take, and that a worker may not answer.
        connections: connections that collectives may wait for beside TensorFlow's own.
    """

    def __init__(
        self, cluster: Cluster, channel: Channel, timeout_seconds: float, connections: Sequence[Connection]
    ) -> None:
        self._cluster = cluster
        self._channel = channel
        self._connections = connections
        self._groups: list[_Watched] = []
        self._since: list[tuple[int, float]] = []  # each count and when it reached that value
        self._lock = threading.Lock()  # held while the thread is in TensorFlow
        self._stopped = threading.Event()
        self.stop_together = AgreedStop(timeout_seconds)
        self._reason = ""  # why the watch has ended
        self._blamed: tuple[int, ...] = ()  # the workers that caused it
        self._has_reason = threading.Event()
        self._process = os.getpid()
        self.programs_differ = False  # collectives were at odds, and no worker is lost
        atexit.register(self.stop)
        sys.excepthook = self._exit_hook(sys.excepthook)
        threading.Thread(target=self._watch, name="tfzero pulse", daemon=True).start()

    @property
    def timeout_seconds(self) -> float:
        """The longest that a collective may take, and that a worker may not answer."""
        return self.stop_together.timeout_seconds

    @timeout_seconds.setter
    def timeout_seconds(self, seconds: float) -> None:
        self.stop_together.timeout_seconds = seconds

    def add(self, group: Group) -> None:
        """Watches one more group while its strategy lives. All workers add the same groups in the same order."""
        self._groups.append(_Watched(group))

    def hear_of_loss(self, error: Exception) -> None:
        """Takes over the reason for which another channel has ended: this process then ends for that reason."""
        if not self._has_reason.is_set():
            self._note(str(error), blamed_by(error) or ())

    def stop(self) -> None:
        """Ends the watch. To the other workers this looks like the end of this process."""
        if os.getpid() != self._process:  # a forked child does not have the thread
            return
        with self._lock:
            self._stopped.set()
        self._channel.close()

    def _watch(self) -> None:
        reason = ""
        beats: list[_Beat] = []
        while not self._stopped.wait(_INTERVAL_SECONDS):
            with self._lock:
                if self._stopped.is_set():
                    return
                counts = [count for watched in self._groups for count in watched.counts()]
                where = self._where()
            if not reason:
                try:
                    beats = self._exchange(counts, where)
                except (OSError, RuntimeError, ValueError) as error:
                    reason = self._note(str(error), blamed_by(error) or ())
            at_odds = next((beat.at_odds for beat in beats if beat.at_odds), "")
            stuck = self._stuck_lanes(counts, _GRACE_SECONDS if reason else self.timeout_seconds)
            if at_odds and not reason:
                places = " ".join(beat.where for beat in beats if beat.where)
                self.programs_differ = True
                self._abort(self._note(" ".join(filter(None, (at_odds, self._traced_alone(beats), places))), ()))
                return
            if stuck:
                reason = self._note(reason or self._describe(beats, stuck), self._blamed or self._behind(beats, stuck))
                self._abort(f"{reason} {self._where()}")
                return

    def _exchange(self, counts: list[int], where: str) -> list["_Beat"]:
        """The beats of all workers, in rank order."""
        at_odds = next((each.at_odds for each in self._connections if each.at_odds), "")
        beat = [counts, self.stop_together.tell(), at_odds, where, [watched.traced() for watched in self._groups]]
        told = self._channel.all_gather("the pulse", beat, _PATIENCE * self.timeout_seconds)
        beats = [_Beat.read(each, name) for each, name in zip(told, self._cluster.names, strict=True)]
        self.stop_together.hear([beat.stopping for beat in beats])
        return beats

    def _note(self, reason: str, blamed: Sequence[int]) -> str:
        self._reason, self._blamed = reason, tuple(blamed)
        self._has_reason.set()
        return reason

    def _where(self) -> str:
        """What this worker waits for. A collective that was aborted stays in flight."""
        places = [place for watched in self._groups for place in watched.places()]
        return f"{self._cluster.name} was {' and '.join(dict.fromkeys(places))}." if places else ""

    def _exit_hook(self, former: Callable[..., Any]) -> Callable[..., None]:
        """An exception hook for errors that end the process; it first lets `former` show the error."""

        def show_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            former(kind, error, trace)
            lost, blamed = self._others_in(error) if os.getpid() == self._process else ("", ())
            if lost:
                text = f"tfzero: {self._cluster.name} exits with code {EXIT_WORKER_LOST}: {lost} {self._where()}"
                print(text, file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                note_blame(blamed)
                os._exit(EXIT_WORKER_LOST)

        return show_and_exit

    def _others_in(self, error: BaseException) -> tuple[str, tuple[int, ...]]:
        """If other workers are why this one ends: a text about them and their ranks; else "" and ()."""
        if self.programs_differ:
            return "", ()
        blamed = blamed_by(error)
        if blamed is not None:
            return self._reason or str(error), self._blamed or blamed
        if not isinstance(error, _LOSSES) and not any(each.is_lost for each in self._connections):
            return "", ()
        # TensorFlow also raises such errors for other reasons, such as files. The pulse also knows of losses that no
        # collective waits for.
        if self._has_reason.wait(self.timeout_seconds if self._where() else 2 * _INTERVAL_SECONDS + _GRACE_SECONDS):
            return self._reason, self._blamed
        return self._named_in(str(error))

    def _named_in(self, text: str) -> tuple[str, tuple[int, ...]]:
        """A text about the workers in TensorFlow's message, by their names in tfzero, and their ranks."""
        named = {(job, int(index)) for job, index in _TASK.findall(text)} - {self._cluster.tasks[self._cluster.index]}
        lost = [index for index, task in enumerate(self._cluster.tasks) if task in named]
        text = ", ".join(self._cluster.names[index] for index in lost)
        return (f"{text} was lost, as TensorFlow noticed." if lost else ""), tuple(lost)

    def _stuck_lanes(self, counts: list[int], limit_seconds: float) -> list[int]:
        """Places of the counts that have been odd and unchanged for too long."""
        now = monotonic()
        for place, count in enumerate(counts):
            if place == len(self._since):
                self._since.append((count, now))
            elif self._since[place][0] != count:
                self._since[place] = (count, now)
        return [k for k, (count, since) in enumerate(self._since) if count % 2 and now - since >= limit_seconds]

    def _behind(self, beats: list["_Beat"], stuck: list[int]) -> list[int]:
        """The workers that have not reached the collective in which this one is stuck."""
        mine = beats[self._cluster.index].counts if beats else []
        told = [place for place in stuck if place < len(mine)]
        return [
            index
            for index, beat in enumerate(beats)
            if any(place >= len(beat.counts) or beat.counts[place] < mine[place] for place in told)
        ]

    def _describe(self, beats: list["_Beat"], stuck: list[int]) -> str:
        behind = self._behind(beats, stuck)
        where = f"{self._cluster.name} has waited in a collective for {self.timeout_seconds:g} s."
        if not behind:
            what = f"{NOT_FOR_THE_SAME}: run the same program on every worker."
        else:
            what = (
                f"{self._cluster.describe(*behind)} did not arrive there. "
                "Look there whether it is stuck or elsewhere in the program, or give a longer timeout."
            )
        return " ".join(filter(None, (where, what, self._traced_alone(beats))))

    def _traced_alone(self, beats: list["_Beat"]) -> str:
        """Describes a function that one worker has traced more often than another; "" if there is none. [Note: keys]"""
        for told in zip(*(beat.traced for beat in beats), strict=False):
            for name in told[0]:
                counts = [traced.get(name, 0) for traced in told]
                if 0 < min(counts) < max(counts):
                    who = ", ".join(f"{n} on {w}" for n, w in zip(counts, self._cluster.names, strict=True))
                    return (
                        f"The function {name!r} was traced so often: {who}. Where one worker alone meets new shapes, "
                        "a function must exchange the same, in the same order, as before."
                    )
        return ""

    def _abort(self, reason: str) -> None:
        for connection in self._connections:
            connection.close(reason)
        with self._lock:
            if not self._stopped.is_set():
                runtime.abort_collectives(reason)


@dataclass(frozen=True)
class _Beat:
    """The heartbeat: what a worker tells every second."""

    counts: list[int]  # [Note: counts] in `collectives/counts.py`
    stopping: list[bool | int]  # `AgreedStop.tell`
    at_odds: str  # how another worker's collective differs from this worker's own
    where: str  # what it waits for
    traced: list[dict[str, int]]  # `_Watched.traced`, of each group

    @classmethod
    def read(cls, told: object, name: str) -> "_Beat":
        """Parses a worker's message; raises ValueError if it is no beat."""
        if isinstance(told, list) and [type(each) for each in told] == [list, list, str, str, list]:
            counts, stopping, at_odds, where, traced = told
            kinds = [type(each) for each in stopping]
            are_dicts = all(isinstance(each, dict) for each in traced)
            numbers = [*counts, *(number for each in traced for number in each.values())] if are_dicts else [None]
            if kinds == [bool, bool, int] and all(type(number) is int for number in numbers):
                return cls(counts, stopping, at_odds, where, traced)
        raise ValueError(f"{name} sent a beat that cannot be read: {str(told)[:200]}. Start all workers again.")
