"""Which task of a job this process is, when the site's own launcher started it: torchrun, mpirun, or srun.

[Note: one task of a job] A launcher sets variables in each process that it starts. A launcher within another one, such
as `mpirun` in a Slurm job, leaves the outer one's variables in place. So the innermost comes first: those of PyTorch,
then those of MPI, then Slurm's. Slurm tells all addresses. The others tell only where the first task is, at
`MASTER_ADDR` and `MASTER_PORT`, and there the tasks exchange their addresses (`workers/rendezvous.py`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tfzero.workers import slurm
from tfzero.workers.addresses import address_of

PORT_VARIABLE = "TFZERO_PORT"
_DEFAULT_PORT = 29500  # as with PyTorch
_LOOPBACK = "127.0.0.1"
_MOST_TASKS = 100_000


@dataclass(frozen=True)
class _Names:
    """A launcher, and its variables for number of tasks, rank, and both among the tasks of one machine."""

    launcher: str
    size: str
    rank: str
    local_size: str
    local_rank: str
    also: tuple[str, ...] = ()  # must be set, too


_LAUNCHERS = (
    _Names("PyTorch's launcher", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", ("MASTER_ADDR",)),
    _Names("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
           "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Names("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
           "MV2_COMM_WORLD_LOCAL_RANK"),
    _Names("Hydra, of MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID",
           ("MPI_LOCALNRANKS",)),  # PMI_* alone may be Slurm's
    _Names("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "", "SLURM_LOCALID"),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One process among those that a launcher has started.

    Args:
        launcher: its name.
        rank: this task's number.
        size: number of tasks.
        variables: what says so, such as "SLURM_STEP_NUM_TASKS=2".
        local_rank: number among the tasks of this machine; None if nothing says it.
        local_size: number of tasks on this machine; None if nothing says it.
    """

    launcher: str
    rank: int
    size: int
    variables: str
    local_rank: int | None = None
    local_size: int | None = None

    @property
    def is_of_slurm(self) -> bool:
        """Whether Slurm's variables tell the addresses of all tasks."""
        return self.launcher == "Slurm"

    @property
    def refusal(self) -> str:
        """The error message of a strategy that would train alone here."""
        return (
            f"This process is task {self.rank} of {self.size} that {self.launcher} started ({self.variables}), but "
            "TF_CONFIG does not say who the others are, and it would train alone. Start the script with "
            "`python -m tfzero.launch script.py` in place of `python script.py`: that makes TF_CONFIG in every task. "
            "To train alone in every task, set TF_CONFIG='{}'."
        )


def find_task(environ: Mapping[str, str] = os.environ) -> Task | None:
    """The task that this process is, by the innermost launcher's variables; None without a launcher.

    Raises:
        ValueError: if the variables are no numbers, or the rank is not below the number of tasks.
    """
    for names in _LAUNCHERS:
        if all(environ.get(name) for name in (names.size, names.rank, *names.also)):
            return _task_of(names, environ)
    return None


def _task_of(names: _Names, environ: Mapping[str, str]) -> Task:
    size, rank = (slurm.number(environ, name) for name in (names.size, names.rank))
    told = f"{names.size}={size}, {names.rank}={rank}"
    if not rank < size <= _MOST_TASKS:
        most = f"and they may be {_MOST_TASKS:,}"
        raise ValueError(
            f"The rank of a task of {names.launcher} must be below their number, {most}. Received: {told}."
        )
    local_size = slurm.number(environ, names.local_size) if environ.get(names.local_size) else None
    local_rank = slurm.number(environ, names.local_rank) if environ.get(names.local_rank) else None
    if local_size is not None and local_rank is not None and local_rank >= local_size:
        pair = f"{names.local_size}={local_size}, {names.local_rank}={local_rank}"
        raise ValueError(f"The rank of a task on its machine must be below the number there. Received: {pair}.")
    return Task(names.launcher, rank, size, told, local_rank, local_size)


def chosen_port(environ: Mapping[str, str]) -> int | None:
    """The port of `TFZERO_PORT`; None if it is not set.

    Raises:
        ValueError: if it is not from 1 to 65535.
    """
    if not environ.get(PORT_VARIABLE):
        return None
    return _port(environ, PORT_VARIABLE)


def meeting_address(task: Task, environ: Mapping[str, str]) -> str:
    """Where the tasks exchange their addresses: "host:port" of the first one.

    It is `MASTER_ADDR` and `MASTER_PORT`, or `TFZERO_PORT` if that is set. torchrun itself listens at `MASTER_PORT`;
    then it is the next one. Without `MASTER_ADDR` all tasks must be on this machine.

    Raises:
        ValueError: if the host or a valid port is not known.
    """
    host = environ.get("MASTER_ADDR", "").strip().strip("[]")
    if not host:
        if task.local_size != task.size:
            raise ValueError(
                f"{task.launcher} does not tell where task 0 is, and not all {task.size} tasks are on this machine. "
                "Give every task the host name of task 0's machine in MASTER_ADDR (`mpirun -x MASTER_ADDR=node1 ...`), "
                "and perhaps a free port of it in MASTER_PORT."
            )
        host = _LOOPBACK
    port = chosen_port(environ)
    if port is None:
        port = _port(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else _DEFAULT_PORT
        if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port += 1 if port < 65535 else -1
    return address_of(host, port)


def _port(environ: Mapping[str, str], name: str) -> int:
    port = slurm.number(environ, name)
    if not 1 <= port <= 65535:
        raise ValueError(f"{name} must be from 1 to 65535. Received: {port}.")
    return port
