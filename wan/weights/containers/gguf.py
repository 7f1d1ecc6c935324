"""GGUF files: typed tensors and tensors of quantised blocks.

The header is read and checked when the file is opened, see `gguf_header`. Tensors are read one at a time with plain
reads into memory of their own, or stay in the file, see `mapped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from wan.errors import SwanError
from wan.quant.ggml import GGMLType, has_bad_scales
from wan.quant.native import has_bad_scales_native
from wan.quant.packed import PackedTensor
from wan.quant.scratch import empty_bytes
from wan.weights.containers.gguf_header import GGUFArray, TensorEntry, Value, read_elements, read_header
from wan.weights.containers.mapped import Extent, MappedFile
from wan.weights.containers.opened import PIECE_BYTES, OpenedFile, Work, in_pieces
from wan.weights.source import Source, Span, TensorInfo

_ARCHITECTURES = ("wan", "t5encoder", "t5", "pig", "cow")  # the last two: by producers that write no other name
_WAN_NAMES = ("blocks.0.self_attn.norm_q.weight", "head.modulation")
_T5_NAME = "enc.blk.0.attn_q.weight"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_TRUE_SHAPE = "comfy.gguf.orig_shape."  # key: this, then the tensor's name
_INTEGERS = (4, 5, 10, 11)  # value types that may hold a true shape
_MAX_TRUE_DIMS = 8
# Types of values that are looked at; a file with others is damaged or no model.
_VALUE_TYPES = {
    "general.architecture": str,
    "general.file_type": int,
    "general.quantization_version": int,
    "split.count": int,
}


class GGUFSource(Source):
    """One `.gguf` file.

    metadata: the keys and values of the header. Of an array it has the place, `array` reads it.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, OpenedFile(path)
        self._mapped = MappedFile(self._file)
        with self._file.open() as file:
            header = read_header(path, file, self._file.size_bytes)
        self.metadata: Mapping[str, Value] = header.metadata
        self._entries = {entry.name: entry for entry in header.tensors}
        self._check_model()
        infos = {name: TensorInfo(self._shape(entry), _dtype(entry.type)) for name, entry in self._entries.items()}
        super().__init__([path], infos)

    def array(self, key: str) -> list:
        """The elements of the array `key` of the metadata."""
        array = self.metadata.get(key)
        if not isinstance(array, GGUFArray):
            raise SwanError(f"{self._path}: has no array {key}")
        with self._file.open() as file:
            return read_elements(self._path, file, key, array)

    def type(self, name: str) -> GGMLType:
        """How `name` is stored."""
        return self._entries[name].type

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        packed = self.packed(name, rows=rows)
        if packed is not None:
            return packed.dequantize()
        info, (start, size_bytes, shape) = self.info(name), self._part(name, rows)
        tensor = empty_bytes(size_bytes)
        self._fill(tensor, self._entries[name], start)
        return tensor.view(info.dtype).view(shape)

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        self._fill(out.view(-1).view(torch.uint8), self._entries[name], start)
        return True

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        entry, guard = self._entries[name], None
        if entry.type.torch_dtype is not None:
            return None
        start, size_bytes, shape = self._part(name, rows)
        if mapped:
            blocks, guard = Extent(self._mapped, entry.offset + start, size_bytes).tensor()
            in_pieces(self._check(blocks, entry, has_bad_scales_native), size_bytes, _step(entry))
        else:
            blocks = empty_bytes(size_bytes)
            self._fill(blocks, entry, start)
        row_bytes = entry.type.row_bytes(entry.ne[0]) if rows is None else size_bytes // max(shape[0], 1)
        return PackedTensor(entry.type, shape, blocks.view(-1, row_bytes), guard)

    def extent(self, name: str) -> Extent | None:
        entry = self._entries[name]
        return Extent(self._mapped, entry.offset, entry.size_bytes)

    def block_type(self, name: str) -> GGMLType | None:
        stored = self._entries[name].type
        return stored if stored.torch_dtype is None else None

    def _part(self, name: str, rows: Span | None) -> tuple[int, int, tuple[int, ...]]:
        """(first byte, bytes, shape) of some rows of a tensor."""
        entry, shape = self._entries[name], self.info(name).shape
        if rows is None:
            return 0, entry.size_bytes, shape
        row_bytes, rest = divmod(entry.size_bytes, shape[0])
        if rest or row_bytes % entry.type.block_bytes:
            raise SwanError(f"{self._path}: the rows of tensor {name} are no whole blocks: it cannot be shared out")
        return rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes, (rows[1] - rows[0], *shape[1:])

    def _fill(self, data: torch.Tensor, entry: TensorEntry, start: int = 0) -> None:
        """Read from byte `start` of the tensor, and check the scales."""
        self._file.fill(
            memoryview(data.numpy()), entry.offset + start, entry.name, self._check(data, entry), _step(entry)
        )

    def _check(self, data: torch.Tensor, entry: TensorEntry, is_bad: Callable[..., bool] = has_bad_scales) -> Work:
        """Of whole blocks in `data`: SwanError where their scales are no numbers."""

        def check(first: int, last: int) -> None:
            if is_bad(data[first:last], entry.type):
                problem = f"tensor {entry.name} has blocks with infinite or NaN scales"
                raise SwanError(f"{self._path}: {problem}: the file is damaged")

        return check

    def _check_model(self) -> None:
        """Refuse one part of several, and models of other kinds."""
        for key, kind in _VALUE_TYPES.items():
            value = self.metadata.get(key)
            if value is not None and type(value) is not kind:
                raise SwanError(f"{self._path}: {key} is no {'string' if kind is str else 'integer'}")
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            merge = "merge them into one file with llama-gguf-split --merge"
            raise SwanError(f"{self._path}: one of {parts} parts of a model; {merge}")
        architecture = self.metadata.get("general.architecture", "wan")
        names = self._entries.keys()
        is_wan = any(all(prefix + name in names for name in _WAN_NAMES) for prefix in _PREFIXES)
        if architecture not in _ARCHITECTURES and not is_wan and _T5_NAME not in names:
            told = f"general.architecture is {architecture[:40]!r}"
            raise SwanError(f"{self._path}: {told}, neither a Wan transformer nor its text encoder")

    def _shape(self, entry: TensorEntry) -> tuple[int, ...]:
        """In torch's order: the stored one, or the one that was folded to be stored."""
        stored = entry.ne[::-1]
        key = _TRUE_SHAPE + entry.name
        array = self.metadata.get(key)
        if array is None:
            return stored
        if not isinstance(array, GGUFArray) or array.type not in _INTEGERS or not 0 < array.count <= _MAX_TRUE_DIMS:
            raise SwanError(f"{self._path}: {key} is no shape: the header is damaged")
        shape = tuple(self.array(key))
        if min(shape) <= 0 or math.prod(shape) != math.prod(stored):
            raise SwanError(f"{self._path}: {key} is {list(shape)}, but the tensor has the shape {list(stored)}")
        return shape


def _step(entry: TensorEntry) -> int:
    """Bytes of a piece: whole blocks."""
    return PIECE_BYTES // entry.type.block_bytes * entry.type.block_bytes


def _dtype(ggml_type: GGMLType) -> torch.dtype:
    """Of what `read` returns."""
    return ggml_type.torch_dtype or torch.float32
