"""The free memory of the GPU that a run would take, asked of the driver without torch and without taking any memory.

CUDA's numbers are not those of nvidia-smi: CUDA_VISIBLE_DEVICES chooses and orders, by numbers, UUIDs or parts of a
split GPU (MIG), and without CUDA_DEVICE_ORDER=PCI_BUS_ID the fastest GPU is the first. So the driver says which GPU a
number means, and NVML how much of that is free. Where these libraries cannot be loaded, nvidia-smi is asked.

Sources: CUDA driver API (cuDeviceGetUuid_v2), NVML API reference (nvmlDeviceGetHandleByUUID, nvmlMemory_t).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid

_DRIVER, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
_SMI_QUERY = ("--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits")
_SMI_SECONDS = 10


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def free_vram(device: str) -> int | None:
    """Free bytes of the GPU that `device` ("auto", "cuda" or "cuda:N") means; None if nobody knows."""
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index)] * (index + 1) if visible is None else [one.strip() for one in visible.split(",")]
    # CUDA sees those before the first that is none.
    if index >= len(names) or any(name in ("", "-1", "NoDevFiles") for name in names[: index + 1]):
        return None
    free = _by_libraries(index)
    return _by_smi(names[index]) if free is None else free


def _by_libraries(index: int) -> int | None:
    try:
        driver, nvml = ctypes.CDLL(_DRIVER), ctypes.CDLL(_NVML)
        number, id_bytes = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        calls = (
            lambda: driver.cuInit(0),
            lambda: driver.cuDeviceGet(ctypes.byref(number), index),
            lambda: driver.cuDeviceGetUuid_v2(id_bytes, number),
            lambda: nvml.nvmlInit_v2(),
        )
        if any(call() != 0 for call in calls):
            return None
        for kind in ("GPU", "MIG"):
            name = f"{kind}-{uuid.UUID(bytes=bytes(id_bytes))}".encode()
            handle, memory = ctypes.c_void_p(), _Memory()
            found = nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0
            if found and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
                return memory.free
    except (OSError, AttributeError):  # no such library, or one of long ago
        pass
    return None


def _by_smi(name: str) -> int | None:
    """name: a number or a UUID."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, f"--id={name}", *_SMI_QUERY], capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
        return int(done.stdout.split(",")[0]) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
