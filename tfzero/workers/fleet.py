"""A fleet of local processes, workers and perhaps parameter servers: started, read line by line, ended together.

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
from collections.abc import Callable, Sequence
from typing import IO, Any

from tfzero.workers.progress import Bar, Task, cut_report, is_asked, make_room, progress, refresh, relay
from tfzero.workers.stopping import EXIT_WORKER_LOST

_POLL_SECONDS = 0.02  # how late an exit may be noticed
_GRACE_SECONDS = 1.0  # between SIGTERM, which TensorFlow's workers ignore, and SIGKILL
_LEAVE_SECONDS = 3.0  # for a worker to exit after all results are in, and for a server after all workers
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


class Member:
    """One started process of a fleet, the last lines of its output, and its exit code once it has ended.

    Args:
        index: its number among the workers, or among the servers.
        command: what it runs.
        environment: all its variables.
        hold: whether its stdin is a pipe from us.
        is_server: whether it is a parameter server.
    """

    def __init__(self, index: int, command: list[str], environment: dict[str, str], *, hold: bool = False,
                 is_server: bool = False) -> None:  # fmt: skip
        if sys.platform == "linux":
            command = [sys.executable, "-S", "-c", _TIE_TO_LAUNCHER, str(os.getpid()), *command]
        self.index, self.is_server = index, is_server
        self.exit_code: int | None = None
        self.start_seconds = time.monotonic()
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

    @property
    def name(self) -> str:
        return f"{'server' if self.is_server else 'worker'} {self.index}"

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        guess = ", often: out of memory" if self.exit_code == -signal.SIGKILL else ""
        return f"signal {-self.exit_code} ({signal.strsignal(-self.exit_code)}{guess})"

    @property
    def shell_code(self) -> int:
        """Its exit code as a shell tells it."""
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    def show(self, lines: list[str]) -> str:
        return "\n".join(f"[{self.name}] {line}" for line in lines or ["(no output)"])

    def last_traceback(self, otherwise_lines: int = 20) -> list[str]:
        lines = ["", *self.lines]
        starts = [at for at, line in enumerate(lines) if "Traceback (most recent call last):" in line]
        starts = [at for at in starts if not lines[at - 1].startswith("Exception ignored")]
        return lines[starts[-1] :] if starts else lines[1:][-otherwise_lines:]


def lateness(late: Sequence[Member], timeout_seconds: float) -> str:
    """Who is late, in words."""
    numbers = ", ".join(str(worker.index) for worker in late)
    return f"still running after {timeout_seconds:g} seconds: worker {numbers}; all have ended now"


def first_of(failed: Sequence[Member]) -> Member | None:
    """Of members that failed the first, because of which all must end."""
    return next(iter(failed), None)


def running(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.exit_code is None]


class Fleet:
    """The processes of one run. Use it in `contextlib.closing`: then all have ended afterwards, whatever happens."""

    def __init__(self, *, echo: bool) -> None:
        self.workers: list[Member] = []
        self.servers: list[Member] = []
        self._echo = echo
        self._selector = selectors.DefaultSelector()

    def start(self, commands: list[list[str]], environments: list[dict[str, str]], *, hold: bool = False) -> None:
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            self.workers.append(Member(index, command, environment, hold=hold))
            self._listen_to(self.workers[-1])

    def start_servers(self, command: list[str], environments: list[dict[str, str]]) -> None:
        for index, environment in enumerate(environments):
            self.servers.append(Member(index, command, environment, is_server=True))
            self._listen_to(self.servers[-1])

    def replace(self, worker: Member, command: list[str], environment: dict[str, str]) -> None:
        """Starts another worker in the place of one that has ended."""
        self.workers[worker.index] = Member(worker.index, command, environment)
        self._listen_to(self.workers[worker.index])

    @property
    def members(self) -> list[Member]:
        return [*self.workers, *self.servers]

    @property
    def running(self) -> list[Member]:
        return running(self.members)

    def verdict(self, failed: Member) -> str:
        count = len(self.servers if failed.is_server else self.workers)
        return f"{failed.name} (of {count}) failed first, with {failed.ending}"

    def wait(
        self,
        is_done: Callable[[Member], bool],
        timeout_seconds: float | None,
        heal: Callable[[list[Member]], Member | None] = first_of,
    ) -> tuple[Member | None, list[Member]]:
        """Waits until `is_done(worker)` for all workers.

        After a failure or the timeout it ends all. It returns the member that failed first, if any, and the workers
        that are late.

        Args:
            is_done: whether a worker needs nothing more, and whether the end of a server is no failure.
            timeout_seconds: how long to wait.
            heal: is called again and again with the members that failed meanwhile. It returns the one because of which
                all must end, or None if the others go on.
        """
        with progress("running", len(self.workers), unit="workers have finished") as bar:
            return self._wait(is_done, timeout_seconds, heal, bar)

    def _wait(
        self,
        is_done: Callable[[Member], bool],
        timeout_seconds: float | None,
        heal: Callable[[list[Member]], Member | None],
        bar: Bar,
    ) -> tuple[Member | None, list[Member]]:
        deadline_seconds = time.monotonic() + (timeout_seconds or math.inf)
        ended: list[Member] = []
        while waiting := [worker for worker in self.workers if not is_done(worker)]:
            bar.reach(len(self.workers) - len(waiting))
            failed = heal([member for member in ended if not is_done(member)])  # with any exit code
            if failed:
                if failed.exit_code == EXIT_WORKER_LOST:
                    self._poll_for(_NOTICE_SECONDS, self.workers)
                self.close()
                return failed, []
            if time.monotonic() > deadline_seconds:
                self.close()
                return None, waiting
            ended = self._poll()
        return None, []

    def culprit(self, failed: Member, blamed: int | None) -> Member:
        """The worker that went wrong first: not one that only noticed a loss, but the worker that it blamed."""
        if blamed is not None:
            return self.workers[blamed]
        if failed.exit_code != EXIT_WORKER_LOST:
            return failed
        return next((worker for worker in self.workers if worker.exit_code not in (0, EXIT_WORKER_LOST)), failed)

    def let_go(self) -> None:
        """Tells the held workers to leave, and gives all a few seconds."""
        for worker in running(self.workers):
            with contextlib.suppress(OSError):
                worker.process.stdin.write(b"\n")
        self._poll_for(_LEAVE_SECONDS, self.members)

    def let_servers_leave(self) -> None:
        """Gives the servers a few seconds to notice that their workers have left."""
        self._poll_for(_LEAVE_SECONDS, self.servers)

    def close(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Ends all workers and their children, by SIGTERM and after a grace period by SIGKILL. May be called again.

        Then it ends the servers: workers may need them to save.
        """
        try:
            self._end(self.workers, grace_seconds)
        finally:
            self._end(self.servers, _GRACE_SECONDS)
        self._selector.close()

    def _end(self, members: list[Member], grace_seconds: float) -> None:
        try:
            for member in running(members):
                member.signal_group(signal.SIGTERM)
            self._poll_for(grace_seconds, members)
        finally:
            for member in running(members):
                member.signal_group(signal.SIGKILL)
            for member in running(members):
                self._finish(member)

    def _listen_to(self, member: Member) -> None:
        self._selector.register(member.process.stdout, selectors.EVENT_READ, member)
        if member.exit_notice is not None:
            self._selector.register(member.exit_notice, selectors.EVENT_READ, member)

    def _poll_for(self, seconds: float, awaited: list[Member]) -> None:
        """Passes on output until these have ended, but not longer than so many seconds."""
        stop_seconds = time.monotonic() + seconds
        while running(awaited) and time.monotonic() < stop_seconds:
            self._poll()

    def _poll(self) -> list[Member]:
        """Passes on output for a moment. Returns the members that ended, in the order of their exits."""
        refresh()
        for key, _ in self._selector.select(_POLL_SECONDS):  # in the order in which they became ready
            if key.fd == key.data.exit_notice:
                key.data.exit_seconds = time.monotonic()
            else:
                self._pass_on(key.data)
        ended = [member for member in self.running if member.process.poll() is not None]
        for member in ended:
            self._finish(member)
        return sorted(ended, key=lambda member: member.exit_seconds)

    def _pass_on(self, member: Member) -> bool:
        """Takes one piece of a member's output. Returns False if there is none, for now or for good."""
        chunk = member.process.stdout.read(65536)
        if chunk:
            self._keep(member, member.splitter.feed(chunk))
        elif chunk is not None:
            self._forget(member.process.stdout)
        return bool(chunk)

    def _finish(self, member: Member) -> None:
        """Takes the exit code and last output of an ended member, and ends the children that it left."""
        if member.exit_notice is not None:
            self._forget(member.exit_notice)
            os.close(member.exit_notice)
        with member.process:  # closes its pipes
            member.exit_code = member.process.wait()
            member.signal_group(signal.SIGKILL)
            while self._pass_on(member):
                pass
            self._forget(member.process.stdout)
            self._keep(member, member.splitter.feed(b"", final=True))

    def _forget(self, source: IO[bytes] | int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def _keep(self, member: Member, lines: list[str]) -> None:
        member.lines.extend(lines)
        while member.splitter.reports:
            relay(member.splitter.reports.pop(0))
        if self._echo and lines:
            make_room()
            try:
                print(member.show(lines), flush=True)
            except OSError:  # nobody reads our output any more: end, without trying again
                self._echo = False
                raise
