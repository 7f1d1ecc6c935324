"""Safetensors files, read with plain reads.

The format is 8 bytes of header length, a JSON header, then the data. Mapping the file (as `safe_open` does) keeps
every page read so far resident, which doubles the memory of a load, and a file cut while mapped ends the process
with SIGBUS; a seek and a read do neither.

Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from wan.errors import SwanError
from wan.weights.safetensors_header import read_header
from wan.weights.source import MergedSource, Source, Span, TensorInfo, truncated

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
    "U16": getattr(torch, "uint16", None),  # torch >= 2.3
    "U32": getattr(torch, "uint32", None),
    "U64": getattr(torch, "uint64", None),
}


class SafetensorsSource(Source):
    """One `.safetensors` file. The header is checked against the file before anything is allocated."""

    def __init__(self, path: Path):
        self._path = path
        header, self._data_start = read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        infos, self._offsets = _check_entries(path, header, self._data_start)
        super().__init__([path], infos)

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        info, (start, end) = self._infos[name], self._offsets[name]
        shape = info.shape
        if rows is not None:
            start += rows[0] * ((end - start) // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        tensor = torch.empty(shape, dtype=info.dtype)
        self._fill(name, tensor, start)
        return tensor

    def read_into(self, name: str, out: torch.Tensor) -> bool:
        self._fill(name, out, self._offsets[name][0])
        return True

    def _fill(self, name: str, tensor: torch.Tensor, start: int) -> None:
        """Read from byte `start` of the data."""
        if tensor.numel() == 0:
            return
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._data_start + start)
            filled = 0
            while filled < len(view):  # one call reads at most 2 GiB
                count = file.readinto(view[filled:])
                if not count:
                    raise SwanError(f"{self._path}: the file ended inside tensor {name}; it changed while being read")
                filled += count


def open_index(path: Path) -> Source:
    """Open the shards that a `.safetensors.index.json` names."""
    try:
        shard_of = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise SwanError(f"{path}: not a safetensors index (no JSON object with a weight_map)") from None
    shards = sorted(set(shard_of.values()))
    absent = [name for name in shards if not (path.parent / name).is_file()]
    if absent:
        raise SwanError(f"{path}: {len(absent)} of {len(shards)} shards are missing: {_some(absent)}")
    from wan.weights.source import open_source

    source = MergedSource([open_source(path.parent / name) for name in shards])
    lost = sorted(set(shard_of) - set(source.keys()))
    if lost:
        raise SwanError(f"{path}: {len(lost)} tensors of the index are in no shard: {_some(lost)}")
    return source


def _check_entries(path: Path, header: dict, data_start: int) -> tuple[dict[str, TensorInfo], dict]:
    """Every tensor's bytes must fit its shape, lie in the file and neither overlap nor leave holes."""
    infos, offsets, order = {}, {}, []
    for name, entry in header.items():
        try:
            dtype_name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sane = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            sane = False
        if not sane:
            raise SwanError(f"{path}: the header entry of tensor {name} is damaged")
        dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise SwanError(f"{path}: tensor {name} has the element type {dtype_name}, which torch cannot hold")
        expected = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if end - start != expected:
            raise SwanError(f"{path}: tensor {name} of shape {list(shape)} needs {expected} bytes, has {end - start}")
        infos[name], offsets[name] = TensorInfo(shape, dtype), (start, end)
        order.append((start, end, name))
    data_end = 0
    for start, end, name in sorted(order):
        if start != data_end:
            raise SwanError(f"{path}: tensor {name} begins at byte {start} of the data, expected {data_end}")
        data_end = end
    size_bytes = path.stat().st_size
    if data_start + data_end > size_bytes:
        raise truncated(path, data_start + data_end, size_bytes)
    if data_start + data_end < size_bytes:
        raise SwanError(f"{path}: {size_bytes - data_start - data_end:,} bytes follow the last tensor")
    return infos, offsets


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
