"""Makes this process a worker of the job whose launcher started it: with TF_CONFIG, and GPUs of its own.

`python -m tfzero.launch script.py` under `srun`, `mpirun` or `torchrun` ends here. The script takes this process's
place, so signals, output and the exit code are the site's launcher's to handle, as without tfzero.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from tfzero.workers import slurm
from tfzero.workers.addresses import host_of, port_of
from tfzero.workers.gpus import divide_gpus, visible_gpus
from tfzero.workers.handshake import read_secret
from tfzero.workers.rendezvous import Place, exchange
from tfzero.workers.tasks import Task, chosen_port, meeting_address

MEETING_SECONDS = 300.0  # for the tasks of a job to start: machines fetch images and file systems wake up
# A task that has one of these got its GPUs from Slurm, however many it sees.
_BINDINGS = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK")


def worker_environment(
    task: Task, gpus_per_worker: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[dict[str, str], socket.socket | None]:
    """What the worker of this task needs in its environment. All tasks of the job call it together.

    Args:
        task: this process.
        gpus_per_worker: GPUs of each worker; by default those that the launcher gave, or else even parts of all.
        environ: this process's environment.

    Returns:
        Variables, and a socket that reserves the worker's port; None if nothing needs to be reserved.

    Raises:
        ValueError: if the launcher's variables do not tell who the workers are, or GPUs cannot be divided.
        OSError: if the tasks do not meet.
    """
    gpus = _own_gpus(task, gpus_per_worker, environ)
    held = None
    if task.is_of_slurm:
        addresses = slurm.task_addresses(environ, chosen_port(environ))
    else:
        place = Place(task.rank, task.size, meeting_address(task, environ))
        port = port_of(place.meeting) if task.rank == 0 else 0
        held = hold(port) if task.rank else None
        own = port if held is None else held.getsockname()[1]
        addresses = exchange(place, own, read_secret(environ), MEETING_SECONDS)
        held = hold(port) if held is None else held
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": task.rank}}
    return {"TF_CONFIG": json.dumps(config), **gpus}, held


def hold(port: int) -> socket.socket:
    """A socket that holds this port, or with 0 a free one; a server with SO_REUSEADDR may use it meanwhile."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", port))
    return held


def _own_gpus(task: Task, gpus_per_worker: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """`CUDA_VISIBLE_DEVICES` of this task; nothing if it keeps what it sees."""
    if gpus_per_worker == 0:
        return divide_gpus(1, 0, environ)[0]
    local_size, local_rank = _among_neighbours(task, environ)
    if gpus_per_worker is None:
        seen = visible_gpus(environ) if local_size > 1 and not any(map(environ.get, _BINDINGS)) else ()
        if len(seen) < local_size:  # there are none, or each task sees its own
            return {}
    return divide_gpus(local_size, gpus_per_worker, environ)[local_rank]


def _among_neighbours(task: Task, environ: Mapping[str, str]) -> tuple[int, int]:
    """Number of tasks on this machine, and this one's rank among them; 1 and 0 if nothing says it."""
    if task.is_of_slurm:
        hosts = list(map(host_of, slurm.task_addresses(environ, chosen_port(environ))))
        return hosts.count(hosts[task.rank]), hosts[: task.rank].count(hosts[task.rank])
    if task.local_size is None or task.local_rank is None:
        return 1, 0
    return task.local_size, task.local_rank


def become(command: Sequence[str], environment: Mapping[str, str], held: socket.socket | None) -> None:
    """Replaces this process by another program, which keeps the held port. It does not return."""
    if held is not None:
        held.set_inheritable(True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
