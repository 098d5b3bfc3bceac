"""What a ZeroStrategy is told: its settings, checked, and the devices and workers it is to use."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfzero.host import runtime
from tfzero.plan.formats import FORMATS
from tfzero.workers.cluster import Cluster, cluster_from_spec, read_tf_config
from tfzero.workers.digests import DEFAULT_COMPARE_BATCHES

STAGES = (0, 1, 2, 3)
DEFAULT_MIN_SHARD_ELEMENTS = 1024


@dataclass(frozen=True)
class Settings:
    """What all workers must agree on. See `ZeroStrategy`."""

    stage: int
    bucket_bytes: int | str
    min_shard_elements: int
    timeout_seconds: float
    devices_per_worker: int
    device_type: str
    reshard_after_forward: bool = True
    compression: str | None = None
    error_feedback: bool = False
    hierarchical: bool | str = "auto"
    overlap_param_gather: bool = False
    compare_batches: int = DEFAULT_COMPARE_BATCHES


@dataclass(frozen=True)
class Choice:
    """What was chosen where the user left the choice, and why."""

    value: int | bool
    reason: str


def check_stage(stage) -> None:
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"`stage` must be one of {STAGES}. Received: stage={stage!r}")


def check_number(name: str, value, kinds, least) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        kind = "an integer" if kinds is int else "a number"
        raise ValueError(f"`{name}` must be {kind} of at least {least}. Received: {name}={value!r}")


def check_bucket_bytes(bucket_bytes) -> None:
    if isinstance(bucket_bytes, str) and bucket_bytes == "auto":
        return
    if isinstance(bucket_bytes, str):
        raise ValueError(
            f"`bucket_bytes` must be 'auto' or an integer of at least 1. Received: bucket_bytes={bucket_bytes!r}"
        )
    check_number("bucket_bytes", bucket_bytes, int, 1)


def choose_levels(settings: Settings, workers: int, why_one: str = "") -> Choice:
    """Whether sums are taken within each worker first. [Note: two levels] in `collectives/group.py`

    Args:
        settings: of the strategy.
        workers: how many there are.
        why_one: why the transport takes one level if that is left to it; "" if it does not mind.

    Raises:
        ValueError: if two levels are asked for and would have no effect, or cannot be.
    """
    asked, devices = settings.hierarchical, settings.devices_per_worker
    if not isinstance(asked, bool) and asked != "auto":
        raise ValueError(f"`hierarchical` must be 'auto', True or False. Received: hierarchical={asked!r}")
    obstacle = None
    if workers == 1 or devices == 1:
        obstacle = f"{workers} workers of {devices} replicas are one level"
    elif settings.stage == 0 and settings.compression is None:
        obstacle = "stage 0 all-reduces in a ring, which crosses the network once"
    elif settings.error_feedback:
        obstacle = "error_feedback keeps what each replica's own encoding lost, before any sum"
    if asked is True and obstacle is not None:
        raise ValueError(f"hierarchical=True has no effect: {obstacle}. Leave `hierarchical` away.")
    if isinstance(asked, bool):
        return Choice(asked, f"hierarchical={asked}")
    obstacle = obstacle or why_one
    if obstacle:
        return Choice(False, obstacle)
    return Choice(True, f"gradients cross the network once for {devices} replicas")


def check_reshard(reshard_after_forward, stage: int) -> None:
    if reshard_after_forward not in (None, True, False) or (reshard_after_forward is not None and stage != 3):
        raise ValueError(
            "`reshard_after_forward` must be True or False, and has an effect at stage 3 only. "
            f"Received: reshard_after_forward={reshard_after_forward!r}, stage={stage}"
        )


def check_overlap(overlap_param_gather, stage: int) -> None:
    if overlap_param_gather not in (True, False) or (overlap_param_gather and stage not in (1, 2)):
        raise ValueError(
            "`overlap_param_gather` must be True or False, and has an effect at stages 1 and 2 only. "
            f"Received: overlap_param_gather={overlap_param_gather!r}, stage={stage}"
        )


def check_compression(compression, error_feedback) -> None:
    if compression is not None and compression not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"`compression` must be None or one of {known}. Received: compression={compression!r}")
    if error_feedback not in (True, False) or (error_feedback and compression != "int8"):
        raise ValueError(
            "`error_feedback` must be True or False, and has an effect with compression='int8' only. "
            f"Received: error_feedback={error_feedback!r}, compression={compression!r}"
        )


def find_cluster(resolver) -> Cluster | None:
    if resolver is None:
        return read_tf_config()
    if not isinstance(resolver, tf.distribute.cluster_resolver.ClusterResolver):
        raise ValueError(f"`cluster_resolver` must be a ClusterResolver. Received: {resolver!r}")
    spec = resolver.cluster_spec()
    return cluster_from_spec(spec.as_dict() if spec else {}, resolver.task_type, resolver.task_id)


def configure_cpu_devices() -> None:
    """`python -m tfzero.launch --cpu-devices K` asks for K logical CPU devices in each worker."""
    count = os.environ.get("TFZERO_CPU_DEVICES")
    if count is None or runtime.runtime_is_initialized():
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(count))


def _machine_devices(kind: str) -> list[str]:
    """Names of this process's logical devices, without making TensorFlow create them yet."""
    configurations = [tf.config.get_logical_device_configuration(d) for d in tf.config.list_physical_devices(kind)]
    return [f"{kind}:{k}" for k in range(sum(len(c) if c else 1 for c in configurations))]


def choose_devices(devices: Sequence[str] | None) -> list[str]:
    cpus, gpus = _machine_devices("CPU"), _machine_devices("GPU")
    if devices is None:
        return gpus or cpus
    if not isinstance(devices, list | tuple) or not devices:
        raise ValueError(f"`devices` must be a list of device names, such as ['CPU:0']. Received: {devices!r}")
    try:
        specs = [tf.DeviceSpec.from_string(d if d.startswith("/") else f"/device:{d}") for d in devices]
    except (AttributeError, ValueError) as error:
        raise ValueError(f"`devices` must name devices, such as ['CPU:0']. Received: {devices!r}") from error
    names = [f"{spec.device_type}:{spec.device_index or 0}" for spec in specs]
    known = gpus + cpus
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"Unknown devices {unknown}: this process has {known}. For more logical CPU devices call "
            f"`tf.config.set_logical_device_configuration` first. Received: devices={list(devices)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"A device may be named once only. Received: devices={list(devices)}")
    if len({name.split(":")[0] for name in names}) > 1:
        raise ValueError(f"All replicas need devices of one type, CPU or GPU. Received: devices={list(devices)}")
    return names
