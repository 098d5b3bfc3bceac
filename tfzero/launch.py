"""Starts a TensorFlow cluster of local worker processes, on one machine, for scripts and for functions.

    python -m tfzero.launch --workers 2 train.py --epochs 3     # a script, like torchrun
    losses = tfzero.run_local(train, workers=2, args=(3,))      # a function, like a call

Each worker gets its `TF_CONFIG`, its output is passed on line by line, and the first failure ends all the
others. TensorFlow is imported by the workers alone, never here. Linux and macOS.

[Note: who is left behind] Nobody: each worker leads its own session and is ended with its children. If the
launcher itself is killed outright, Linux kills the workers (`PR_SET_PDEATHSIG`), but not their children;
macOS kills nothing. A child that starts a session of its own is never chased.
"""

import argparse
import codecs
import contextlib
import functools
import json
import math
import os
import pickle
import re
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import deque
from pathlib import Path

import cloudpickle

CPU_DEVICES_VARIABLE = "TFZERO_CPU_DEVICES"
_POLL_SECONDS = 0.02  # how late an exit may be noticed
_GRACE_SECONDS = 1.0  # between SIGTERM, which TensorFlow's workers ignore, and SIGKILL
_LEAVE_SECONDS = 3.0  # for a worker to exit after all results are in
_KEPT_LINES = 400  # of each worker's output, for reports
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Ties the process to its launcher (PR_SET_PDEATHSIG = 1, SIGKILL = 9), then becomes the worker.
_TIE_TO_LAUNCHER = (
    "import sys; sys.path[:1] = []; import ctypes, os; ctypes.CDLL(None).prctl(1, ctypes.c_ulong(9))\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"
)
_SERVE_CALL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tfzero.launch import _serve_call; _serve_call(*sys.argv[2:])"
)


class WorkerError(RuntimeError):
    """A worker of `run_local` failed. The message names it and shows the last lines of every worker."""


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that are free now: all are bound at once, then let go."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class _LineSplitter:
    r"""Cuts a stream of bytes into lines, ended by \n, \r\n or \r.

    So each update of a progress bar becomes a line: its \r would overwrite our prefix, and no text is
    lost. Only what holds no text is dropped: the empty start of a bar, and backspaces around it.
    """

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._after_return = False

    def feed(self, chunk: bytes, final: bool = False) -> list[str]:
        text = self._decoder.decode(chunk, final)
        if self._after_return:  # the \n of an \r\n that came in two pieces
            text = text.removeprefix("\n")
        self._after_return = text.endswith("\r")
        *parts, self._pending = re.split(r"(\r\n|\r|\n)", self._pending + text)
        if final and self._pending:
            parts += [self._pending, ""]
        pairs = [(line.strip("\b"), end) for line, end in zip(parts[::2], parts[1::2], strict=True)]
        return [line for line, end in pairs if line or end != "\r"]


class _Worker:
    """One started process, the last lines of its output, and its exit code once it has ended."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], hold: bool):
        if sys.platform == "linux":
            command = [sys.executable, "-S", "-c", _TIE_TO_LAUNCHER, str(os.getpid()), *command]
        self.index = index
        self.exit_code: int | None = None
        self.exit_seconds = math.inf  # when the exit was noticed, by the monotonic clock
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.splitter = _LineSplitter()
        stdin = subprocess.PIPE if hold else subprocess.DEVNULL
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            self.exit_notice: int | None = os.pidfd_open(self.process.pid)  # readable from its exit on
        except (AttributeError, OSError):  # only Linux 5.3 and later have it: else exits are polled for
            self.exit_notice = None

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def verdict(self, workers: int) -> str:
        ending = f"exit code {self.exit_code}"
        if self.exit_code < 0:
            hint = ", often: out of memory" if self.exit_code == -signal.SIGKILL else ""
            ending = f"signal {-self.exit_code} ({signal.strsignal(-self.exit_code)}{hint})"
        return f"worker {self.index} (of {workers}) failed first, with {ending}"

    def show(self, lines: list[str]) -> str:
        return "\n".join(f"[worker {self.index}] {line}" for line in lines or ["(no output)"])

    def last_traceback(self, otherwise_lines: int = 20) -> list[str]:
        lines = ["", *self.lines]
        starts = [at for at, line in enumerate(lines) if "Traceback (most recent call last):" in line]
        starts = [at for at in starts if not lines[at - 1].startswith("Exception ignored")]
        return lines[starts[-1] :] if starts else lines[1:][-otherwise_lines:]


class _Fleet:
    """The workers of one run. Use it in `contextlib.closing`: whatever happens, all have ended after it."""

    def __init__(self, *, echo: bool):
        self.workers: list[_Worker] = []
        self._echo = echo
        self._selector = selectors.DefaultSelector()

    def start(self, commands: list[list[str]], environments: list[dict[str, str]], *, hold=False) -> None:
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            worker = _Worker(index, command, environment, hold)
            self.workers.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if worker.exit_notice is not None:
                self._selector.register(worker.exit_notice, selectors.EVENT_READ, worker)

    @property
    def running(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.exit_code is None]

    def wait(self, is_done, timeout_seconds: float | None) -> tuple[_Worker | None, list[_Worker]]:
        """Waits until `is_done(worker)` for all; else ends all, and returns the first failed, or the late."""
        deadline_seconds = time.monotonic() + (timeout_seconds or math.inf)
        while waiting := [worker for worker in self.workers if not is_done(worker)]:
            if time.monotonic() > deadline_seconds:
                self.close()
                return None, waiting
            failed = next((worker for worker in self._poll() if not is_done(worker)), None)  # any exit code
            if failed:
                self.close()
                return failed, []
        return None, []

    def let_go(self) -> None:
        """Tells the held workers to leave, and gives them a few seconds."""
        for worker in self.running:
            with contextlib.suppress(OSError):
                worker.process.stdin.write(b"\n")
        self._poll_for(_LEAVE_SECONDS)

    def close(self) -> None:
        """Ends all workers and their children, politely for a moment only. May be called again."""
        try:
            for worker in self.running:
                worker.signal_group(signal.SIGTERM)
            self._poll_for(_GRACE_SECONDS)
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

    def _poll(self) -> list[_Worker]:
        """Passes on output for a moment; returns the workers that ended, in the order of their exits."""
        for key, _ in self._selector.select(_POLL_SECONDS):  # in the order in which they became ready
            if key.fd == key.data.exit_notice:
                key.data.exit_seconds = time.monotonic()
            else:
                self._pass_on(key.data)
        ended = [worker for worker in self.running if worker.process.poll() is not None]
        for worker in ended:
            self._finish(worker)
        return sorted(ended, key=lambda worker: worker.exit_seconds)

    def _pass_on(self, worker: _Worker) -> bool:
        """Takes one piece of a worker's output. False if there is none, for now or for good."""
        chunk = worker.process.stdout.read(65536)
        if chunk:
            self._keep(worker, worker.splitter.feed(chunk))
        elif chunk is not None:
            self._forget(worker.process.stdout)
        return bool(chunk)

    def _finish(self, worker: _Worker) -> None:
        """Takes the exit code and the last output of a worker that ends, and ends the children it left."""
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

    def _forget(self, source) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def _keep(self, worker: _Worker, lines: list[str]) -> None:
        worker.lines.extend(lines)
        if self._echo and lines:
            try:
                print(worker.show(lines), flush=True)
            except OSError:  # nobody reads us any more: end, without trying again
                self._echo = False
                raise


def run_local(fn, workers=2, *, args=(), timeout_seconds=600, env=None, cpu_devices=None, echo=False) -> list:
    """Calls `fn(*args)` in `workers` fresh local processes; returns their results in worker order.

    All travels by cloudpickle: closures and functions of notebooks work. `env` adds environment variables,
    `cpu_devices` sets the logical CPU devices of each worker, `echo=True` prints their output as it comes.

    A delivered result is what counts, not how the process ends afterwards. Finished workers wait for the
    last one: in TensorFlow a worker that leaves early may bring down the others.

    Raises:
        WorkerError: a worker ended without a result; its traceback is in the message.
        TimeoutError: a result was missing after `timeout_seconds`.
    """
    _check_settings(workers, timeout_seconds, cpu_devices)
    environments = _environments(workers, env or {}, cpu_devices)
    with tempfile.TemporaryDirectory(prefix="tfzero_") as folder:
        Path(folder, "call").write_bytes(_pickle_call(fn, tuple(args)))
        results = [Path(folder, f"result_{index}") for index in range(workers)]
        serve = [sys.executable, "-c", _SERVE_CALL, json.dumps([str(entry) for entry in sys.path]), folder]
        with contextlib.closing(_Fleet(echo=echo)) as fleet:
            fleet.start([[*serve, each.name] for each in results], environments, hold=True)
            failed, late = fleet.wait(lambda worker: results[worker.index].exists(), timeout_seconds)
            if failed:
                reason = f"{failed.verdict(workers)}, before it delivered a result"
                raise WorkerError(f"{reason}; all have ended. Last lines:\n{_logs(fleet, [failed])}")
            if late:
                reason = f"{_lateness(late, timeout_seconds)}. Raise timeout_seconds, or see where each waits"
                raise TimeoutError(f"{reason}. Last lines:\n{_logs(fleet, late)}")
            fleet.let_go()
        return [pickle.loads(each.read_bytes()) for each in results]


def _pickle_call(fn, args: tuple) -> bytes:
    """The call as bytes. What is defined in the file of `fn` travels by value, unless it is installed."""
    name = getattr(fn.func if isinstance(fn, functools.partial) else fn, "__module__", None) or ""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or sysconfig.get_path("stdlib"))
    installed = file.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in file.parts
    known = name in {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    by_value = not (installed or known or name.partition(".")[0] == "tfzero")
    if by_value:
        cloudpickle.register_pickle_by_value(sys.modules[name])
    try:
        return cloudpickle.dumps((fn, args))
    except Exception as error:
        raise TypeError(
            "run_local sends fn, what it refers to, and args to other processes, but could not pickle them. "
            f"Create variables, models and strategies inside fn. Received: fn={fn!r}, and the error: {error}"
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])


def _serve_call(folder: str, result_name: str) -> None:
    """What a worker of `run_local` does: the call, its result into a file, then wait for all the others."""
    go = os.dup(0)  # keeps the line to the launcher; fn sees a closed stdin
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    exit_code = 0
    try:
        fn, args = pickle.loads(Path(folder, "call").read_bytes())
        unfinished = Path(folder, f"{result_name}.unfinished")
        unfinished.write_bytes(cloudpickle.dumps(fn(*args)))
        unfinished.replace(Path(folder, result_name))
        os.read(go, 1)
    except BaseException as error:  # also SystemExit: fn has not returned
        traceback.print_exc()
        exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)  # without TensorFlow's shutdown, which may hang or abort


def _logs(fleet: _Fleet, shown_last: list[_Worker], kept_lines: int = 60) -> str:
    order = sorted(fleet.workers, key=lambda worker: worker in shown_last)
    return "\n".join(worker.show(list(worker.lines)[-kept_lines:]) for worker in order)


def _lateness(late: list[_Worker], timeout_seconds: float) -> str:
    numbers = ", ".join(str(worker.index) for worker in late)
    return f"still running after {timeout_seconds:g} seconds: worker {numbers}; all have ended now"


def _check_settings(workers: int, timeout_seconds: float | None, cpu_devices: int | None) -> None:
    settings = {"workers": workers, "timeout_seconds": timeout_seconds, "cpu_devices": cpu_devices}
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0. Received: {value}")


def _environments(workers: int, env: dict[str, str], cpu_devices: int | None) -> list[dict[str, str]]:
    """The environment of each worker: ours, with unbuffered output, `env`, and its place in the cluster."""
    shared = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "PYTHONUNBUFFERED": "1", **env}
    if cpu_devices is not None:
        shared[CPU_DEVICES_VARIABLE] = str(cpu_devices)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(workers)]}
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(workers)]
    return [{**shared, "TF_CONFIG": json.dumps(config)} for config in configs]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0, the first failure's exit code, or 124 after a timeout; bad input is 2."""
    options = _parse(arguments)
    target = ["-m", options.script] if options.module else [options.script]
    commands = [[sys.executable, *target, *options.script_args]] * options.workers
    environments = _environments(options.workers, {}, options.cpu_devices)
    sys.stdout.reconfigure(errors="backslashreplace")
    exit_code, message = 0, ""
    try:
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
                signal.signal(number, _stop)
        with contextlib.closing(_Fleet(echo=True)) as fleet:
            fleet.start(commands, environments)
            failed, late = fleet.wait(lambda worker: worker.exit_code == 0, options.timeout_seconds)
        if failed:
            exit_code = failed.exit_code if failed.exit_code > 0 else 128 - failed.exit_code
            again = failed.show(failed.last_traceback())
            message = f"{failed.verdict(options.workers)}; all have ended. Its last output again:\n{again}"
        elif late:
            exit_code, message = 124, f"timeout: {_lateness(late, options.timeout_seconds)}."
    except KeyboardInterrupt as stop:
        number = signal.Signals((*stop.args, signal.SIGINT)[0])
        exit_code, message = 128 + number, f"received {number.name}; all workers have ended."
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 128 + signal.SIGPIPE
    if message:
        print(f"tfzero.launch: {message}", file=sys.stderr, flush=True)
    return exit_code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = "Runs a script in N local worker processes, each with its TF_CONFIG."
    parser = argparse.ArgumentParser("python -m tfzero.launch", description=about, allow_abbrev=False)
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument("--timeout-seconds", type=float, metavar="S", help="end everything after S seconds")
    parser.add_argument("--cpu-devices", type=int, metavar="K", help="logical CPU devices of each worker")
    parser.add_argument("-m", dest="module", action="store_true", help="script is a module, as in python -m")
    parser.add_argument("script", help="what each worker runs")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="all the rest is its")
    options = parser.parse_args(arguments)
    try:
        _check_settings(options.workers, options.timeout_seconds, options.cpu_devices)
    except ValueError as error:
        parser.error(str(error))
    if not options.module and not os.path.exists(options.script):
        parser.error(f"there is no script {options.script!r} in {os.getcwd()}. For a module write -m MODULE.")
    return options


def _stop(number: int, _) -> None:
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the end is quick: do not interrupt it
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
