"""The header of a safetensors file: a JSON object, tensor -> element type, shape and place. No torch.

Also the index of a checkpoint in several such files. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from wan.errors import SwanError
from wan.files import parse_json, read_json
from wan.weights.containers.opened import OpenedFile
from wan.weights.source import MAX_BYTES, truncated

# Bytes of an element, for all types that torch has.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
_MAX_DIMS = 16


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Parsed and checked header, and the offset at which the data begins."""
    opened = OpenedFile(path)
    with opened.open() as file:
        return parse_header(path, file, opened.size_bytes)


def parse_header(path: Path, file: BinaryIO, size_bytes: int) -> tuple[dict[str, Any], int]:
    """The same of a file that is open, and at its start.

    Tensor -> {"dtype", "shape", "data_offsets"}, and perhaps "__metadata__" -> texts. Every tensor's bytes fit its
    shape, lie in the file and neither overlap nor leave holes. Raises SwanError.
    """
    header_bytes = int.from_bytes(file.read(8), "little")
    if size_bytes < 8 or header_bytes > _MAX_HEADER_BYTES:
        raise SwanError(f"{path}: not a safetensors file (header length {header_bytes:,} of {size_bytes:,} bytes)")
    data_start = 8 + header_bytes
    if data_start > size_bytes:
        raise truncated(path, data_start, size_bytes, "at least ")
    try:
        header = parse_json(file.read(header_bytes), unique=True)
    except ValueError as error:
        raise SwanError(f"{path}: the safetensors header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise SwanError(f"{path}: the safetensors header is damaged (not a JSON object)")
    _check_metadata(path, header)
    data_end = data_start + _check_entries(path, header)
    if data_end > size_bytes:
        raise truncated(path, data_end, size_bytes)
    if data_end < size_bytes:
        raise SwanError(f"{path}: {size_bytes - data_end:,} bytes follow the last tensor")
    return header, data_start


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, of a `.safetensors.index.json`: a name below the index's folder.

    Raises SwanError for what is no index, or names a file elsewhere. (A link is no such name: who made it has put the
    file there. The hub's cache consists of links.)
    """
    content = read_json(path, unique=True)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise SwanError(f"{path}: not a safetensors index (no JSON object with a weight_map of tensors)")
    for tensor, name in shard_of.items():
        if not isinstance(name, str) or not _is_below(name):
            told = f"{name[:200]!r}" if isinstance(name, str) else f"a {type(name).__name__}"
            raise SwanError(f"{path}: {tensor} is said to be in {told}, which is no file name below this folder")
    return {tensor: PurePosixPath(name).as_posix() for tensor, name in shard_of.items()}  # a//b is a/b


def _is_below(name: str) -> bool:
    """Whether it is a relative path that stays in its folder, on any system."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    is_absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return bool(parts) and not is_absolute and ".." not in parts and "\0" not in name


def _check_metadata(path: Path, header: dict[str, Any]) -> None:
    metadata = header.get("__metadata__")
    if metadata is None:
        header.pop("__metadata__", None)
    elif not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SwanError(f"{path}: the safetensors header is damaged (__metadata__ is no object of texts)")


def _check_entries(path: Path, header: dict[str, Any]) -> int:
    """Where the last tensor ends, counted from where the data begins."""
    order = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sane = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_DIMS
            sane = sane and all(type(number) is int and 0 <= number <= MAX_BYTES for number in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            sane = False
        if not sane:
            raise SwanError(f"{path}: the header entry of tensor {name} is damaged")
        if dtype not in ITEMSIZE:
            raise SwanError(f"{path}: tensor {name} has the element type {dtype}, which torch cannot hold")
        expected = math.prod(shape) * ITEMSIZE[dtype]
        if end < start:
            raise SwanError(f"{path}: tensor {name} ends at byte {end} of the data, before it begins at {start}")
        if end - start != expected:
            raise SwanError(f"{path}: tensor {name} of shape {shape} needs {expected} bytes, has {end - start}")
        if math.prod(size or 1 for size in shape) > MAX_BYTES:
            raise SwanError(f"{path}: tensor {name} has the impossible shape {shape}: the header is damaged")
        order.append((start, end, name))
    data_end = 0
    for start, end, name in sorted(order):
        if start != data_end:
            raise SwanError(f"{path}: tensor {name} begins at byte {start} of the data, expected {data_end}")
        data_end = end
    return data_end
