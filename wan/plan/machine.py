"""What this machine has: memory that a process may use, and rates. Only what is named so imports torch."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from wan.errors import UsageError
from wan.options import Request

if TYPE_CHECKING:
    import torch

# Assumed where nothing is measured: an RTX 4090 in bf16 behind PCIe 4 x16, an NVMe disk, a few cores of a server, the
# GPU of a laptop of Apple's.
GPU_FLOPS, CPU_FLOPS, TRANSFER_RATE, DISK_RATE, MPS_FLOPS = 120e12, 0.1e12, 24e9, 2e9, 10e12
# Memory of the device that the driver takes before the first tensor; assumed, it differs by GPU and driver.
CONTEXT_BYTES = 500_000_000
CPUINFO = Path("/proc/cpuinfo")
_BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's
# Resident memory of a process that has made a video with the tiny task, whose models take next to nothing: Python,
# torch, transformers, tokenizers and the code of the kernels. Measured: 410 to 530 MB, torch 2.13 for CPUs, Linux.
PROCESS_BYTES = 475_000_000
CUDA_PROCESS_BYTES = 1_500_000_000  # the same with the libraries of CUDA; assumed


@dataclass(frozen=True)
class Machine:
    """device: "cpu", "cuda" or "mps".

    ram_bytes: the most of the machine's memory that this process may hold in all, as its peak RSS; vram_bytes: of
    device memory, the driver's part included; None: the device is the CPU, or its memory is unknown.
    flops: of matrix products, a second; transfer_rate: from host to device; disk_rate: of reading files; both bytes/s.
    is_measured: whether flops and transfer_rate are of this machine. has_bf16: whether a CPU multiplies bf16 itself.
    vae_flops: of matrix products in the type of the VAE; None: as flops.
    """

    device: str
    ram_bytes: int
    vram_bytes: int | None
    flops: float
    transfer_rate: float = TRANSFER_RATE
    disk_rate: float = DISK_RATE
    is_measured: bool = False
    has_bf16: bool = True
    vae_flops: float | None = None


@dataclass(frozen=True)
class Held:
    """Bytes of models that this process has loaded and may let go of: they are as good as free."""

    device: int = 0
    ram: int = 0


NOTHING = Held()


def look(request: Request, local_size: int = 1) -> Machine:
    """A machine that has the device asked for, with what is asked of its memory, its rates assumed: a GPU has
    `--vram_gb`, or memory that nobody knows. local_size: processes of this run on it."""
    ram, kind = request.load.ram_bytes or _ram_of_one(local_size), request.load.device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if request.load.vram_bytes else "cpu"
    if kind == "cpu":
        _refuse_vram(request)
        return Machine("cpu", ram, None, CPU_FLOPS, has_bf16=_has_bf16())
    if kind == "mps":
        return Machine("mps", ram, request.load.vram_bytes or ram, MPS_FLOPS)
    return Machine("cuda", ram, request.load.vram_bytes, GPU_FLOPS)


def look_with_torch(
    device: torch.device, request: Request, local_size: int, settle: Callable[[Machine], Request], held: Held = NOTHING
) -> Machine:
    """The machine at the start of a run, with what it can do as measured. Imports torch.

    settle: tells in which type the request computes on a machine. See `wan.plan.measure`.
    """
    import torch

    ram = request.load.ram_bytes or _ram_of_one(local_size, held.ram)
    if device.type == "cpu":
        _refuse_vram(request)
        machine = Machine("cpu", ram, None, CPU_FLOPS, is_measured=True, has_bf16=_has_bf16())
        return replace(
            machine, flops=_cpu_flops(settle(machine).load.dtype), vae_flops=_cpu_flops(request.load.vae_dtype)
        )
    if device.type != "cuda":
        return Machine(device.type, ram, request.load.vram_bytes or ram, MPS_FLOPS)
    # The driver's part is in use already, and counts; so does what torch keeps of freed tensors. Tensors that are
    # alive, of another pipeline say, are in use and stay so.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    vram = request.load.vram_bytes or torch.cuda.mem_get_info(device)[0] + unused + held.device + CONTEXT_BYTES
    flops, vae_flops = _gpu_flops(device, request.load.dtype), _gpu_flops(device, request.load.vae_dtype)
    rate = _transfer_rate(device)
    torch.cuda.empty_cache()
    return Machine("cuda", ram, vram, flops, rate, is_measured=True, vae_flops=vae_flops)


def free_ram() -> int:
    """Bytes of memory that are free, of the machine's or of the container's."""
    try:
        free = psutil.virtual_memory().available
    except OSError:  # no /proc; and the system's cache of files is not counted here
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int((group / "memory.max").read_text()) - used + int(stat.get("file", 0)))  # files can go
    return free


def _has_bf16() -> bool:
    """Whether the CPU says so (Linux). Where nobody tells, no: fp32 is never slow, bf16 without units by far."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):  # of x86, of Arm; all processors are alike
                return not _BF16_UNITS.isdisjoint(words.split())
    return False


def _ram_of_one(local_size: int, models: int = 0) -> int:
    """What each of the processes of this machine may hold in all: its part of what is free, what any process of a run
    holds before its first weight, and its models. What this one holds beyond that, another pipeline say, stays in use.
    """
    base = 0
    with contextlib.suppress(OSError, psutil.Error):  # no /proc
        base = min(psutil.Process().memory_info().rss, PROCESS_BYTES)
    return free_ram() // local_size + base + models


def _refuse_vram(request: Request) -> None:
    if request.load.vram_bytes is not None:
        raise UsageError("--vram_gb is for a GPU, this run is on the CPU: use --ram_gb")


def _timed(call: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call, after one to warm up."""
    call()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


@cache  # measured once a process: an engine plans each of its videos
def _cpu_flops(dtype: str) -> float:
    """Of the fastest of three matrix products of some 15 ms on slow machines, in the type of the run."""
    import torch

    size = 768
    one = torch.ones(size, size, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32))
    return 2 * size**3 / min(_timed(lambda: one @ one, 1) for _ in range(3))


@cache
def _gpu_flops(device: torch.device, dtype: str) -> float:
    import torch

    size = 4096
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    one = torch.ones(size, size, dtype=kind, device=device)
    return 2 * size**3 / _timed(lambda: one @ one, 4, lambda: torch.cuda.synchronize(device))


@cache
def _transfer_rate(device: torch.device) -> float:
    """Bytes/s from pinned memory."""
    import torch

    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    seconds = _timed(lambda: there.copy_(host, non_blocking=True), 2, lambda: torch.cuda.synchronize(device))
    return len(host) / seconds
