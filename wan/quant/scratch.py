"""Memory for weights that live for one product, and for large reads: in large pages, where the system has them; and
what the C library does with freed memory.

A fresh buffer of small pages is zeroed by the system page by page, which costs as much time as dequantising into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_MAPPED_BYTES = 256 << 10  # less than that comes from the C library, which keeps it for the thread that asked first
_LARGE_PAGE = 2 << 20
_SLOW_PAGE_S, _SMALL_AFTER_SLOW = 0.0006, 15
_small_next = 0  # tensors that get small pages
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_kept = threading.local()


def empty_bytes(size_bytes: int) -> Tensor:
    """uint8 [size_bytes] on the CPU, not yet written."""
    with torch.inference_mode(False):  # or it could be written in that mode only
        if size_bytes < _MAPPED_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size_bytes, dtype=torch.uint8)
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages
            _ask_for_large_pages(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)


def _ask_for_large_pages(memory: mmap.mmap) -> None:
    """Unless they are slow here: a virtual machine that gives free memory back to its host takes 4 ms for one, which in
    small pages takes 1 ms and else 0.1 ms. After a slow one the next few tensors do without."""
    global _small_next
    if len(memory) < 2 * _LARGE_PAGE:
        return
    if _small_next > 0:
        _small_next -= 1
        return
    memory.madvise(mmap.MADV_HUGEPAGE)
    started = time.thread_time()
    memory[_LARGE_PAGE] = 0  # in the first whole one
    if time.thread_time() - started > _SLOW_PAGE_S:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        _small_next = _SMALL_AFTER_SLOW


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`dtype` of `shape` in such memory."""
    return empty_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`dtype` [rows, columns] on the CPU, valid until the next call of this thread."""
    size_bytes = rows * columns * dtype.itemsize
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or len(buffer) < size_bytes:
        _kept.buffer = buffer = empty_bytes(size_bytes)
    return buffer[:size_bytes].view(dtype).view(rows, columns)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While this is open, what is freed serves the next tensor; on leaving it is given back.

    glibc returns large tensors to the system at once, and has the next ones zeroed page by page: up to a tenth of a
    forward on a CPU. For tensors of few sizes that come again and again: with many sizes, gaps remain.
    """
    with _malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}):
        yield


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """While this is open, tensors of 1 MB or more are given back as soon as they are freed.

    For tensors of many sizes, such as weights that are gathered and what is computed with them: glibc, which has seen
    larger ones, would put those below 32 MB side by side, where gaps remain: 300 MB beside the 11 layers of a 1.3B.
    """
    with _malloc({_MMAP_THRESHOLD: 1 << 20}):
        yield


@contextlib.contextmanager
def _malloc(options: dict[int, int]) -> Iterator[None]:
    _set_malloc(options)
    try:
        yield
    finally:  # what glibc itself arrives at when it has seen large tensors
        _set_malloc({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20})
        return_freed_memory()


def _set_malloc(options: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def return_freed_memory() -> None:
    """Has the C library give back what was freed in small pieces: a released tokenizer leaves 600 MB otherwise."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def free_scratch() -> None:
    """Give back what `scratch` keeps for this thread: as much as the largest layer that was computed."""
    _kept.buffer = None
