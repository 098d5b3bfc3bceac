"""What a process computes with: library versions, and its devices with their memory."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from tfzero.report import text_of
from tfzero.workers.agreement import versions
from tfzero.workers.cuda_devices import cuda_devices
from tfzero.workers.gpus import NO_GPU, VISIBLE_VARIABLE, machine_gpus, visible_gpus


def library_versions() -> dict[str, str]:
    """Versions of tfzero, Keras, TensorFlow, Python, NumPy, the system, and of what TensorFlow was built for."""
    build = tf.sysconfig.get_build_info()
    built = {f"{name} (built for)": str(build.get(key, "none")) for name, key in
             (("CUDA", "cuda_version"), ("cuDNN", "cudnn_version"))}  # fmt: skip
    return versions() | {"operating system": platform.platform()} | built


def describe_devices(devices: Sequence[str]) -> list[str]:
    """One line for each device of this process, such as "GPU:0 NVIDIA H200, 150 GB (GPU-5ad8...)"."""
    lines = []
    for name in devices:
        kind, _, index = name.rpartition("/device:")[2].partition(":")
        lines.append(f"{kind}:{index} {_of_gpu(int(index)) if kind == 'GPU' else _of_cpu()}")
    return lines


def _of_gpu(index: int) -> str:
    found = cuda_devices()
    physical = len(tf.config.list_physical_devices("GPU"))
    if physical != len(tf.config.list_logical_devices("GPU")) or index >= len(found):
        return "a logical GPU"
    return f"{found[index].name}, {text_of(found[index].memory_bytes)} ({found[index].uuid})"


def _of_cpu() -> str:
    sizes = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, kib = line.partition(":")
            sizes[name] = 1024 * int(kib.split()[0])
    if not {"MemTotal", "MemAvailable"} <= set(sizes):
        return f"{os.cpu_count()} cores"
    return f"{os.cpu_count()} cores, {text_of(sizes['MemAvailable'])} free of {text_of(sizes['MemTotal'])}"


def unseen_gpus() -> str:
    """Why TensorFlow sees no GPU although this process may use some; "" if it sees them, or there are none."""
    names = visible_gpus()
    if not names or tf.config.list_physical_devices("GPU"):
        return ""
    built = tf.sysconfig.get_build_info().get("is_cuda_build", False)
    how = "CUDA's libraries are missing" if built else "this TensorFlow is built without CUDA"
    return (
        f"the driver lists {machine_gpus().count} GPUs ({', '.join(names)} visible), but TensorFlow sees none: {how}, "
        'as its first lines on stderr tell. Run `pip install "tensorflow[and-cuda]"`, or set '
        f"{VISIBLE_VARIABLE}={NO_GPU} to compute on CPUs"
    )
