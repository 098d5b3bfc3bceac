"""Which GPUs a process may use, and how workers of one machine divide them. It uses no TensorFlow and starts no CUDA.

[Note: names of GPUs] `CUDA_VISIBLE_DEVICES` names GPUs by index, by UUID (`GPU-...`) or by MIG device (`MIG-...`), in
the order in which a process sees them. Workers get the names unchanged: only CUDA knows which GPU it calls 0, as its
order is not that of nvidia-smi. CUDA ends the list at the first negative index. A process sees only one MIG device,
whatever the list says.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
NO_GPU = "-1"
_SMI_SECONDS = 60.0  # without persistence mode the driver starts for each call
_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")  # one folder for each GPU
_GPU_LINE = re.compile(r"GPU \d+: .*\(UUID: GPU-[^)\s]+\)")
_MIG_LINE = re.compile(r"MIG .*\(UUID: (MIG-[^)\s]+)\)")


@dataclass(frozen=True)
class Machine:
    """The GPUs of this machine, as the driver reports them.

    Args:
        count: number of GPUs.
        mig_devices: UUIDs of the MIG devices that GPUs are divided into, if any.
    """

    count: int
    mig_devices: tuple[str, ...] = ()


def machine_gpus() -> Machine:
    """The GPUs of this machine, from `nvidia-smi -L`, or from the driver's folders in /proc if that lists none."""
    program = shutil.which("nvidia-smi")
    lines = [] if program is None else _lines_of(program, "-L")
    count = sum(_GPU_LINE.match(line.strip()) is not None for line in lines)
    if count == 0 and _DRIVER_FOLDER.is_dir():
        count = sum(1 for _ in _DRIVER_FOLDER.iterdir())
    found = (_MIG_LINE.match(line.strip()) for line in lines)
    return Machine(count, tuple(match[1] for match in found if match))


def _lines_of(*command: str) -> list[str]:
    """The lines that a program prints; none if it fails, as nvidia-smi does with a driver but no GPU."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Names of the GPUs that a process with this environment may use, in its order. [Note: names of GPUs]

    Raises:
        ValueError: if `CUDA_VISIBLE_DEVICES` names one twice, or one that this machine does not have.
    """
    listed = environ.get(VISIBLE_VARIABLE)
    names = None if listed is None else _listed(listed)
    if names == ():
        return ()
    machine = machine_gpus()
    if machine.count == 0:
        return ()
    if names is None:
        return machine.mig_devices or tuple(map(str, range(machine.count)))
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise ValueError(f"{VISIBLE_VARIABLE} names {twice[0]} twice. Name each GPU once. Received: {listed!r}")
    absent = [name for name in names if name.isdecimal() and int(name) >= machine.count]
    if absent and not machine.mig_devices:
        raise ValueError(
            f"{VISIBLE_VARIABLE} names GPU {absent[0]}, but this machine has {machine.count}, numbered from 0: CUDA "
            f"would leave it away, and all that follow. Received: {listed!r}"
        )
    return names


def _listed(text: str) -> tuple[str, ...]:
    """The names that CUDA reads from the list: those before the first invalid one."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break
        names.append(str(int(name)) if name.isdecimal() else name)
    return tuple(names)


def check_gpus_per_worker(gpus_per_worker: int | None) -> None:
    if gpus_per_worker is None:
        return
    if isinstance(gpus_per_worker, bool) or not isinstance(gpus_per_worker, int) or gpus_per_worker < 0:
        raise ValueError(
            "gpus_per_worker must be an integer of at least 0, or None to divide all visible GPUs evenly. "
            f"Received: {gpus_per_worker!r}"
        )


def divide_gpus(
    workers: int, gpus_per_worker: int | None, environ: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """Variables for each worker's environment, so that it sees GPUs that no other worker of this machine sees.

    There are none if there is nothing to divide: one worker that gets all GPUs, or no GPU.

    Args:
        workers: number of workers on this machine.
        gpus_per_worker: GPUs of each; 0 for workers that compute on CPUs; None to divide all visible GPUs evenly.
        environ: the environment that all workers get; its `CUDA_VISIBLE_DEVICES`, if any, names the GPUs to divide.

    Raises:
        ValueError: if there are too few GPUs, or they cannot be divided evenly.
    """
    check_gpus_per_worker(gpus_per_worker)
    if gpus_per_worker == 0:
        return [{VISIBLE_VARIABLE: NO_GPU}] * workers
    if workers == 1 and gpus_per_worker is None:
        return [{}]
    names = visible_gpus(environ)
    if not names and gpus_per_worker is None:
        return [{}] * workers
    each = _how_many(names, workers, gpus_per_worker)
    return [{VISIBLE_VARIABLE: ",".join(names[k * each : (k + 1) * each])} for k in range(workers)]


def _how_many(names: Sequence[str], workers: int, gpus_per_worker: int | None) -> int:
    """Number of GPUs of each worker."""
    seen = f"{len(names)} GPUs are visible ({', '.join(names) or 'none'})"
    advice = "Start fewer workers, or give --gpus-per-worker 0 (gpus_per_worker=0) to compute on CPUs"
    if gpus_per_worker is not None and workers * gpus_per_worker > len(names):
        needed = f"{workers} workers of {gpus_per_worker} GPUs need {workers * gpus_per_worker}"
        raise ValueError(f"{needed}, but {seen}. {advice}.")
    if gpus_per_worker is None and workers > len(names):
        raise ValueError(f"{workers} workers need a GPU each, but {seen}. {advice}.")
    if gpus_per_worker is None and len(names) % workers:
        most = len(names) // workers
        raise ValueError(
            f"{seen}, which {workers} workers cannot divide evenly. Start another number of workers, name fewer in "
            f"{VISIBLE_VARIABLE}, or give --gpus-per-worker {most} (gpus_per_worker={most}) to leave "
            f"{len(names) - workers * most} unused."
        )
    each = len(names) // workers if gpus_per_worker is None else gpus_per_worker
    if each > 1 and any(name.startswith("MIG-") for name in names[: workers * each]):
        raise ValueError(
            f"A process sees one MIG device only, but each of {workers} workers would get {each}: {seen}. Start "
            f"{len(names)} workers, or give --gpus-per-worker 1 (gpus_per_worker=1)."
        )
    return each
