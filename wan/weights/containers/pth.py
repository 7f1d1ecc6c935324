"""PyTorch checkpoints (`.pth`, `.pt`, `.bin`), as data only: a pickle that would run code is refused.

Each tensor is read where it lies, see `pth_header`, or stays there, see `mapped`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from wan.errors import SwanError
from wan.quant.scratch import empty
from wan.weights.containers.mapped import Extent, MappedFile
from wan.weights.containers.opened import OpenedFile
from wan.weights.containers.pth_header import read_header, spanned
from wan.weights.containers.zip_directory import Record, data_start
from wan.weights.source import Source, Span, TensorInfo


class PthSource(Source):
    """One file written by `torch.save`, in its format of today or in the one before torch 1.6."""

    def __init__(self, path: Path):
        self._file = OpenedFile(path)
        self._mapped = MappedFile(self._file)
        self._views = read_header(self._file)
        for name, view in self._views.items():
            if not hasattr(torch, view.dtype):
                raise SwanError(f"{path}: tensor {name} has the element type {view.dtype}, which this torch has not")
        infos = {name: TensorInfo(view.shape, getattr(torch, view.dtype)) for name, view in self._views.items()}
        super().__init__([path], infos)

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        view, shape, first = self._views[name], self._views[name].shape, 0
        if rows is not None:
            shape, first = (rows[1] - rows[0], *shape[1:]), rows[0] * view.stride[0]
        memory = empty((spanned(shape, view.stride),), self._infos[name].dtype)
        self._fill(name, memory, first * memory.itemsize)
        return memory.view(shape) if view.is_contiguous else memory.as_strided(shape, view.stride).contiguous()

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        if not self._views[name].is_contiguous:
            return False
        self._fill(name, out, start)
        return True

    def extent(self, name: str) -> Extent | None:
        info = self._infos[name]
        if not self._views[name].is_contiguous:
            return None
        return Extent(self._mapped, self._start(name), math.prod(info.shape) * info.dtype.itemsize)

    def _fill(self, name: str, memory: torch.Tensor, first: int) -> None:
        """Read from byte `first` of what the tensor spans."""
        if memory.numel():
            data = memoryview(memory.view(-1).view(torch.uint8).numpy())
            self._file.fill(data, self._start(name) + first, name)

    def _start(self, name: str) -> int:
        """The byte of the file where the tensor begins."""
        view = self._views[name]
        start = view.place
        if isinstance(start, Record):
            with self._file.open() as file:
                start = data_start(self._file.path, file, start)
        return start + view.offset
