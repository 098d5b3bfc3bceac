"""The command line of the launcher, and its limits."""

import argparse
import os
import sys

from tfzero.workers.gpus import check_gpus_per_worker, divide_gpus
from tfzero.workers.tasks import Task, find_task

_GRACE_SECONDS = 30.0
_OF_A_FLEET = ("timeout_seconds", "max_restarts", "min_workers", "grace_seconds")


def check_settings(workers: int, timeout_seconds: float | None, cpu_devices: int | None, servers: int = 0) -> None:
    """Raises ValueError for a number that is not above 0; of servers there may be none."""
    settings = {"workers": workers, "timeout_seconds": timeout_seconds, "cpu_devices": cpu_devices}
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0. Received: {value}")
    if not isinstance(servers, int) or isinstance(servers, bool) or servers < 0:
        raise ValueError(f"servers must be an integer of at least 0. Received: {servers!r}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked. `gpus` has the variables of each local worker, or `task` the place in a job of a site."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.module and not os.path.exists(options.script):
        parser.error(f"there is no script {options.script!r} in {os.getcwd()}. For a module write -m MODULE.")
    try:
        task = find_task()
        options.task = None if options.workers is not None else task
        if options.workers is None:
            _check_in_job(options)
        else:
            _check_fleet(options, task)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check_in_job(options: argparse.Namespace) -> None:
    """Raises ValueError unless a worker can be made of this process, as a task of a job."""
    if options.task is None:
        raise ValueError(
            "--workers N is needed: there is no sign of a job (of Slurm, Open MPI, MPICH, torchrun or their like) in "
            "whose tasks workers could run."
        )
    if os.environ.get("TF_CONFIG", "").strip() not in ("", "{}"):
        raise ValueError("TF_CONFIG names the workers already. Start the script without the launcher.")
    if options.servers is not None:
        raise ValueError(
            f"--servers {options.servers} has no effect without --workers: {options.task.launcher} starts the tasks. "
            'Name servers under "ps" in the TF_CONFIG of every worker and server, and start the script without the '
            "launcher, and each server with `python -m tfzero.servers`."
        )
    given = [f"--{name.replace('_', '-')}" for name in _OF_A_FLEET if getattr(options, name) is not None]
    if given:
        site = options.task.launcher
        raise ValueError(f"{', '.join(given)} have no effect without --workers: {site} starts and ends the tasks.")
    check_settings(1, None, options.cpu_devices)
    check_gpus_per_worker(options.gpus_per_worker)


def _check_fleet(options: argparse.Namespace, task: Task | None) -> None:
    """Raises ValueError for options that no fleet of local workers can have, and fills in the others."""
    options.servers = 0 if options.servers is None else options.servers
    check_settings(options.workers, options.timeout_seconds, options.cpu_devices, options.servers)
    if options.servers and options.min_workers is not None:
        raise ValueError(
            "--min-workers has no effect with --servers: a worker that fails is replaced, as --max-restarts allows, "
            "and the others go on meanwhile. Leave it away. Received: "
            f"--min-workers {options.min_workers} --servers {options.servers}"
        )
    options.gpus = divide_gpus(options.workers, options.gpus_per_worker)
    options.min_workers = options.workers if options.min_workers is None else options.min_workers
    options.max_restarts = options.max_restarts or 0
    options.grace_seconds = _GRACE_SECONDS if options.grace_seconds is None else options.grace_seconds
    if not 1 <= options.min_workers <= options.workers:
        raise ValueError(f"--min-workers must be from 1 to --workers. Received: {options.min_workers}")
    if options.max_restarts < 0 or options.grace_seconds < 0:
        raise ValueError("--max-restarts and --grace-seconds must be at least 0.")
    if task is not None and task.size > 1:
        print(
            f"tfzero.launch: each of the {task.size} tasks that {task.launcher} started trains alone, with --workers "
            f"{options.workers} of its own. Leave --workers away to train in all tasks together.",
            file=sys.stderr,
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    about = (
        "Runs a script in N local worker processes, each with its TF_CONFIG. Without --workers, in each task of a job: "
        "srun python -m tfzero.launch train.py (or mpirun, torchrun)."
    )
    parser = argparse.ArgumentParser("python -m tfzero.launch", description=about, allow_abbrev=False)
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes on this machine")
    about = "number of parameter servers beside them; a worker that fails is then replaced by itself (default: 0)"
    parser.add_argument("--servers", type=int, metavar="S", help=about)
    parser.add_argument("--timeout-seconds", type=float, metavar="S", help="end everything after S seconds")
    about = "start the workers again after a failure, so often; they go on from their last checkpoint"
    parser.add_argument("--max-restarts", type=int, metavar="R", help=about)
    about = "go on with fewer workers, but not fewer than M, when one does not come back (default: N)"
    parser.add_argument("--min-workers", type=int, metavar="M", help=about)
    about = f"for workers to save after SIGTERM (default: {_GRACE_SECONDS:g})"
    parser.add_argument("--grace-seconds", type=float, metavar="S", help=about)
    parser.add_argument("--cpu-devices", type=int, metavar="K", help="logical CPU devices of each worker")
    about = "GPUs of each worker, which no other sees; 0 for CPUs only (default: all visible GPUs, divided evenly)"
    parser.add_argument("--gpus-per-worker", type=int, metavar="G", help=about)
    parser.add_argument("-m", dest="module", action="store_true", help="script is a module, as in python -m")
    parser.add_argument("script", help="what each worker runs")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...", help="all the rest is its")
    return parser
