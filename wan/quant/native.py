"""kernels.c, compiled for this machine by its C compiler when first needed, and kept in the user's cache folder.

Without a compiler everything works, through torch, about ten times slower. SWAN_NATIVE=0 turns the kernels off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wan.errors import one_line
from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.ggml import BY_NAME, GGMLType, has_bad_scales, random_blocks, scale_masks
from wan.quant.kernel_cache import keep, kept
from wan.quant.schemes import FLOAT8, Scheme, byte_values, code_values, dequantize_rows, random_rows, split_rows

SOURCE = Path(__file__).with_name("kernels.c")
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_CODE_KINDS = {torch.int8: 1, torch.uint8: 2}  # others are looked up
_SCALE_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ROTATIONS = (0, 4, 16, 64, 256, 1024, 4096)
# What the kernels are checked with: every way through them.
_SCHEMES = (
    *(Scheme("fp8", kind, 1 << 40) for kind in FLOAT8),
    Scheme("fp8", FLOAT8[0], 128, torch.bfloat16),
    Scheme("int8", torch.int8, 1 << 40),
    Scheme("int8", torch.int8, 1 << 40, rotation=64),
    Scheme("int8", torch.int8, 1 << 40, rotation=1024),
    Scheme("affine4", torch.uint8, 32, torch.bfloat16, 4, has_offsets=True),
    Scheme("affine8", torch.uint8, 64, torch.float16, has_offsets=True),
    Scheme("nvfp4", torch.uint8, 16, torch.float8_e4m3fn, 4, minifloat=(2, 1), has_row_scale=True),
    Scheme("mxfp4", torch.uint8, 32, torch.uint8, 4, minifloat=(2, 1)),
    Scheme("mxfp6", torch.uint8, 32, torch.uint8, 6, minifloat=(3, 2)),
    Scheme("mxfp8", torch.float8_e4m3fn, 32, torch.uint8),
)
_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")
_COMPILE_SECONDS = 30  # it takes one or two
# Never closed: a library is known by the path it was loaded from, and that of these holds their number.
_loaded: list[BinaryIO] = []


# Those of a library, by name: the types of their arguments, and of what they return.
Functions = Mapping[str, tuple[Sequence[Any], Any]]


class Unusable(Exception):
    """There are no kernels; the message says why."""


class _Stuck(Unusable):
    """The compiler does not end."""


def dequantize_native(blocks: Tensor, type: GGMLType, out: Tensor) -> bool:
    """Write the weights of contiguous CPU `blocks` to contiguous `out` (fp32 or bf16). False: no kernel for this."""
    library = _library() if out.dtype in FORMATS and blocks.device.type == "cpu" else None
    if library is None:
        return False
    count = blocks.numel() // type.block_bytes
    if not (blocks.is_contiguous() and out.is_contiguous() and out.numel() == count * type.block_weights):
        raise ValueError("blocks and weights must be contiguous and of the same number")
    return bool(library.dequantize(type.id, blocks.data_ptr(), count, out.data_ptr(), FORMATS[out.dtype]))


def dequantize_rows_native(blocks: Tensor, scheme: Scheme, columns: int, out: Tensor) -> bool:
    """The same for the rows of a scheme [rows, bytes a row]: `out` is [rows, columns]."""
    library = _library() if out.dtype in FORMATS and blocks.device.type == "cpu" else None
    if library is None or scheme.rotation not in _ROTATIONS:
        return False
    if not (blocks.is_contiguous() and out.is_contiguous() and out.shape == (len(blocks), columns)):
        raise ValueError("rows and weights must be contiguous and of the same number")
    return _rows_to(library, blocks, scheme, columns, out)


def has_bad_scales_native(blocks: Tensor, type: GGMLType) -> bool:
    """`has_bad_scales` of contiguous CPU blocks, four times as fast where there are kernels."""
    if (library := _library()) is None:
        return has_bad_scales(blocks, type)
    masks = bytes(number for scale in scale_masks(type) for number in (*scale[0], *scale[-1]))
    count = blocks.numel() // type.block_bytes
    return bool(library.bad_scales(blocks.data_ptr(), count, type.block_bytes, masks, len(masks) // 4))


def norm_silu_native(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> bool:
    """RMS norm of the rows of bf16 `x` [rows, C], times fp32 `gamma` [C], perhaps SiLU, to `out`. False: no kernel."""
    if not (x.dtype == out.dtype == torch.bfloat16 and x.device.type == out.device.type == "cpu"):
        return False
    if type(x) is not Tensor:  # a fake one has no memory
        return False
    if not (x.is_contiguous() and out.is_contiguous()) or (library := _library()) is None:
        return False
    library.norm_silu(x.data_ptr(), gamma.data_ptr(), *x.shape, out.data_ptr(), silu)
    return True


class _Layout(ctypes.Structure):
    """As in kernels.c."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("columns", "row_bytes", "bits", "code_kind", "group", "scale_kind", "scales_at", "offsets_at")
            + ("row_scale_at", "rotation")
        ),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


def _rows_to(library: ctypes.CDLL, blocks: Tensor, scheme: Scheme, columns: int, out: Tensor) -> bool:
    layout, _tables = _layout(scheme, columns)
    return bool(
        library.dequantize_rows(
            ctypes.byref(layout), blocks.data_ptr(), len(blocks), out.data_ptr(), FORMATS[out.dtype]
        )
    )


@functools.lru_cache(maxsize=64)
def _layout(scheme: Scheme, columns: int) -> tuple[_Layout, tuple[Tensor, ...]]:
    """And the tables that it points to."""
    row = torch.empty(1, scheme.row_bytes(columns), dtype=torch.uint8)
    _, *parts = split_rows(row, scheme, columns)
    scales_at, offsets_at, row_scale_at = (-1 if one is None else one.data_ptr() - row.data_ptr() for one in parts)
    with torch.inference_mode(False):  # they outlive the mode that they are first needed in
        tables = [code_values(scheme)]
        if scheme.scale_dtype.itemsize == 1:
            tables.append(byte_values(scheme.scale_dtype))
    kind = 0 if scheme.minifloat else _CODE_KINDS.get(scheme.code_dtype, 0)
    places = scales_at, offsets_at, row_scale_at
    sizes = columns, row.shape[1], scheme.bits, kind, scheme.group, _SCALE_KINDS.get(scheme.scale_dtype, 0)
    return _Layout(*sizes, *places, scheme.rotation, tables[0].data_ptr(), tables[-1].data_ptr()), tuple(tables)


_REST = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_FUNCTIONS: Functions = {
    "dequantize": ((ctypes.c_int, *_REST), ctypes.c_int),
    "dequantize_rows": ((ctypes.POINTER(_Layout), *_REST), ctypes.c_int),
    "norm_silu": ((ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *_REST[1:]), None),
    "bad_scales": ((ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int), ctypes.c_int),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler or its code does not give the right numbers."""
    return library_of(SOURCE, _FUNCTIONS, _is_exact, "packed weights are dequantised by torch, slower")


def library_of(
    source: Path, functions: Functions, is_right: Callable[[ctypes.CDLL], bool], otherwise: str
) -> ctypes.CDLL | None:
    """A C source, compiled; None, with a warning, where there is no compiler or its code is not right.

    is_right: whether a library gives the right numbers; otherwise: what is done without it.
    """
    if os.environ.get("SWAN_NATIVE") == "0":
        return None
    compiler = os.environ.get("CC", "").strip() or "cc"
    # torch's own OpenMP runtime: with a second one, the threads of both would wait for each other's cores.
    runtime, reason = _openmp_runtime(), ""
    for openmp in (True, False) if runtime else (False,):
        try:
            if openmp:
                ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            return _compiled(compiler, openmp, source, functions, is_right)
        except (OSError, Unusable) as error:
            reason = one_line(error)
            if isinstance(error, _Stuck):
                break
    warnings.warn(f"no compiled {source.stem}: {reason}; {otherwise}", stacklevel=3)
    return None


def _compiled(
    compiler: str, openmp: bool, source: Path, functions: Functions, is_right: Callable[[ctypes.CDLL], bool]
) -> ctypes.CDLL:
    """The shared library for a source, compiler and processor, checked; from the cache, or compiled and kept there.

    compiler: a command, which may have arguments. Raises Unusable or OSError.
    """

    def checked(data: bytes) -> ctypes.CDLL:
        library = ctypes.CDLL(_in_memory(data))
        if not all(hasattr(library, name) for name in functions):
            raise Unusable(f"{source.name} was compiled to something else")
        for name, (argtypes, restype) in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, restype
        if not is_right(library):
            raise Unusable(f"{source.name} gives wrong numbers when compiled")
        return library

    command = _find(compiler)
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    key = hashlib.sha256(source.read_bytes() + repr((command, flags, _processor())).encode()).hexdigest()[:24]
    prefix = f"{source.stem}-{key}-"
    if (data := kept(prefix)) is not None:
        with contextlib.suppress(OSError, Unusable):  # made where other things are installed
            return checked(data)
    data = _compile(command, flags, source)
    library = checked(data)
    keep(prefix, data)
    return library


def _find(compiler: str) -> list[str]:
    try:
        name, *arguments = shlex.split(compiler)
    except ValueError as error:
        raise Unusable(f"CC={compiler} is no command: {error}") from None
    path = shutil.which(name)
    if path is None:
        raise Unusable(f"there is no C compiler {name}")
    return [os.path.abspath(path), *arguments]


def _compile(command: list[str], flags: list[str], source: Path) -> bytes:
    """The bytes of the library."""
    with tempfile.TemporaryDirectory(prefix="swan-", ignore_cleanup_errors=True) as work:
        parts = [str(Path(work) / name) for name in ("kernels.o", "kernels.so")]
        # Linked without -fopenmp: its functions are found in the runtime that is loaded already.
        for arguments in (
            [*flags, "-c", str(source.absolute()), "-o", parts[0]],
            ["-shared", parts[0], "-o", parts[1]],
        ):
            _run([*command, *arguments], work, source.name)
        return Path(parts[1]).read_bytes()


def _run(command: list[str], folder: str, what: str) -> None:
    """A command whose output nobody wants, ended in time together with all that it started."""
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=folder, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    )
    try:
        status = process.wait(_COMPILE_SECONDS)
    except BaseException as error:  # it takes too long, or Ctrl-C
        with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _Stuck(f"{command[0]} has not ended after {_COMPILE_SECONDS} s") from None
        raise
    if status:
        raise Unusable(f"{command[0]} cannot compile {what}: it ended with status {status}")


def _in_memory(data: bytes) -> str:
    """A path to load a library from that no other process can reach; where the system has none such, it is loaded here,
    from a folder that is gone afterwards."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            file = open(os.memfd_create("swan-kernels"), "wb")
            file.write(data)
            file.flush()
            path = f"/proc/self/fd/{file.fileno()}"
            ctypes.CDLL(path)
            _loaded.append(file)
            return path
    with tempfile.TemporaryDirectory(prefix="swan-", ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "kernels.so")
        Path(path).write_bytes(data)
        ctypes.CDLL(path)
    return path  # loaded already: a library is found by its name


def cpu_flags() -> set[str]:
    """Units of the processor, as Linux tells them; none where nothing does."""
    match = re.search(r"^flags\s*:(.*)$", _proc("/proc/cpuinfo"), re.MULTILINE)
    return set(match[1].split()) if match else set()


def _processor() -> str:
    """What -march=native means here: a home folder may be shared by different machines."""
    text = _proc("/proc/cpuinfo")
    if not text:
        return platform.machine() + platform.processor()
    found = (re.search(rf"^{field}\s*:(.*)$", text, re.MULTILINE) for field in ("model name", "flags", "Features"))
    return "".join(match[1] for match in found if match)


def _openmp_runtime() -> str | None:
    """Path of the OpenMP runtime in this process."""
    match = re.search(r"(/.*/)lib(gomp|iomp5|omp)[-.][^/]*$", _proc("/proc/self/maps"), re.MULTILINE)
    return match[0] if match else None


def _proc(path: str) -> str:
    """ "" where the system has no such file."""
    try:
        return os.fsdecode(Path(path).read_bytes())
    except OSError:
        return ""


def _is_exact(library: ctypes.CDLL) -> bool:
    """Whether every type gives, on random blocks, what blocks.py and schemes.py say, bit for bit; and the norm."""
    for name in UNPACK:
        blocks = random_blocks(BY_NAME[name], 9)
        for dtype, format in FORMATS.items():
            expected = dequantize_blocks(blocks, name).to(dtype)
            out = torch.empty_like(expected)
            library.dequantize(BY_NAME[name].id, blocks.data_ptr(), len(blocks), out.data_ptr(), format)
            if not torch.equal(out, expected):
                return False
    return all(_is_exact_for(library, scheme) for scheme in _SCHEMES) and _normalises(library)


def _normalises(library: ctypes.CDLL) -> bool:
    """To a bf16's last place."""
    generator = torch.Generator().manual_seed(0)
    x, gamma = torch.randn(7, 300, generator=generator).bfloat16(), torch.randn(300, generator=generator)
    out = torch.empty_like(x)
    library.norm_silu(x.data_ptr(), gamma.data_ptr(), *x.shape, out.data_ptr(), 1)
    y = x.float() / x.float().norm(dim=1, keepdim=True) * gamma
    return torch.allclose(out.float(), torch.nn.functional.silu(y), rtol=2**-7, atol=0)


def _is_exact_for(library: ctypes.CDLL, scheme: Scheme, rows: int = 3) -> bool:
    columns = max(scheme.rotation, 320)  # more than one chunk, and the last group may be cut short
    blocks = random_rows(scheme, rows, columns)
    for dtype in FORMATS:
        expected = dequantize_rows(blocks, scheme, columns, dtype)
        out = torch.empty_like(expected)
        if not _rows_to(library, blocks, scheme, columns, out):
            return False
        if not torch.equal(torch.nan_to_num(out, nan=1e30), torch.nan_to_num(expected, nan=1e30)):
            return False
    return True
