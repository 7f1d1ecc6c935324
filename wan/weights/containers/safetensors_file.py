"""Safetensors files: tensors that are read, with plain reads, or stay in the file, see `mapped`.

The format is 8 bytes of header length, a JSON header, then the data. What is copied is read and not mapped (as by
`safe_open`): all pages seen so far would stay resident, which doubles the memory of a load.

Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from wan.errors import SwanError
from wan.quant.schemes import E8M0
from wan.quant.scratch import empty
from wan.weights.containers.mapped import Extent, MappedFile
from wan.weights.containers.opened import OpenedFile
from wan.weights.containers.safetensors_header import parse_header, read_index
from wan.weights.source import INDEX_SUFFIX, MergedSource, Source, Span, TensorInfo, open_container

REPLACES = "swan.replaces"  # metadata: names of tensors that this file has in place of those of files before it
_MAX_SHARDS = 1_000
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": E8M0,
    "U16": getattr(torch, "uint16", None),  # torch >= 2.3
    "U32": getattr(torch, "uint32", None),
    "U64": getattr(torch, "uint64", None),
}


class SafetensorsSource(Source):
    """One `.safetensors` file. The header is checked against the file before anything is allocated."""

    def __init__(self, path: Path):
        self._file = OpenedFile(path)
        self._mapped = MappedFile(self._file)
        with self._file.open() as file:
            header, self._data_start = parse_header(path, file, self._file.size_bytes)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.replaces = frozenset(self.metadata.get(REPLACES, "").split())
        for name, entry in header.items():
            if _DTYPES[entry["dtype"]] is None:
                raise SwanError(f"{path}: tensor {name} has the element type {entry['dtype']}; it needs torch 2.3")
        self._offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        infos = {name: TensorInfo(tuple(one["shape"]), _DTYPES[one["dtype"]]) for name, one in header.items()}
        super().__init__([path], infos)

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        info, (start, end) = self._infos[name], self._offsets[name]
        shape = info.shape
        if rows is not None:
            start += rows[0] * ((end - start) // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        tensor = empty(shape, info.dtype)
        self._fill(name, tensor, start)
        return tensor

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        self._fill(name, out, self._offsets[name][0] + start)
        return True

    def extent(self, name: str) -> Extent | None:
        start, end = self._offsets[name]
        return Extent(self._mapped, self._data_start + start, end - start)

    def _fill(self, name: str, tensor: torch.Tensor, start: int) -> None:
        """Read from byte `start` of the data."""
        if tensor.numel():
            self._file.fill(memoryview(tensor.view(-1).view(torch.uint8).numpy()), self._data_start + start, name)


def open_index(path: Path) -> Source:
    """Open the shards that a `.safetensors.index.json` names."""
    shard_of = read_index(path)
    shards = sorted(set(shard_of.values()))
    if len(shards) > _MAX_SHARDS:
        raise SwanError(f"{path}: names {len(shards):,} files, at most {_MAX_SHARDS:,} are allowed")
    absent = [name for name in shards if not os.path.isfile(path.parent / name)]
    if absent:
        raise SwanError(f"{path}: {len(absent)} of {len(shards)} shards are missing: {_some(absent)}")
    source = MergedSource([_open_shard(path, name) for name in shards])
    lost = sorted(set(shard_of) - set(source.keys()))
    if lost:
        raise SwanError(f"{path}: {len(lost)} tensors of the index are in no shard: {_some(lost)}")
    return source


def _open_shard(index: Path, name: str) -> Source:
    if name.endswith(INDEX_SUFFIX):
        raise SwanError(f"{index}: its shard {name} is an index, and not a file of weights")
    return open_container(index.parent / name)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
