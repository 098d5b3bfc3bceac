"""Checks that the devices of all workers fit together: all of one kind, and no GPU twice.

[Note: GPUs twice] NCCL refuses two members on one GPU of one host. It identifies a host by `NCCL_HOSTID`, or else by
host name and boot. Workers exchange the same identity and each GPU's UUID before TensorFlow starts NCCL, so the error
can name the workers.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.cuda_devices import cuda_devices

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def agree_on_devices(channel: Channel, cluster: Cluster, devices: Sequence[str]) -> None:
    """Raises ValueError on all workers unless their devices fit together. All workers call it.

    Args:
        channel: between the workers.
        cluster: the workers.
        devices: devices of this process, such as "GPU:0".
    """
    told = channel.all_gather("comparing devices", describe_devices(devices))
    problem = find_mixture(told, cluster) or find_shared_gpu(told, cluster)
    if problem:
        raise ValueError(problem)


def describe_devices(devices: Sequence[str]) -> dict[str, Any]:
    """What the other workers must know about this process's devices."""
    kind = devices[0].split(":")[0]
    gpus = _uuids(devices) if kind == "GPU" else {}
    return {"kind": kind, "count": len(devices), "sees": _count_gpus(), "host": _host(), "gpus": gpus}


def _count_gpus() -> int:
    return len(tf.config.list_physical_devices("GPU"))


def _uuids(devices: Sequence[str]) -> dict[str, str]:
    """UUIDs by device name.

    Empty if TensorFlow sees other GPUs than CUDA, or if GPUs are split into logical devices, which NCCL never gets.
    """
    found = cuda_devices()
    physical = tf.config.list_physical_devices("GPU")
    are_whole = all(len(tf.config.get_logical_device_configuration(gpu) or [None]) == 1 for gpu in physical)
    if len(found) != len(physical) or not are_whole:
        return {}
    return {device: found[int(device.split(":")[1])].uuid for device in devices}


def _host(environ: Mapping[str, str] = os.environ) -> str:
    """This host's identity, as NCCL sees it. [Note: GPUs twice]"""
    named = environ.get("NCCL_HOSTID")
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return f"NCCL_HOSTID {named}" if named else f"{socket.gethostname()} {boot}"


def find_mixture(told: Sequence[Mapping[str, Any]], cluster: Cluster) -> str:
    """The error message if some workers have GPUs and others do not; "" if all have one kind."""
    if len({each["kind"] for each in told}) == 1:
        return ""

    def of(kind: str) -> str:
        which = [index for index, each in enumerate(told) if each["kind"] == kind]
        counts = sorted({told[index]["count"] for index in which})
        unseen = [index for index in which if kind == "CPU" and told[index]["sees"] == 0]
        why = f" (TensorFlow sees no GPU on {cluster.names_of(unseen)})" if unseen else ""
        return f"{cluster.names_of(which)} would compute on {' or '.join(map(str, counts))} {kind}s{why}"

    return (
        f"All workers need devices of one kind, but {of('GPU')}, and {of('CPU')}. Run `python -m tfzero.doctor` where "
        "no GPU is seen, which tells why; or compute on CPUs everywhere: ZeroStrategy(devices=['CPU:0']), or the "
        "launcher with --gpus-per-worker 0."
    )


def find_shared_gpu(told: Sequence[Mapping[str, Any]], cluster: Cluster) -> str:
    """The error message if two workers use one GPU on one host, as NCCL sees hosts; "" if each has its own."""
    holders: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for index, each in enumerate(told):
        for device, uuid in each["gpus"].items():
            holders.setdefault((each["host"], uuid), []).append((index, device))
    shared = {key: who for key, who in holders.items() if len({index for index, _ in who}) > 1}
    if not shared:
        return ""
    (host, uuid), who = next(iter(shared.items()))
    names = " and ".join(f"{cluster.names[index]} as its {device}" for index, device in who)
    more = f" (and {len(shared) - 1} more are shared)" if len(shared) > 1 else ""
    return (
        f"{uuid} on {host.split(' ')[0]} would be used by {names}{more}. NCCL takes a GPU once only. Give each worker "
        "GPUs of its own by CUDA_VISIBLE_DEVICES, as `python -m tfzero.launch` does, or by ZeroStrategy(devices=...)."
    )
