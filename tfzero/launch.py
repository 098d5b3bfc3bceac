"""Starts a TensorFlow cluster of worker processes on one machine, for scripts and for functions.

    python -m tfzero.launch --workers 2 train.py --epochs 3     # a script, like torchrun
    srun python -m tfzero.launch train.py --epochs 3            # a worker in each task of a job
    losses = tfzero.run_local(train, workers=2, args=(3,))      # a function, like a call

Each worker gets its `TF_CONFIG` and GPUs of its own. Its output is passed on line by line, and the first failure ends
all the others. With `--max-restarts` all are then started again, and resume from their last checkpoint. With parameter
servers (`--servers`) a worker that fails is started again by itself. The launcher itself never imports TensorFlow.
Linux and macOS.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import signal
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from tfzero.workers.fleet import Fleet, Member, lateness
from tfzero.workers.gpus import divide_gpus
from tfzero.workers.job_worker import become, worker_environment
from tfzero.workers.options import check_settings, parse
from tfzero.workers.runs import CPU_DEVICES_VARIABLE, SERVE, environments_of_servers, held_ports, number_of, run_fleets
from tfzero.workers.runs import environments_of_workers as _environments
from tfzero.workers.stopping import take_leave

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SERVE_CALL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tfzero.launch import _serve_call; _serve_call(*sys.argv[2:])"
)


class WorkerError(RuntimeError):
    """A worker of `run_local` failed, or a server. The message names it and shows the last lines of all, its own last.

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


def run_local(fn: Callable[..., Any], workers: int = 2, *, servers: int = 0, args: Sequence[Any] = (),
              timeout_seconds: float | None = 600, env: dict[str, str] | None = None, cpu_devices: int | None = None,
              gpus_per_worker: int | None = None, echo: bool = False) -> list[Any]:  # fmt: skip
    """Calls `fn(*args)` in `workers` fresh local processes; returns their results in worker order.

    The call and the results travel by cloudpickle, so closures and functions of notebooks work. Once a worker has
    delivered its result, it does not matter how its process ends. Finished workers wait for the last one: in TensorFlow
    a worker that leaves early may bring down the others. On a terminal a bar shows how many have finished.

    Args:
        fn: the function. It makes its own strategy and model.
        workers: number of processes, each with its `TF_CONFIG`.
        servers: number of parameter servers beside them, which call nothing.
        args: arguments of `fn`, the same for all.
        timeout_seconds: time for all results.
        env: environment variables to add.
        cpu_devices: logical CPU devices of each worker; by default one.
        gpus_per_worker: GPUs of each worker, which no other worker sees; 0 for CPUs only. By default all GPUs that
            `CUDA_VISIBLE_DEVICES` names, or that the machine has, are divided evenly.
        echo: whether to print the output of workers and servers as it comes.

    Returns:
        What `fn` returned in each worker.

    Raises:
        WorkerError: if a worker ended without a result, or a server failed; its traceback is in the message.
        TimeoutError: if a result was missing after `timeout_seconds`.
        TypeError: if `fn` or `args` cannot be pickled.
        ValueError: for a number that is not above 0, `servers` below 0, or too few GPUs.

    Example:

    ```python
    def task_of(base):
        import json, os

        return base + json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    assert tfzero.run_local(task_of, workers=2, args=(10,)) == [10, 11]
    ```
    """
    check_settings(workers, timeout_seconds, cpu_devices, servers)
    gpus = divide_gpus(workers, gpus_per_worker, {**os.environ, **(env or {})})
    with tempfile.TemporaryDirectory(prefix="tfzero_") as folder, held_ports(workers + servers) as ports:
        environments = _environments(ports, env or {}, cpu_devices, gpus)
        Path(folder, "call").write_bytes(_pickle_call(fn, tuple(args)))
        results = [Path(folder, f"result_{index}") for index in range(workers)]
        serve = [sys.executable, "-c", _SERVE_CALL, json.dumps([str(entry) for entry in sys.path]), folder]
        with contextlib.closing(Fleet(echo=echo)) as fleet:
            fleet.start_servers(SERVE, environments_of_servers(environments[0]))
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
    """Waits until each worker has delivered its result. If one fails or is late, it ends all and raises an error.

    A server that ends with exit code 0 has not failed: all workers have taken leave of it.
    """

    def is_done(member: Member) -> bool:
        return member.exit_code == 0 if member.is_server else results[member.index].exists()

    failed, late = fleet.wait(is_done, timeout_seconds)
    if failed:
        when = "before all workers delivered a result" if failed.is_server else "before it delivered a result"
        reason = f"{fleet.verdict(failed)}, {when}{which}"
        raise WorkerError(f"{reason}; all have ended. Last lines:\n{_logs(fleet, [failed])}")
    if late:
        reason = f"{lateness(late, timeout_seconds)}. Raise timeout_seconds, or see where each waits"
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
        take_leave()
    except BaseException as error:  # also SystemExit: the work is not done
        traceback.print_exc()
        exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)  # without TensorFlow's shutdown, which may hang or abort


def _logs(fleet: Fleet, shown_last: list[Member], kept_lines: int = 60) -> str:
    order = sorted(fleet.members, key=lambda member: member in shown_last)
    return "\n".join(member.show(list(member.lines)[-kept_lines:]) for member in order)


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
        return run_fleets(options, _command(options)) if options.task is None else _become_worker(options)
    except KeyboardInterrupt as stop:
        number = number_of(stop)
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
    become(_command(options), {**shared, **own}, held)
    return 1


def _command(options: argparse.Namespace) -> list[str]:
    """What each worker runs."""
    target = ["-m", options.script] if options.module else [options.script]
    return [sys.executable, *target, *options.script_args]


def _stop(number: int, _: FrameType | None) -> None:
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the end is quick: do not interrupt it
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
