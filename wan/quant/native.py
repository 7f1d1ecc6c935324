"""kernels.c, compiled for this machine by its C compiler when first needed, and kept in the user's cache folder.

Without a compiler everything works, through torch, about ten times slower. SWAN_NATIVE=0 turns the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.ggml import BY_NAME, GGMLType, random_blocks

SOURCE = Path(__file__).with_name("kernels.c")
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")
_COMPILE_SECONDS = 120


def dequantize_native(blocks: Tensor, type: GGMLType, out: Tensor) -> bool:
    """Write the weights of contiguous CPU `blocks` to contiguous `out` (fp32 or bf16). False: no kernel for this."""
    library = _library() if out.dtype in FORMATS and blocks.device.type == "cpu" else None
    if library is None:
        return False
    count = blocks.numel() // type.block_bytes
    if not (blocks.is_contiguous() and out.is_contiguous() and out.numel() == count * type.block_weights):
        raise ValueError("blocks and weights must be contiguous and of the same number")
    return bool(library.dequantize(type.id, blocks.data_ptr(), count, out.data_ptr(), FORMATS[out.dtype]))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler or its code does not give the right numbers."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.environ.get("SWAN_NATIVE") == "0":
        return None
    # torch's own OpenMP runtime: with a second one, the threads of both would wait for each other's cores.
    runtime = _openmp_runtime()
    for openmp in (True, False) if runtime else (False,):
        try:
            if openmp:
                ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(_compiled(compiler, openmp)))
        except (OSError, subprocess.SubprocessError):
            continue
        library.dequantize.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
        )
        if _is_exact(library):
            return library
        warnings.warn(f"{SOURCE.name} gives wrong numbers when compiled by {compiler}; not used", stacklevel=2)
    return None


def _compiled(compiler: str, openmp: bool) -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache yet."""
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, flags, _processor())).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swan"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:  # no home, or none that can be written to
        folder = Path(tempfile.mkdtemp(prefix="swan-"))
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            parts = [str(Path(work) / name) for name in ("kernels.o", "kernels.so")]
            # Linked without -fopenmp: its functions are found in the runtime that is loaded already.
            for command in ([*flags, "-c", str(SOURCE), "-o", parts[0]], ["-shared", parts[0], "-o", parts[1]]):
                subprocess.run([compiler, *command], check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            os.replace(parts[1], path)
    return path


def _processor() -> str:
    """What -march=native means here: a home folder may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() + platform.processor()
    found = (re.search(rf"^{field}\s*:(.*)$", text, re.MULTILINE) for field in ("model name", "flags", "Features"))
    return "".join(match[1] for match in found if match)


def _openmp_runtime() -> str | None:
    """Path of the OpenMP runtime in this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    match = re.search(r"\S*/lib(gomp|iomp5|omp)[-.][^/\s]*$", maps, re.MULTILINE)
    return match[0] if match else None


def _is_exact(library: ctypes.CDLL) -> bool:
    """Whether every type gives, on random blocks, what blocks.py says, bit for bit."""
    for name in UNPACK:
        blocks = random_blocks(BY_NAME[name], 9)
        for dtype, format in FORMATS.items():
            expected = dequantize_blocks(blocks, name).to(dtype)
            out = torch.empty_like(expected)
            library.dequantize(BY_NAME[name].id, blocks.data_ptr(), len(blocks), out.data_ptr(), format)
            if not torch.equal(out, expected):
                return False
    return True
