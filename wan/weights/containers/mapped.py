"""Weights that stay in their file while a model on a CPU uses them: its pages are the system's cache of the file.

So loading copies nothing, processes share them, and a system that is short of memory lets go of them. A file that is
cut meanwhile ends in an error: its size is looked at before every use, as reading past its end would be SIGBUS. That it
still is where the file is cut within a use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan.errors import SwanError
from wan.weights.containers.opened import OpenedFile

_LEAST_BYTES = 256 << 10
_PIECE_BYTES = 32 << 20
_GAP_BYTES = 1 << 20
_WAITING_THREADS = 4
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and later
_NOT_READ = (errno.EFAULT, getattr(errno, "EHWPOISON", 133), errno.EIO)


class MappedFile:
    """A file of which tensors are used where they are. It is mapped while there are such."""

    def __init__(self, opened: OpenedFile):
        self._opened = opened
        self._mapping: Callable[[], Guard | None] = lambda: None

    def guard(self) -> Guard:
        """Of all tensors in it. Raises SwanError where the file cannot be mapped."""
        guard = self._mapping() or Guard(self._opened)
        self._mapping = weakref.ref(guard)
        return guard


@dataclass(frozen=True)
class Extent:
    """Bytes of a file, in one piece."""

    file: MappedFile
    start: int
    size_bytes: int

    def suits(self, dtype: torch.dtype) -> bool:
        """Whether a tensor is worth it, and can be used where it lies."""
        return self.size_bytes >= _LEAST_BYTES and self.start % dtype.itemsize == 0

    def tensor(self, dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Guard]:
        """What lies there, [n], and its guard. Its pages are read as they are used, if they are not `Arriving`.

        Raises SwanError where the file cannot be mapped, or is not whole any more.
        """
        guard = self.file.guard()
        return guard.view(self.start, self.size_bytes).view(dtype), guard


class Arriving:
    """Bytes of files on their way into the system's cache, whose pages are entered, at once where the system can.

    Quicker than `read`, which copies; and what cannot be read is an error here, where a use would be SIGBUS. Threads
    wait for the disk in the order of the file, so there may be more of them than processors. Raises SwanError where a
    file cannot be mapped.
    """

    def __init__(self, extents: Iterable[Extent]):
        spans: dict[MappedFile, list[tuple[int, int]]] = {}
        for one in extents:
            spans.setdefault(one.file, []).append((one.start, one.start + one.size_bytes))
        self._guards = {file: file.guard() for file in spans}  # or there might be no mapping until all is here
        self._pool = ThreadPoolExecutor(_WAITING_THREADS, thread_name_prefix="arriving")
        self._pieces = {
            file: [(first, last, self._pool.submit(self._guards[file].populate, first, last)) for first, last in cut]
            for file, found in spans.items()
            if (cut := list(_pieces(sorted(found))))
        }

    def wait(self, extent: Extent) -> None:
        """Until it is here. Raises SwanError where it cannot be read."""
        end = extent.start + extent.size_bytes
        for first, last, done in self._pieces.get(extent.file, []):
            if first < end and extent.start < last:
                done.result()

    def wait_for_all(self, check: Callable[[], None]) -> None:
        """check: is called between pieces."""
        for pieces in self._pieces.values():
            for _, _, done in pieces:
                done.result()
                check()

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _pieces(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first byte, the one after the last) of pieces that cover sorted spans; small gaps are passed over."""
    first = last = 0
    for start, end in spans:
        if start > last + _GAP_BYTES:
            yield from _cut(first, last)
            first = start
        last = max(last, end)
    yield from _cut(first, last)


def _cut(first: int, last: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _PIECE_BYTES, last)) for start in range(first, last, _PIECE_BYTES))


class Guard:
    """The mapping of a file, called with a tensor before each use. Nobody can write to the file through it."""

    def __init__(self, opened: OpenedFile):
        self._path, self._size_bytes = opened.path, opened.size_bytes
        try:
            with opened.open() as file:
                self._file = open(os.dup(file.fileno()), "rb", buffering=0)
                self._memory = mmap.mmap(file.fileno(), self._size_bytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise SwanError(f"{self._path}: cannot be mapped ({error})") from None
        self._start = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies of a model, pickled ones too, hold weights of their own

    def view(self, start: int, size_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # or it could be written in that mode only
            data = torch.frombuffer(self._memory, dtype=torch.uint8, count=size_bytes, offset=start)
        self(data)
        return data

    def populate(self, first: int, last: int) -> None:
        """Read these bytes into the cache, and enter their pages."""
        first -= first % mmap.PAGESIZE
        with contextlib.suppress(OSError, AttributeError, TypeError):  # no such call on this system
            call = ctypes.CDLL(None, use_errno=True).madvise
            failed = call(ctypes.c_void_p(self._start + first), ctypes.c_size_t(last - first), _POPULATE_READ)
            if failed and (code := ctypes.get_errno()) in _NOT_READ:
                raise SwanError(f"{self._path}: cannot be read: {os.strerror(code)}")

    def holds(self, data: Tensor) -> bool:
        """Whether a tensor lies in the file, not in a copy of it."""
        return data.device.type == "cpu" and 0 <= data.data_ptr() - self._start < self._size_bytes

    def __call__(self, data: Tensor) -> None:
        """SwanError if `data` is still in the mapping, and the file behind it is not whole any more."""
        if not self.holds(data):
            return
        size_bytes = os.fstat(self._file.fileno()).st_size
        if size_bytes < self._size_bytes:
            told = f"cut from {self._size_bytes:,} to {size_bytes:,} bytes"
            raise SwanError(f"{self._path}: the file was {told} while its weights were in use")


def guard_uses(layer: nn.Module, guard: Guard) -> None:
    """Have the weight of a layer looked at before each use. Packed layers do so by themselves."""
    if not hasattr(layer, "guard"):
        layer.register_forward_pre_hook(_look)
    layer.guard = guard


def _look(layer: nn.Module, inputs: object) -> None:
    if layer.guard:
        layer.guard(layer.weight)


def in_file_bytes(model: nn.Module) -> int:
    """Of the weights of a model that lie in files: memory that the system can take back."""
    guarded = [(layer.guard, layer) for layer in model.modules() if getattr(layer, "guard", None)]
    weights = [(guard, weight) for guard, layer in guarded for weight in layer.parameters(recurse=False)]
    return sum(weight.nbytes for guard, weight in weights if guard.holds(weight))
