"""A fleet of local worker processes: started, read line by line, and ended together.

[Note: who is left behind] No process is: each worker leads its own session and is ended with its children. If the
launcher itself is killed outright, Linux kills the workers (`PR_SET_PDEATHSIG`), but not their children; macOS kills
nothing. A child that starts a session of its own is never chased.
"""

import codecs
import contextlib
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from tfzero.workers.progress import Bar, Task, cut_report, is_asked, make_room, progress, refresh, relay
from tfzero.workers.stopping import EXIT_WORKER_LOST

_POLL_SECONDS = 0.02  # how late an exit may be noticed
_GRACE_SECONDS = 1.0  # between SIGTERM, which TensorFlow's workers ignore, and SIGKILL
_LEAVE_SECONDS = 3.0  # for a worker to exit after all results are in
_NOTICE_SECONDS = 3.0  # for the others to notice a lost worker too
_KEPT_LINES = 400  # of each worker's output, for reports

# Ties the process to its launcher (PR_SET_PDEATHSIG = 1, SIGKILL = 9), then becomes the worker.
_TIE_TO_LAUNCHER = (
    "import sys; sys.path[:1] = []; import ctypes, os; ctypes.CDLL(None).prctl(1, ctypes.c_ulong(9))\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"
)


class LineSplitter:
    r"""Cuts a stream of bytes into lines, ended by \n, \r\n or \r.

    So each update of a progress bar becomes a line of its own, because its \r would overwrite our prefix. No text is
    lost. Only pieces without text are dropped: the empty start of a bar, and backspaces around it. Progress reports are
    put aside: they are not text either. [Note: one bar] in `workers/progress.py`.
    """

    def __init__(self, *, has_reports: bool = True) -> None:
        self._has_reports = has_reports
        self.reports: list[Task | None] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[str] = []  # pieces of the line that has not ended
        self._after_return = False

    def feed(self, chunk: bytes, final: bool = False) -> list[str]:
        text = self._decoder.decode(chunk, final)
        if self._after_return:  # the \n of an \r\n that came in two pieces
            text = text.removeprefix("\n")
        self._after_return = text.endswith("\r")
        *parts, rest = re.split(r"(\r\n|\r|\n)", text)  # only what is new: a line may be long
        ended = [self._end_line(part, end) for part, end in zip(parts[::2], parts[1::2], strict=True)]
        self._pending += [rest] if rest else []
        if final and self._pending:
            ended.append(self._end_line("", ""))
        return [line for line in ended if line is not None]

    def _end_line(self, part: str, end: str) -> str | None:
        """The line that ends with this part, as shown; None if it is not shown or not complete."""
        line = "".join([*self._pending, part])
        self._pending = []
        cut = cut_report(line) if self._has_reports and end == "\n" else None
        if cut is not None:
            before, report = cut
            self.reports.append(report)
            self._pending = [before] if before else []
            return None
        line = line.strip("\b")
        return line if line or end not in ("\r", "") else None


class Worker:
    """One started process, the last lines of its output, and its exit code once it has ended."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], hold: bool) -> None:
        if sys.platform == "linux":
            command = [sys.executable, "-S", "-c", _TIE_TO_LAUNCHER, str(os.getpid()), *command]
        self.index = index
        self.exit_code: int | None = None
        self.exit_seconds = math.inf  # when the exit was noticed, by the monotonic clock
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.splitter = LineSplitter(has_reports=is_asked(environment))
        stdin = subprocess.PIPE if hold else subprocess.DEVNULL
        streams: dict[str, Any] = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            self.exit_notice: int | None = os.pidfd_open(self.process.pid)  # becomes readable at its exit
        except (AttributeError, OSError):  # only Linux 5.3 and later have it; elsewhere exits are polled for
            self.exit_notice = None

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def verdict(self, workers: int) -> str:
        ending = f"exit code {self.exit_code}"
        if self.exit_code < 0:
            guess = ", often: out of memory" if self.exit_code == -signal.SIGKILL else ""
            ending = f"signal {-self.exit_code} ({signal.strsignal(-self.exit_code)}{guess})"
        return f"worker {self.index} (of {workers}) failed first, with {ending}"

    def show(self, lines: list[str]) -> str:
        return "\n".join(f"[worker {self.index}] {line}" for line in lines or ["(no output)"])

    def last_traceback(self, otherwise_lines: int = 20) -> list[str]:
        lines = ["", *self.lines]
        starts = [at for at, line in enumerate(lines) if "Traceback (most recent call last):" in line]
        starts = [at for at in starts if not lines[at - 1].startswith("Exception ignored")]
        return lines[starts[-1] :] if starts else lines[1:][-otherwise_lines:]


class Fleet:
    """The workers of one run. Use it in `contextlib.closing`: then all have ended afterwards, whatever happens."""

    def __init__(self, *, echo: bool) -> None:
        self.workers: list[Worker] = []
        self._echo = echo
        self._selector = selectors.DefaultSelector()

    def start(self, commands: list[list[str]], environments: list[dict[str, str]], *, hold: bool = False) -> None:
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            worker = Worker(index, command, environment, hold)
            self.workers.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if worker.exit_notice is not None:
                self._selector.register(worker.exit_notice, selectors.EVENT_READ, worker)

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.exit_code is None]

    def wait(
        self, is_done: Callable[[Worker], bool], timeout_seconds: float | None
    ) -> tuple[Worker | None, list[Worker]]:
        """Waits until `is_done(worker)` for all workers.

        After a failure or the timeout it ends all workers. It returns the worker that failed first, if any, and the
        workers that are late.
        """
        with progress("running", len(self.workers), unit="workers have finished") as bar:
            return self._wait(is_done, timeout_seconds, bar)

    def _wait(
        self, is_done: Callable[[Worker], bool], timeout_seconds: float | None, bar: Bar
    ) -> tuple[Worker | None, list[Worker]]:
        deadline_seconds = time.monotonic() + (timeout_seconds or math.inf)
        while waiting := [worker for worker in self.workers if not is_done(worker)]:
            bar.reach(len(self.workers) - len(waiting))
            if time.monotonic() > deadline_seconds:
                self.close()
                return None, waiting
            failed = next((worker for worker in self._poll() if not is_done(worker)), None)  # with any exit code
            if failed:
                if failed.exit_code == EXIT_WORKER_LOST:
                    self._poll_for(_NOTICE_SECONDS)
                self.close()
                return failed, []
        return None, []

    def culprit(self, failed: Worker, blamed: int | None) -> Worker:
        """The worker that went wrong first: not one that only noticed a loss, but the worker that it blamed."""
        if blamed is not None:
            return self.workers[blamed]
        if failed.exit_code != EXIT_WORKER_LOST:
            return failed
        return next((worker for worker in self.workers if worker.exit_code not in (0, EXIT_WORKER_LOST)), failed)

    def let_go(self) -> None:
        """Tells the held workers to leave, and gives them a few seconds."""
        for worker in self.running:
            with contextlib.suppress(OSError):
                worker.process.stdin.write(b"\n")
        self._poll_for(_LEAVE_SECONDS)

    def close(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Ends all workers and their children, by SIGTERM and after a grace period by SIGKILL. May be called again."""
        try:
            for worker in self.running:
                worker.signal_group(signal.SIGTERM)
            self._poll_for(grace_seconds)
        finally:
            for worker in self.running:
                worker.signal_group(signal.SIGKILL)
            for worker in self.running:
                self._finish(worker)
            self._selector.close()

    def _poll_for(self, seconds: float) -> None:
        stop_seconds = time.monotonic() + seconds
        while self.running and time.monotonic() < stop_seconds:
            self._poll()

    def _poll(self) -> list[Worker]:
        """Passes on output for a moment. Returns the workers that ended, in the order of their exits."""
        refresh()
        for key, _ in self._selector.select(_POLL_SECONDS):  # in the order in which they became ready
            if key.fd == key.data.exit_notice:
                key.data.exit_seconds = time.monotonic()
            else:
                self._pass_on(key.data)
        ended = [worker for worker in self.running if worker.process.poll() is not None]
        for worker in ended:
            self._finish(worker)
        return sorted(ended, key=lambda worker: worker.exit_seconds)

    def _pass_on(self, worker: Worker) -> bool:
        """Takes one piece of a worker's output. Returns False if there is none, for now or for good."""
        chunk = worker.process.stdout.read(65536)
        if chunk:
            self._keep(worker, worker.splitter.feed(chunk))
        elif chunk is not None:
            self._forget(worker.process.stdout)
        return bool(chunk)

    def _finish(self, worker: Worker) -> None:
        """Takes the exit code and last output of an ended worker, and ends the children that it left."""
        if worker.exit_notice is not None:
            self._forget(worker.exit_notice)
            os.close(worker.exit_notice)
        with worker.process:  # closes its pipes
            worker.exit_code = worker.process.wait()
            worker.signal_group(signal.SIGKILL)
            while self._pass_on(worker):
                pass
            self._forget(worker.process.stdout)
            self._keep(worker, worker.splitter.feed(b"", final=True))

    def _forget(self, source: IO[bytes] | int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def _keep(self, worker: Worker, lines: list[str]) -> None:
        worker.lines.extend(lines)
        while worker.splitter.reports:
            relay(worker.splitter.reports.pop(0))
        if self._echo and lines:
            make_room()
            try:
                print(worker.show(lines), flush=True)
            except OSError:  # nobody reads our output any more: end, without trying again
                self._echo = False
                raise
