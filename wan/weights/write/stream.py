"""Tensors on their way from a source into a file that is laid out already: slice by slice, by all cores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.ggml import GGMLType
from wan.weights.in_turn import cores, in_turn
from wan.weights.source import Source, Span

_SLICE_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Part:
    """Bytes that one tensor of the source becomes: the first of them in the file, and how many one row of it makes. 0:
    they are the same for all slices, or there is only one."""

    start: int
    row_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """make: rows of tensor `stored` of `source` -> what goes to each of `parts`. rows_at_once: slices are so many rows
    or a multiple; 0: the tensor is made in one piece. ValueError of `make` becomes the line of the tensor."""

    source: Source
    stored: str
    parts: tuple[Part, ...]
    make: Callable[[Tensor], Iterable[Tensor | np.ndarray]]
    rows_at_once: int = 0

    def run(self, rows: Span | None) -> list[tuple[int, np.ndarray]]:
        """Of a slice: the place of each run of bytes in the file, and the bytes."""
        try:
            made = list(self.make(self.source.read(self.stored, rows)))
        except OSError as error:
            raise SwanError(f"{self.source.describe()}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise SwanError(f"{self.source.describe()}: tensor {self.stored}: {error}") from None
        first = rows[0] if rows else 0
        pairs = zip(self.parts, made, strict=True)
        return [(p.start + first * p.row_bytes, _bytes(one)) for p, one in pairs if p.row_bytes or not first]

    def slices(self) -> Iterator[tuple[int, Span | None]]:
        """Weights and rows of each; rows are None for the whole tensor."""
        shape = self.source.info(self.stored).shape
        count = int(np.prod(shape, dtype=np.int64))
        if not self.rows_at_once or count <= _SLICE_WEIGHTS or not _is_cut(self.source, self.stored):
            yield count, None
            return
        width = count // shape[0]
        step = max(_SLICE_WEIGHTS // width // self.rows_at_once, 1) * self.rows_at_once
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            yield (last - first) * width, (first, last)


class Progress:
    """Bytes that were written, of so many. show: called with both; what it raises ends the work."""

    def __init__(self, total: int, show: Callable[[int, int], None] | None, done: int = 0):
        self.done, self._total, self._show = done, total, show

    def __call__(self, size_bytes: int) -> None:
        self.done += size_bytes
        if self._show:
            self._show(self.done, self._total)


def check_space(output: Path, needed: int) -> None:
    """Raises SwanError where the disk has no room for so many bytes."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        room = f"{output.parent} has {free / 1e9:.2f} GB free"
        raise SwanError(f"{output} needs {needed / 1e9:.2f} GB, and {room}")


def write_tensors(
    file: BinaryIO, jobs: Iterable[Job], advance: Callable[[int], None], threads: int | None = None
) -> None:
    """Make all tensors and write them to their places. advance: called with the bytes that were written; what it raises
    ends the work. threads: default: one for each core; the bytes do not depend on it."""
    before, threads = torch.get_num_threads(), threads or cores()
    slices = ((weights, partial(job.run, rows)) for job in jobs for weights, rows in job.slices())
    try:
        # Each thread computes alone: torch's own would be as many for each of these.
        for made in in_turn(slices, threads, 2 * threads * _SLICE_WEIGHTS, lambda: torch.set_num_threads(1)):
            for start, data in made:
                file.seek(start)
                file.write(data)
                advance(data.nbytes)
    finally:
        torch.set_num_threads(before)  # of threads to come as well


def _is_cut(source: Source, name: str) -> bool:
    """Whether its rows can be read apart: blocks of ggml may lie across them."""
    kind = source.block_type(name)
    return not isinstance(kind, GGMLType) or source.info(name).shape[-1] % kind.block_weights == 0


def _bytes(made: Tensor | np.ndarray) -> np.ndarray:
    data = made if isinstance(made, np.ndarray) else made.contiguous().view(-1).view(torch.uint8).numpy()
    return data.reshape(-1)
