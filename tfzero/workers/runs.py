"""What the command line runs on this machine: a fleet, started again after failures until one ends well.

[Note: who is started again] Workers that train with each other fail together. Then all are started again, and resume
from their checkpoint. With parameter servers a worker that fails is started again by itself, at its old address, and
the others go on meanwhile. When no restart is left, they go on without it. The servers hold what is trained: when one
of them fails, all are started again. A server that ends with exit code 0 has not failed: all its workers have taken
leave of it. But then nobody can take a failed worker's place, and all are started again.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tfzero.workers.fleet import Fleet, Member, first_of, lateness
from tfzero.workers.gpus import NO_GPU, VISIBLE_VARIABLE
from tfzero.workers.handshake import SECRET_VARIABLE, make_secret
from tfzero.workers.progress import REPORTS_VARIABLE, asking, make_room
from tfzero.workers.stopping import BLAME_VARIABLE, EXIT_STOPPED, EXIT_WORKER_LOST, read_blame

CPU_DEVICES_VARIABLE = "TFZERO_CPU_DEVICES"
RESTARTS_VARIABLE = "TFZERO_RESTARTS"  # how many restarts there were so far, for scripts that want to know
SERVE = [sys.executable, "-m", "tfzero.servers"]  # the command of a server
# A worker that is lost again within this time after a restart has not come back.
_COME_BACK_SECONDS = 60.0
# What fails within this time is started again after a pause. The pause doubles with each such failure in a row.
_AT_ONCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Holds `count` TCP ports of 127.0.0.1: meanwhile the system gives each only to a process that asks for that port.

    They are bound, but nobody listens. So servers with SO_REUSEADDR, such as those of workers and TensorFlow, may use
    them.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]


def environments_of_workers(
    ports: Sequence[int], env: dict[str, str], cpu_devices: int | None, gpus: list[dict[str, str]]
) -> list[dict[str, str]]:
    """The environment of each worker: ours, a secret, unbuffered output, `env`, its place and its GPUs.

    Only the leader is asked to report progress. Ports beyond the number of workers are those of servers.
    """
    shared = {"TF_CPP_MIN_LOG_LEVEL": "2", SECRET_VARIABLE: make_secret(), **os.environ, "PYTHONUNBUFFERED": "1", **env}
    if cpu_devices is not None:
        shared[CPU_DEVICES_VARIABLE] = str(cpu_devices)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    workers, servers = addresses[: len(gpus)], addresses[len(gpus) :]
    cluster = {"worker": workers, **({"ps": servers} if servers else {})}
    environments = [{**shared, **_place(cluster, "worker", index), **own} for index, own in enumerate(gpus)]
    environments[0] |= asking()
    return environments


def environments_of_servers(worker: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each server: that of a worker, in its own place, without GPUs and reports of progress."""
    shared = {name: value for name, value in worker.items() if name != REPORTS_VARIABLE}
    cluster = json.loads(worker["TF_CONFIG"])["cluster"]
    count = len(cluster.get("ps", []))
    return [{**shared, **_place(cluster, "ps", index), VISIBLE_VARIABLE: NO_GPU} for index in range(count)]


def _place(cluster: Mapping[str, list[str]], job: str, index: int) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": job, "index": index}})}


@dataclass(frozen=True)
class _Outcome:
    """How one fleet ended: whether all may be started again, and the worker to blame, if there is one."""

    exit_code: int = 0
    message: str = ""
    has_failed: bool = False
    lost: int | None = None
    seconds: float = 0.0


class _Restarts:
    """How many restarts a run has made, of those that it may make."""

    def __init__(self, most: int) -> None:
        self.made, self._most = 0, most

    @property
    def are_left(self) -> bool:
        return self.made < self._most

    def make(self) -> str:
        """Counts a restart; returns its number in words."""
        self.made += 1
        return f"restart {self.made} of {self._most}"


class _Pause:
    """The pause before a restart, which grows with failures at once."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def grow(self, ran_seconds: float) -> str:
        """Makes it that after a failure; returns it in words."""
        is_quick = ran_seconds < _AT_ONCE_SECONDS
        self.seconds = min(_LONGEST_PAUSE_SECONDS, 2 * self.seconds or _PAUSE_SECONDS) if is_quick else 0.0
        return f" in {self.seconds:g} s" if is_quick else ""


class _Replacing:
    """The workers of a fleet with servers, each replaced when it fails. [Note: who is started again]

    Args:
        fleet: the fleet.
        command: what each worker runs.
        environments: of each worker.
        restarts: of the whole run.
    """

    def __init__(
        self, fleet: Fleet, command: list[str], environments: list[dict[str, str]], restarts: _Restarts
    ) -> None:
        self._fleet, self._command, self._environments, self._restarts = fleet, command, environments, restarts
        self._pauses = [_Pause() for _ in environments]
        self._due_seconds: dict[int, float] = {}  # by worker, when another takes its place
        self.given_up: list[Member] = []  # in the order of their failures

    def is_done(self, member: Member) -> bool:
        return member.exit_code == 0 or member in self.given_up

    def heal(self, failed: list[Member]) -> Member | None:
        """Replaces workers that have failed, when it is time. Returns the member because of which all must end."""
        cause = self._find_cause(failed)
        if cause:
            self._restarts.made -= len(self._due_seconds)  # they were announced, and are not made
            return cause
        for worker in failed:
            self._take_note(worker)
        for index in [index for index, due_seconds in self._due_seconds.items() if time.monotonic() >= due_seconds]:
            del self._due_seconds[index]
            environment = {**self._environments[index], RESTARTS_VARIABLE: str(self._restarts.made)}
            self._fleet.replace(self._fleet.workers[index], self._command, environment)
        return None

    def _find_cause(self, failed: list[Member]) -> Member | None:
        """A server that has failed, or else a worker whose place nobody can take as its servers have ended."""
        server = next((member for member in failed if member.is_server), None)
        if server or not any(each.exit_code is not None for each in self._fleet.servers):
            return server
        waiting = [self._fleet.workers[index] for index in self._due_seconds]
        return first_of([*failed, *waiting]) if waiting or self._restarts.are_left else None

    def _take_note(self, worker: Member) -> None:
        """Says what becomes of a worker that has failed, and of the others."""
        others = any(each is not worker and not self.is_done(each) for each in self._fleet.workers)
        reason = f"{worker.name} (of {len(self._fleet.workers)}) failed, with {worker.ending}"
        if self._restarts.are_left:
            pause = self._pauses[worker.index]
            again = self._restarts.make() + pause.grow(time.monotonic() - worker.start_seconds)
            self._due_seconds[worker.index] = time.monotonic() + pause.seconds
            _say(f"{reason}; {again}{', and the others go on meanwhile' if others else ''}.")
        else:
            self.given_up.append(worker)
            if others:
                _say(f"{reason}, and no restart is left; the others go on without it.")


def run_fleets(options: argparse.Namespace, command: list[str]) -> int:
    """Runs fleet after fleet, until one ends well or no restart is left. Returns the last one's exit code.

    Args:
        options: as `workers/options.py` gives them.
        command: what each worker runs.
    """
    restarts, pause, former = _Restarts(options.max_restarts), _Pause(), _Outcome()
    gpus = options.gpus  # one for each worker that is left
    while True:
        outcome = _run_fleet(options, command, gpus, restarts)
        if outcome.message:
            _say(outcome.message)
        if not outcome.has_failed or not restarts.are_left:
            return outcome.exit_code
        again = restarts.make() + pause.grow(outcome.seconds)
        lost = outcome.lost if outcome.lost == former.lost and outcome.seconds < _COME_BACK_SECONDS else None
        if lost is not None and len(gpus) > options.min_workers:
            gpus = [*gpus[:lost], *gpus[lost + 1 :]]  # its GPUs may be the reason
            again = f"worker {lost} does not come back; {again}"
        servers = f" and {options.servers} servers" if options.servers else ""
        _say(f"{again}, with {len(gpus)} workers{servers}.")
        time.sleep(pause.seconds)
        former = outcome


def _run_fleet(
    options: argparse.Namespace, command: list[str], gpus: list[dict[str, str]], restarts: _Restarts
) -> _Outcome:
    fleet = Fleet(echo=True)
    with held_ports(len(gpus) + options.servers) as ports, tempfile.TemporaryDirectory(prefix="tfzero_") as folder:
        again = {RESTARTS_VARIABLE: str(restarts.made)}
        environments = environments_of_workers(ports, again, options.cpu_devices, gpus)
        servers = environments_of_servers(environments[0])
        for index, environment in enumerate(environments):
            environment[BLAME_VARIABLE] = os.path.join(folder, str(index))
        replacing = _Replacing(fleet, command, environments, restarts)
        start_seconds = time.monotonic()
        try:
            fleet.start_servers(SERVE, servers)
            fleet.start([command] * len(gpus), environments)
            heal = replacing.heal if servers else first_of
            failed, late = fleet.wait(replacing.is_done, options.timeout_seconds, heal)
            if not failed and not late and not replacing.given_up:
                fleet.let_servers_leave()
        except KeyboardInterrupt as stop:
            return _stopped(fleet, number_of(stop), options.grace_seconds)
        except BrokenPipeError:  # the reader of our output has left, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _Outcome(128 + signal.SIGPIPE)
        finally:
            fleet.close()
        if late:
            return _Outcome(124, f"timeout: {lateness(late, options.timeout_seconds)}.")
        if failed:
            return _failure(fleet, failed, Path(folder, str(failed.index)), time.monotonic() - start_seconds)
    return _without(replacing.given_up, len(gpus)) if replacing.given_up else _Outcome()


def _stopped(fleet: Fleet, number: signal.Signals, grace_seconds: float) -> _Outcome:
    """Ends a fleet because of a signal. Workers that have failed or ended before are not asked to save."""
    asked = [worker for worker in fleet.workers if worker.exit_code is None or not fleet.servers]
    if number == signal.SIGTERM:  # workers may save before they end
        fleet.close(grace_seconds)
    else:
        fleet.close()
    saved = {worker.exit_code for worker in asked} == {EXIT_STOPPED}
    message = f"received {number.name}; all workers have {'saved and ' * saved}ended."
    return _Outcome(EXIT_STOPPED if saved else 128 + number, message)


def _failure(fleet: Fleet, failed: Member, blame: Path, seconds: float) -> _Outcome:
    """All have ended because of one. `blame` is the file of a worker's."""
    is_loss = failed.exit_code == EXIT_WORKER_LOST and not fleet.servers
    blamed = read_blame(blame, len(fleet.workers)) if is_loss else None
    verdict = fleet.verdict(failed) + ("" if blamed is None else f", because of worker {blamed}")
    message = f"{verdict}; all have ended. {_last_output(failed)}"
    lost = None if failed.is_server else fleet.culprit(failed, blamed).index
    return _Outcome(failed.shell_code, message, True, lost, seconds)


def _without(given_up: list[Member], workers: int) -> _Outcome:
    """The others have gone on without some workers."""
    first = given_up[0]
    reason = f"{first.name} (of {workers}) failed, with {first.ending}, and no restart was left"
    return _Outcome(first.shell_code, f"{reason}; all have ended. {_last_output(first)}")


def _last_output(failed: Member) -> str:
    return f"Its last output again:\n{failed.show(failed.last_traceback())}"


def number_of(stop: KeyboardInterrupt) -> signal.Signals:
    """The signal that made the launcher stop."""
    return signal.Signals((*stop.args, signal.SIGINT)[0])


def _say(text: str) -> None:
    make_room()
    print(f"tfzero.launch: {text}", file=sys.stderr, flush=True)
