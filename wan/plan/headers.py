"""What a weight file holds, by its header alone: names, sizes and types of tensors. No torch, nothing is checked.

`weights.source.open_source` reads the same files and refuses what is wrong with them. Here, what cannot be understood
is None, and the plan goes by the shapes of the task.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wan.errors import SwanError
from wan.files import open_plain, read_json
from wan.weights import gguf_header, safetensors_header

_ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "U32")  # of weights whose scales lie beside them
_SCALES = ("weight_scale", "scale_weight", "scales")
_BESIDE = re.compile(r"(.*)\.(weight_scale|scale_weight|scales|biases|input_scale|scale_input|comfy_quant)")
_GGUF_SLOW = "IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S IQ1_M TQ1_0 TQ2_0 MXFP4".split()  # are never kept packed


@dataclass(frozen=True)
class Held:
    """A stored tensor. weights: how many; stored: bytes, with its scales; itemsize: of one weight, 0 if quantised."""

    name: str
    weights: int
    axes: int
    stored: int
    itemsize: int
    stays_packed: bool = False


def read_held(paths: Iterable[Path]) -> list[Held] | None:
    """The tensors of all files of a checkpoint; None where one of them is no safetensors or GGUF file."""
    held: list[Held] = []
    for path in paths:
        found = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SwanError):
            found = _read_one(path)
        if found is None:
            return None
        held += found
    return held


def _read_one(path: Path) -> list[Held] | None:
    if path.name.endswith(".index.json"):
        shards = set(safetensors_header.read_index(path).values())
        return read_held(path.parent / name for name in sorted(shards))
    if not is_gguf(path):
        return _of_safetensors(safetensors_header.read_header(path)[0], path)
    with path.open("rb") as file:
        return [_of_gguf(entry) for entry in gguf_header.read_header(path, file, path.stat().st_size).tensors]


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with contextlib.suppress(SwanError, OSError), open_plain(path) as file:
        return file.read(4) == b"GGUF"
    return False


def _of_safetensors(header: dict, path: Path) -> list[Held]:
    header.pop("__metadata__", None)
    beside = {}
    for name, entry in header.items():
        if match := _BESIDE.fullmatch(name):
            start, end = entry["data_offsets"]
            beside[match[1]] = beside.get(match[1], 0) + end - start
    held = []
    for name, entry in header.items():
        module = name.removesuffix(".weight")
        if _BESIDE.fullmatch(name) and f"{_BESIDE.fullmatch(name)[1]}.weight" in header:
            continue
        start, end = entry["data_offsets"]
        shape, type_name = entry["shape"], entry["dtype"]
        is_packed = type_name in _CODES and any(f"{module}.{leaf}" in header for leaf in _SCALES)
        weights = math.prod(shape)
        if is_packed and type_name == "U32":
            weights = weights * 32 // _mlx_bits(path)
        itemsize = 0 if is_packed else _ITEMSIZE.get(type_name, 1)
        stored = end - start + (beside.get(module, 0) if is_packed else 0)
        held.append(Held(name, weights, len(shape), stored, itemsize, is_packed))
    return held


def _mlx_bits(path: Path) -> int:
    """As its config.json says; else 4."""
    try:
        return int(read_json(path.parent / "config.json")["quantization"]["bits"])
    except (SwanError, ValueError, OverflowError, KeyError, TypeError):
        return 4


def _of_gguf(entry: gguf_header.TensorEntry) -> Held:
    kind, weights = entry.type, math.prod(entry.ne)
    is_packed = kind.torch_name is None
    stays = is_packed and kind.name not in _GGUF_SLOW and len(entry.ne) == 2 and entry.name.endswith(".weight")
    return Held(entry.name, weights, len(entry.ne), entry.size_bytes, 0 if is_packed else kind.block_bytes, stays)
