"""The GPUs that CUDA shows this process: name, UUID and memory, from the driver's own library. No TensorFlow.

The calls create no context on a GPU and take no memory.
"""

import ctypes
import uuid
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class CudaDevice:
    """One GPU, or one MIG device.

    Args:
        uuid: as nvidia-smi writes it, such as "GPU-5ad8..."; the same for every process.
        name: of its model.
        memory_bytes: its total memory.
    """

    uuid: str
    name: str
    memory_bytes: int


def cuda_devices(library: ctypes.CDLL | None = None) -> list[CudaDevice]:
    """The GPUs in CUDA's order, which is the order of TensorFlow's physical devices. Empty without a driver.

    Args:
        library: the driver's library; tests pass their own.

    Raises:
        RuntimeError: if there is a driver, but it fails.
    """
    if library is None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return []
    count = ctypes.c_int()
    _call(library, "cuInit", 0)
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    return [_device(library, index) for index in range(count.value)]


def _device(library: ctypes.CDLL, index: int) -> CudaDevice:
    handle, size = ctypes.c_int(), ctypes.c_size_t()
    name, identity = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    _call(library, "cuDeviceGet", ctypes.byref(handle), index)
    _call(library, "cuDeviceGetName", name, len(name), handle)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(size), handle)
    _call(library, "cuDeviceGetUuid_v2", ctypes.byref(identity), handle)  # a MIG device has its own
    return CudaDevice(f"GPU-{uuid.UUID(bytes=bytes(identity))}", name.value.decode(errors="replace"), size.value)


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code != 0:
        raise RuntimeError(f"NVIDIA's driver answers {name} with error {code}. Look whether nvidia-smi works here.")
