"""Stops all workers after the same step.

[Note: stop together] A worker that is told to stop cannot just do so. It cannot ask the others at the end of its step
either: they may already wait for it in the next one. So it tells them through the heartbeat (`collectives/pulse.py`),
which goes on meanwhile. A worker that hears of it begins no further step until the next beat, when all say how many
steps they have begun. The largest of these numbers is the last step for all.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

# Exit codes of a worker that saved and ended because of SIGTERM (EX_TEMPFAIL: try again), and of one that ended because
# another worker was lost or did not arrive (EX_PROTOCOL).
EXIT_STOPPED = 75
EXIT_WORKER_LOST = 76

_Error = TypeVar("_Error", bound=BaseException)

# [Note: blame] An error that other workers cause is marked with their indexes. A worker that ends because of it writes
# them into a file that its launcher has named. So the launcher knows which worker did not come.
BLAME_VARIABLE = "TFZERO_BLAME"


def let_children_end() -> None:
    """Lets SIGTERM end the forked children of this process, such as those of a `PyDataset`, like other processes.

    They inherit the handler of a training process, which saves at the next step, and a child never comes to one. A
    user's own handler stays.
    """
    global _children_end
    if not _children_end and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_take_sigterm_back)
        _children_end = True


def _take_sigterm_back() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    is_ours = str(getattr(handler, "__module__", "")).partition(".")[0] == "tfzero"
    if handler is None or handler is signal.SIG_DFL or is_ours:  # None: not set by Python
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_children_end = False
_farewells: list[Callable[[], object]] = []


def at_farewell(function: Callable[[], object]) -> None:
    """Has a function called when this process ends well, also where it ends without Python's `atexit`."""
    if not _farewells:
        atexit.register(_take_leave_at_exit)
    _farewells.append(function)


def take_leave() -> None:
    """Calls what `at_farewell` was given, once."""
    while _farewells:
        _farewells.pop()()


def _take_leave_at_exit() -> None:
    # After an error that nobody has caught the process has not ended well (`last_value`: before Python 3.12).
    if getattr(sys, "last_exc", None) is None and getattr(sys, "last_value", None) is None:
        take_leave()


def blaming(error: _Error, indexes: Iterable[int]) -> _Error:
    """Marks an error as caused by other workers; without indexes if nobody knows by which. Returns the error."""
    error.blamed_workers = tuple(indexes)  # type: ignore[attr-defined]
    return error


def blamed_by(error: BaseException | None) -> tuple[int, ...] | None:
    """The workers that caused an error, or one that it was raised from; None if other workers did not cause it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        blamed = getattr(error, "blamed_workers", None)
        if blamed is not None:
            return tuple(blamed)
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def note_blame(indexes: Iterable[int]) -> None:
    """Tells the launcher, if there is one, which workers made this one end. [Note: blame]"""
    if path := os.environ.get(BLAME_VARIABLE):
        with contextlib.suppress(OSError):  # the launcher has gone
            Path(path).write_text(json.dumps(list(indexes)))


def read_blame(path: Path, workers: int) -> int | None:
    """The first worker that is blamed in this file; None if there is none, or no valid index of `workers` workers."""
    try:
        blamed = json.loads(path.read_bytes()[:65536])
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(blamed, list) and blamed and type(blamed[0]) is int and 0 <= blamed[0] < workers
    return blamed[0] if known else None


class AgreedStop:
    """Decides whether the training of this process stops, and after which step. [Note: stop together]

    Args:
        timeout_seconds: how long to wait for the others' answer; None if there are no others.
    """

    def __init__(self, timeout_seconds: float | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self._condition = threading.Condition()
        self._requested = False
        self._heard = False
        self._begun = 0
        self._last: int | None = None

    def request(self) -> None:
        """Asks all workers to stop soon. May be called from a signal handler."""
        self._requested = True

    @property
    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._requested

    def begin_step(self) -> bool:
        """Whether the next step may begin. It is True equally often on all workers.

        Raises:
            TimeoutError: if the others do not answer.
        """
        with self._condition:
            if self._requested and self.timeout_seconds is None:
                self._last = self._begun
            if not self._condition.wait_for(lambda: not self._heard or self._last is not None, self.timeout_seconds):
                text = f"The other workers did not say within {self.timeout_seconds:g} s when to stop."
                raise blaming(TimeoutError(text), [])
            may_begin = self._last is None or self._begun < self._last
            self._begun += may_begin
            return may_begin

    def tell(self) -> list[bool | int]:
        """The message of this worker to the others, as JSON."""
        with self._condition:
            return [self._requested, self._heard, self._begun]

    def hear(self, told: list[list[bool | int]]) -> None:
        """Takes the messages of all workers, this one included."""
        with self._condition:
            if all(heard for _, heard, _ in told):
                self._last = max(begun for _, _, begun in told)
                self._condition.notify_all()
            self._heard |= any(requested for requested, _, _ in told)
