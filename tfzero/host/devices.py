"""The devices of this process, as TensorFlow reports them."""

import os
from collections.abc import Sequence

import tensorflow as tf

from tfzero.host import runtime


def configure_cpu_devices() -> None:
    """Makes the K logical CPU devices that `python -m tfzero.launch --cpu-devices K` asks for in each worker."""
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


def in_order(devices: Sequence[str]) -> list[str]:
    """Devices by their numbers, as TensorFlow numbers the members of a group."""
    return sorted(devices, key=lambda name: int(name.split(":")[1]))
