"""What a file says about how its matrices are stored, as ComfyUI's do: in a tensor `X.comfy_quant` beside each
`X.weight`, bytes of JSON, or in `_quantization_metadata` in the header, for all layers together.

    {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}
    {"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}, ...}}

What is known is taken, what is not is refused by its name. Formats: https://github.com/Comfy-Org/ComfyUI
(QUANTIZATION.md, quant_ops.py) and https://github.com/silveroxides/convert_to_quant (by rows and blocks).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wan.errors import SwanError, one_line, printable
from wan.files import parse_json
from wan.weights.source import Source

LEAF = "comfy_quant"
_HEADER = "_quantization_metadata"
_MAX_NOTE_BYTES, _MAX_HEADER_CHARS = 1 << 16, 4 << 20
_BLOCK = 128  # where a note gives no size
# Format -> the type of its codes, and what shares a scale: "row", "block", or None for what the scales' shape says.
_FORMATS: dict[str, tuple[torch.dtype, str | None]] = {
    "float8_e4m3fn": (torch.float8_e4m3fn, None),
    "float8_e4m3fn_rowwise": (torch.float8_e4m3fn, "row"),
    "float8_e4m3fn_blockwise": (torch.float8_e4m3fn, "block"),
    "float8_e5m2": (torch.float8_e5m2, None),
    "int8_tensorwise": (torch.int8, None),
    "int8_blockwise": (torch.int8, "block"),
    "nvfp4": (torch.uint8, None),  # these two in `block_floats`
    "mxfp8": (torch.float8_e4m3fn, None),
}
_GROUPS = {"nvfp4": 16, "mxfp8": 32}  # of one size only, and never rotated
# How to multiply, and what the weights once were: no matter for one that dequantises.
_HINTS = ("full_precision_matrix_mult", "orig_dtype", "orig_shape")
_KEYS = ("format", "convrot", "convrot_groupsize", "weight_rotated", "per_row", "per_channel", "group_size", *_HINTS)


@dataclass(frozen=True)
class Note:
    """What is said of one matrix.

    rotation: see `Scheme`. per_row: whether each row has a scale of its own; None if nothing is said. block: rows and
    columns that share a scale; 0 where the shape of the scales says it. where: what says so.
    """

    format: str
    code_dtype: torch.dtype
    rotation: int = 0
    per_row: bool | None = dataclasses.field(default=None, compare=False)  # the scales themselves tell
    block: int = 0
    where: str = dataclasses.field(default="", compare=False)


def make_note(format: str) -> torch.Tensor:
    """What `X.comfy_quant` holds of a matrix in this format."""
    return torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)


def read_notes(source: Source) -> dict[str, Note]:
    """Name of a weight -> what the file says of it. Raises SwanError, one line, for what is damaged or unknown, for
    weights that are not there, and where tensor and header differ."""
    told: dict[str, Note] = {}
    names = set(source.keys())
    for name in source.keys():
        path, _, leaf = name.rpartition(".")
        if leaf == LEAF:
            weight = f"{path}.weight"
            if weight not in names:
                lost = f"{printable(name)} belongs to {printable(weight)}"
                raise SwanError(f"{source.describe()}: {lost}, which is not there")
            told[weight] = _note(source, weight, name, _read_tensor(source, name))
    for part in source.parts():
        for weight, value in _layers(part, names).items():
            note = _note(source, weight, f"{_HEADER} of the header", value)
            if told.setdefault(weight, note) != note:
                raise SwanError(f"{source.describe()}: {told[weight].where} and {note.where} differ about {weight}")
    return told


def _read_tensor(source: Source, name: str) -> Any:
    info = source.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.shape[0] > _MAX_NOTE_BYTES:
        raise SwanError(f"{source.describe()}: tensor {printable(name)} is no text: the file is damaged")
    try:
        return parse_json(bytes(source.read(name).tolist()))
    except ValueError as error:
        raise SwanError(f"{source.describe()}: tensor {printable(name)} is not JSON ({one_line(error)})") from None


def _layers(source: Source, names: Collection[str]) -> dict[str, Any]:
    """Name of a weight, one of `names` -> what the header of one file says of it."""
    text = getattr(source, "metadata", {}).get(_HEADER)
    if text is None:
        return {}
    where = f"{source.describe()}: {_HEADER} in the header"
    try:
        if not isinstance(text, str) or len(text) > _MAX_HEADER_CHARS:
            raise ValueError("no text of usual length")
        told = parse_json(text)
    except ValueError as error:
        raise SwanError(f"{where} is not JSON ({one_line(error)})") from None
    if not isinstance(told, dict) or not isinstance(told.get("layers"), dict):
        raise SwanError(f"{where} has no layers: an unknown way to say how weights are stored")
    if str(version := told.get("format_version", 1)).split(".")[0] != "1":
        raise SwanError(f"{where} is of version {printable(version)[:20]}, which is not known")
    return _by_weight(where, told["layers"], names)


def _by_weight(where: str, layers: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The layers by the names of their weights, which may have a prefix that the header leaves out."""
    prefix = ""
    lost = next((layer for layer in layers if f"{layer}.weight" not in names), None)
    if lost is not None:
        found = [name.removesuffix(f"{lost}.weight") for name in names if name.endswith(f".{lost}.weight")]
        prefix = min(found, key=len, default="")
    told = {}
    for layer, value in layers.items():
        weight = next((one for one in (f"{layer}.weight", f"{prefix}{layer}.weight") if one in names), None)
        if weight is None:
            raise SwanError(f"{where} speaks of {printable(layer)}, which has no weight in the file")
        told[weight] = value
    return told


def _note(source: Source, weight: str, where: str, value: Any) -> Note:
    said = {"format": value} if isinstance(value, str) else value
    start = f"{source.describe()}: {printable(where)} says of {printable(weight)}"
    if not isinstance(said, dict):
        raise SwanError(f"{start} nothing that can be understood")
    if isinstance(said.get("params"), dict):  # where older files have the rest
        said = said["params"] | {key: one for key, one in said.items() if key != "params"}
    info = source.info(weight)
    is_int8 = info.dtype == torch.int8 and ("convrot" in said or "per_row" in said)
    name = said.get("format", "int8_tensorwise" if is_int8 else None)
    if not isinstance(name, str) or name not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise SwanError(f"{start}: format {_shown(name)}, which is not read; formats that are: {known}")
    code_dtype, shared = _FORMATS[name]
    keys = ("format", *_HINTS) if name in _GROUPS else _KEYS
    for key, one in said.items():
        is_usual = key == "group_size" and one == _GROUPS.get(name)
        if key not in keys and one not in (None, False) and not is_usual:
            raise SwanError(f"{start}: format {name} with {_shown(key)}: {_shown(one)}, which is not known")
    _check_codes(start, name, info, code_dtype)
    return Note(
        name,
        code_dtype,
        _rotation(start, said, info.shape[1]),
        True if shared == "row" else _flag(start, said, "per_row", _flag(start, said, "per_channel", None)),
        _whole(start, said, "group_size", _BLOCK) if shared == "block" else 0,
        where,
    )


def _check_codes(start: str, name: str, info: Any, code_dtype: torch.dtype) -> None:
    """fp8 codes may be stored as plain bytes."""
    held = [code_dtype] if code_dtype == torch.int8 else [code_dtype, torch.uint8]
    if info.dtype not in held or len(info.shape) != 2:
        stored = f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
        raise SwanError(f"{start}: format {name}, and it is {stored}")


def _rotation(start: str, said: Mapping[str, Any], columns: int) -> int:
    is_rotated = bool(_flag(start, said, "convrot", False))
    if bool(_flag(start, said, "weight_rotated", is_rotated)) != is_rotated:
        raise SwanError(f"{start}: convrot {is_rotated}, and weight_rotated {not is_rotated}")
    if not is_rotated:
        return 0
    group = _whole(start, said, "convrot_groupsize", 256)
    power = 4
    while power < group:
        power *= 4
    if power != group or columns % group:
        fits = "which is no power of 4" if power != group else f"and its rows have {columns} columns"
        raise SwanError(f"{start}: rotated in groups of {group}, {fits}")
    return group


def _flag(start: str, said: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = said.get(key)
    if value is not None and not isinstance(value, bool):
        raise SwanError(f"{start}: {key} {_shown(value)}, which is neither true nor false")
    return default if value is None else value


def _whole(start: str, said: Mapping[str, Any], key: str, default: int) -> int:
    value = said.get(key, default)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise SwanError(f"{start}: {key} {_shown(value)}, which is no size")
    return value


def _shown(value: Any) -> str:
    return printable(repr(value))[:60]
