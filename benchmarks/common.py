"""What the benchmarks share: the machine, peak memory, the floor of a computation, JSON."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions, so that a number can be read later."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(result: dict[str, Any], out: str | Path | None = None) -> None:
    """Prints `result` as JSON and writes it to `out`, where given."""
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n", encoding="utf-8")


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[float, Any]:
    """(seconds, result), until `device` has done what it was given."""
    finish(device)
    start = time.perf_counter()
    result = call()
    finish(device)
    return time.perf_counter() - start, result


def finish(device: torch.device | str) -> None:
    """Wait for what a GPU still computes."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# Memory


def in_fresh_process(function: Callable, *args):
    """`function(*args)` in a new process with as many threads: nothing that ran before is in its memory."""
    with ProcessPoolExecutor(1, get_context("forkserver"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args).result()


def peak_bytes(call: Callable[[], Any]) -> int:
    """How far the resident memory of this process rises above its present size while `call` runs. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or `call` would reuse them unseen
    before = _resident_bytes()
    with _peak() as peak:
        call()
    return max(peak()) - before


@contextmanager
def _peak():
    """Yields a function that lists sizes seen, the peak among them."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own high-water mark starts anew
        yield lambda: [high_water_bytes()]
        return
    except PermissionError:
        pass
    done, seen = threading.Event(), [_resident_bytes()]

    def sample():
        while not done.wait(0.002):
            seen.append(_resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: seen
    finally:
        done.set()
        thread.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def high_water_bytes() -> int:
    """The most memory this process ever had resident. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# The floor: what the products alone would take

_KINDS = {
    F.linear: "matrix product",
    F.conv2d: "convolution",
    F.conv3d: "convolution",
    F.scaled_dot_product_attention: "attention",
}


class Products(TorchFunctionMode):
    """Counts the matrix products, convolutions and attentions called inside it. Works on the meta device.

    `counts`: (function, arguments with tensors as (shape, stride), keyword arguments) -> number of calls;
    `flops`: the same keys -> FLOPs of one call, 2 per multiply-add, padding counted.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple] = Counter()
        self.flops: dict[tuple, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _KINDS:
            named = kwargs or {}
            _, second, *_ = (arg for arg in (*args, *named.values()) if isinstance(arg, Tensor))  # keys, or the weight
            # Each output is a sum over one filter of the weight; with attention, twice over the keys.
            terms = 2 * second.shape[-2] if func is F.scaled_dot_product_attention else second[0].numel()
            key = (func, tuple(map(_layout, args)), tuple((name, _layout(arg)) for name, arg in named.items()))
            self.counts[key] += 1
            self.flops[key] = 2 * out.numel() * terms
        return out

    def tflop(self) -> float:
        return sum(self.flops[key] * count for key, count in self.counts.items()) / 1e12

    def measure(self, dtype: torch.dtype, repeats: int = 3, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Runs each distinct product alone on random numbers: the floor in seconds, and by kind TFLOP and rate."""
        seconds, flops = Counter(), Counter()
        for key, count in self.counts.items():
            func, layouts, named = key
            args = [_random(arg, dtype, device) for arg in layouts]
            call = partial(func, *args, **{name: _random(arg, dtype, device) for name, arg in named})
            runs = [timed(call, device)[0] for _ in range(1 + repeats)]
            seconds[_KINDS[func]] += count * min(runs[1:])
            flops[_KINDS[func]] += count * self.flops[key]
        kinds = {
            kind: {
                "tflop": flops[kind] / 1e12,
                "seconds": seconds[kind],
                "gflop_per_second": flops[kind] / seconds[kind] / 1e9,
            }
            for kind in seconds
        }
        return {"seconds": sum(seconds.values()), "by_kind": kinds}


class _Layout(NamedTuple):
    """What matters of a tensor argument: it is a dictionary key."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _layout(arg):
    if isinstance(arg, Tensor):
        return _Layout(tuple(arg.shape), arg.stride())
    return tuple(arg) if isinstance(arg, list) else arg


def _random(arg, dtype: torch.dtype, device: torch.device | str):
    return torch.empty_strided(*arg, dtype=dtype, device=device).normal_() if isinstance(arg, _Layout) else arg
