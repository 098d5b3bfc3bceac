"""Starts a TensorFlow cluster of worker processes on one machine, for scripts and for functions.

    python -m tfzero.launch --workers 2 train.py --epochs 3     # a script, like torchrun
    srun python -m tfzero.launch train.py --epochs 3            # a worker in each task of a job
    losses = tfzero.run_local(train, workers=2, args=(3,))      # a function, like a call

Each worker gets its `TF_CONFIG` and GPUs of its own. Its output is passed on line by line, and the first failure ends
all the others. With `--max-restarts` all are then started again, and resume from their last checkpoint. Only the
workers import TensorFlow, never the launcher. Linux and macOS.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from tfzero.workers.fleet import Fleet, Worker
from tfzero.workers.gpus import divide_gpus
from tfzero.workers.handshake import SECRET_VARIABLE, make_secret
from tfzero.workers.job_worker import become, worker_environment
from tfzero.workers.options import check_settings, parse
from tfzero.workers.progress import asking
from tfzero.workers.stopping import BLAME_VARIABLE, EXIT_STOPPED, EXIT_WORKER_LOST, read_blame

CPU_DEVICES_VARIABLE = "TFZERO_CPU_DEVICES"
RESTARTS_VARIABLE = "TFZERO_RESTARTS"  # how often the fleet was restarted, for scripts that want to know
# A worker that is lost again within this time after a restart has not come back.
_COME_BACK_SECONDS = 60.0
# A fleet that fails within this time is started again after a pause. The pause doubles with each such failure in a row.
_AT_ONCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SERVE_CALL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tfzero.launch import _serve_call; _serve_call(*sys.argv[2:])"
)


class WorkerError(RuntimeError):
    """A worker of `run_local` failed. The message names it and shows the last lines of every worker, its own last.

    Example:

    ```python
    def fail():
        raise LookupError("no data")

    try:
        tfzero.run_local(fail, workers=2)
    except tfzero.WorkerError as error:
        print(error)  # ends with the traceback of the worker that failed first
    ```
    """


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


def run_local(fn: Callable[..., Any], workers: int = 2, *, args: Sequence[Any] = (),
              timeout_seconds: float | None = 600, env: dict[str, str] | None = None, cpu_devices: int | None = None,
              gpus_per_worker: int | None = None, echo: bool = False) -> list[Any]:  # fmt: skip
    """Calls `fn(*args)` in `workers` fresh local processes; returns their results in worker order.

    The call and the results travel by cloudpickle, so closures and functions of notebooks work. Once a worker has
    delivered its result, it does not matter how its process ends. Finished workers wait for the last one: in TensorFlow
    a worker that leaves early may bring down the others. On a terminal a bar shows how many have finished.

    Args:
        fn: the function. It makes its own strategy and model.
        workers: number of processes, each with its `TF_CONFIG`.
        args: arguments of `fn`, the same for all.
        timeout_seconds: time for all results.
        env: environment variables to add.
        cpu_devices: logical CPU devices of each worker; by default one.
        gpus_per_worker: GPUs of each worker, which no other worker sees; 0 for CPUs only. By default all GPUs that
            `CUDA_VISIBLE_DEVICES` names, or that the machine has, are divided evenly.
        echo: whether to print the workers' output as it comes.

    Returns:
        What `fn` returned in each worker.

    Raises:
        WorkerError: if a worker ended without a result; its traceback is in the message.
        TimeoutError: if a result was missing after `timeout_seconds`.
        TypeError: if `fn` or `args` cannot be pickled.
        ValueError: for a number that is not above 0, or too few GPUs.

    Example:

    ```python
    def task_of(base):
        import json, os

        return base + json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    assert tfzero.run_local(task_of, workers=2, args=(10,)) == [10, 11]
    ```
    """
    check_settings(workers, timeout_seconds, cpu_devices)
    gpus = divide_gpus(workers, gpus_per_worker, {**os.environ, **(env or {})})
    with tempfile.TemporaryDirectory(prefix="tfzero_") as folder, held_ports(workers) as ports:
        environments = _environments(ports, env or {}, cpu_devices, gpus)
        Path(folder, "call").write_bytes(_pickle_call(fn, tuple(args)))
        results = [Path(folder, f"result_{index}") for index in range(workers)]
        serve = [sys.executable, "-c", _SERVE_CALL, json.dumps([str(entry) for entry in sys.path]), folder]
        with contextlib.closing(Fleet(echo=echo)) as fleet:
            fleet.start([[*serve, each.name] for each in results], environments, hold=True)
            _wait_for_results(fleet, results, timeout_seconds)
            fleet.let_go()
        return [pickle.loads(each.read_bytes()) for each in results]


def _pickle_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes. Definitions in the file of `fn` travel by value, unless the file is installed."""
    name = getattr(fn.func if isinstance(fn, functools.partial) else fn, "__module__", None) or ""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or sysconfig.get_path("stdlib"))
    installed = file.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in file.parts
    known = name in {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    by_value = not (installed or known or name.partition(".")[0] == "tfzero")
    if by_value:
        cloudpickle.register_pickle_by_value(sys.modules[name])
    try:
        call: bytes = cloudpickle.dumps((fn, args))
        return call
    except Exception as error:
        raise TypeError(
            "run_local sends fn, what it refers to, and args to other processes, but could not pickle them. "
            f"Create variables, models and strategies inside fn. Received: fn={fn!r}, and the error: {error}"
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])


def _wait_for_results(fleet: Fleet, results: Sequence[Path], timeout_seconds: float, which: str = "") -> None:
    """Waits until each worker has delivered its result. If one fails or is late, it ends all and raises an error."""
    failed, late = fleet.wait(lambda worker: results[worker.index].exists(), timeout_seconds)
    if failed:
        reason = f"{failed.verdict(len(fleet.workers))}, before it delivered a result{which}"
        raise WorkerError(f"{reason}; all have ended. Last lines:\n{_logs(fleet, [failed])}")
    if late:
        reason = f"{_lateness(late, timeout_seconds)}. Raise timeout_seconds, or see where each waits"
        raise TimeoutError(f"{reason}. Last lines:\n{_logs(fleet, late)}")


def _serve_call(folder: str, result_name: str) -> None:
    """A worker of `run_local`: makes the call, writes the result into a file, and waits for all the others."""

    def call(line: int) -> None:
        fn, args = pickle.loads(Path(folder, "call").read_bytes())
        _deliver(Path(folder, result_name), cloudpickle.dumps(fn(*args)))
        os.read(line, 1)

    _serve(call)


def _deliver(result: Path, content: bytes) -> None:
    unfinished = result.with_name(f"{result.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(result)


def _serve(work: Callable[[int], object]) -> None:
    """Does a worker's `work(line)`, and ends the process. `line` is the file descriptor of the launcher's pipe."""
    line = os.dup(0)  # code in `work` sees an empty stdin
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    exit_code = 0
    try:
        work(line)
    except BaseException as error:  # also SystemExit: the work is not done
        traceback.print_exc()
        exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)  # without TensorFlow's shutdown, which may hang or abort


def _logs(fleet: Fleet, shown_last: list[Worker], kept_lines: int = 60) -> str:
    order = sorted(fleet.workers, key=lambda worker: worker in shown_last)
    return "\n".join(worker.show(list(worker.lines)[-kept_lines:]) for worker in order)


def _lateness(late: list[Worker], timeout_seconds: float) -> str:
    numbers = ", ".join(str(worker.index) for worker in late)
    return f"still running after {timeout_seconds:g} seconds: worker {numbers}; all have ended now"


def _environments(
    ports: list[int], env: dict[str, str], cpu_devices: int | None, gpus: list[dict[str, str]]
) -> list[dict[str, str]]:
    """The environment of each worker: ours, a secret, unbuffered output, `env`, its place and its GPUs.

    Only the leader is asked to report progress.
    """
    shared = {"TF_CPP_MIN_LOG_LEVEL": "2", SECRET_VARIABLE: make_secret(), **os.environ, "PYTHONUNBUFFERED": "1", **env}
    if cpu_devices is not None:
        shared[CPU_DEVICES_VARIABLE] = str(cpu_devices)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(len(ports))]
    environments = [
        {**shared, "TF_CONFIG": json.dumps(config), **own} for config, own in zip(configs, gpus, strict=True)
    ]
    environments[0] |= asking()
    return environments


@dataclass(frozen=True)
class _Outcome:
    """How one fleet of the command line ended; `lost` is the worker to blame, if there is one."""

    exit_code: int = 0
    message: str = ""
    lost: int | None = None
    seconds: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code.

    It is 0, the first failure's exit code, or 124 after a timeout. After a signal it is 75 if all workers have saved,
    else 128 plus the signal's number. Bad input exits with 2.
    """
    options = parse(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored, as under nohup
            signal.signal(number, _stop)
    try:
        return _run_fleets(options) if options.task is None else _become_worker(options)
    except KeyboardInterrupt as stop:
        number = _number_of(stop)
        print(f"tfzero.launch: received {number.name}; no worker was running.", file=sys.stderr, flush=True)
        return 128 + number


def _become_worker(options: argparse.Namespace) -> int:
    """Runs the script in this process's place, as a worker of the job that it is a task of. Returns only if it fails.

    [Note: one task of a job] in `workers/tasks.py`.
    """
    try:
        own, held = worker_environment(options.task, options.gpus_per_worker)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: task 0's error of another kind
        print(f"tfzero.launch: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    shared = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "PYTHONUNBUFFERED": "1"}
    if options.cpu_devices is not None:
        shared[CPU_DEVICES_VARIABLE] = str(options.cpu_devices)
    become([sys.executable, *_target(options), *options.script_args], {**shared, **own}, held)
    return 1


def _target(options: argparse.Namespace) -> list[str]:
    return ["-m", options.script] if options.module else [options.script]


def _run_fleets(options: argparse.Namespace) -> int:
    """Runs fleet after fleet, until one ends well or no restart is left. Returns the last one's exit code."""
    former, quick = _Outcome(), 0  # fleets in a row that failed at once
    gpus = options.gpus  # one for each worker that is left
    for restarts in range(options.max_restarts + 1):
        with held_ports(len(gpus)) as ports, tempfile.TemporaryDirectory(prefix="tfzero_") as folder:
            outcome = _run_fleet(options, _environments_of(options, ports, gpus, restarts), Path(folder))
        if outcome.message:
            print(f"tfzero.launch: {outcome.message}", file=sys.stderr, flush=True)
        if outcome.lost is None or restarts == options.max_restarts:
            break
        again = f"restart {restarts + 1} of {options.max_restarts}"
        if outcome.lost == former.lost and outcome.seconds < _COME_BACK_SECONDS and len(gpus) > options.min_workers:
            gpus = [*gpus[: outcome.lost], *gpus[outcome.lost + 1 :]]  # its GPUs may be the reason
            again = f"worker {outcome.lost} does not come back; {again}"
        quick = quick + 1 if outcome.seconds < _AT_ONCE_SECONDS else 0
        pause_seconds = min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** (quick - 1)) if quick else 0.0
        when = f" in {pause_seconds:g} s" if pause_seconds else ""
        print(f"tfzero.launch: {again}{when}, with {len(gpus)} workers.", file=sys.stderr, flush=True)
        time.sleep(pause_seconds)
        former = outcome
    return outcome.exit_code


def _number_of(stop: KeyboardInterrupt) -> signal.Signals:
    return signal.Signals((*stop.args, signal.SIGINT)[0])


def _environments_of(
    options: argparse.Namespace, ports: list[int], gpus: list[dict[str, str]], restarts: int
) -> list[dict[str, str]]:
    return _environments(ports, {RESTARTS_VARIABLE: str(restarts)}, options.cpu_devices, gpus)


def _run_fleet(options: argparse.Namespace, environments: list[dict[str, str]], folder: Path) -> _Outcome:
    count = len(environments)
    commands = [[sys.executable, *_target(options), *options.script_args]] * count
    for index, environment in enumerate(environments):
        environment[BLAME_VARIABLE] = str(folder / str(index))
    fleet = Fleet(echo=True)
    start = time.monotonic()
    try:
        fleet.start(commands, environments)
        failed, late = fleet.wait(lambda worker: worker.exit_code == 0, options.timeout_seconds)
    except KeyboardInterrupt as stop:
        number = _number_of(stop)
        if number == signal.SIGTERM:  # workers may save before they end
            fleet.close(options.grace_seconds)
        else:
            fleet.close()
        saved = {worker.exit_code for worker in fleet.workers} == {EXIT_STOPPED}
        message = f"received {number.name}; all workers have {'saved and ' * saved}ended."
        return _Outcome(EXIT_STOPPED if saved else 128 + number, message)
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Outcome(128 + signal.SIGPIPE)
    finally:
        fleet.close()
    if late:
        return _Outcome(124, f"timeout: {_lateness(late, options.timeout_seconds)}.")
    if not failed:
        return _Outcome()
    exit_code = failed.exit_code if failed.exit_code > 0 else 128 - failed.exit_code
    again = failed.show(failed.last_traceback())
    blamed = read_blame(folder / str(failed.index), count) if exit_code == EXIT_WORKER_LOST else None
    verdict = failed.verdict(count) + ("" if blamed is None else f", because of worker {blamed}")
    message = f"{verdict}; all have ended. Its last output again:\n{again}"
    return _Outcome(exit_code, message, fleet.culprit(failed, blamed).index, time.monotonic() - start)


def _stop(number: int, _: FrameType | None) -> None:
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the end is quick: do not interrupt it
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
