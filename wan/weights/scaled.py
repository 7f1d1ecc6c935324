"""Quantised tensors that lie in a file as codes beside their scales: fp8 and int8 of LightX2V, scaled fp8 of ComfyUI,
affine codes of MLX.

    X.weight              beside it                        a weight is
    float8 or int8        X.weight_scale, X.scale_weight   code * scale; scales: one, one a row, or one for 128 x 128
    uint32, packed        X.scales, X.biases               code * scale + bias; for each 32, 64 or 128 columns of a row

Those whose scales are small floats as well (NVFP4, MX formats) are in `block_floats`. A float8 weight with no scale is
an ordinary tensor, which is cast. Where the file says how a matrix is stored, see `comfy_quant`, its tensors have to
agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.ggml import GGMLType
from wan.quant.packed import PackedTensor
from wan.quant.schemes import FLOAT8, SCALE_DTYPES, Scheme, pack_rows
from wan.weights.block_floats import find_block_floats, lost_scales
from wan.weights.comfy_quant import LEAF, Note, read_notes
from wan.weights.containers.mapped import Extent
from wan.weights.source import Source, Span, TensorInfo, config_beside
from wan.weights.stored import ACTIVATIONS, Stored, check_finite, label

_SCALES = ("weight_scale", "scale_weight")
_BLOCK = 128
_GROUPS = (32, 64, 128)
_NAMES = {torch.int8: "int8", **dict.fromkeys(FLOAT8, "fp8")}
_READ = (
    "fp8 and int8 with a scale for the tensor, each row or blocks of 128, NVFP4, MXFP4, MXFP6, MXFP8, and MLX's 4 and 8"
    " bits, are read"
)
# Last parts of names that other ways to quantise use: none is a parameter of a model here.
_FOREIGN = re.compile(
    r"weight_scale_\w+|weight_global_scale|input_global_scale|input_absmax|pre_quant_scale|qweight|qzeros|absmax"
    r"|quant_map|bitsandbytes__\w+|scales|biases|" + "|".join((*_SCALES, *ACTIVATIONS))
)


@dataclass(frozen=True)
class WithScales(Stored):
    """scales, offsets: names of these tensors; rows_per_scale: for how many rows one row of scales holds."""

    scales: str
    offsets: str | None
    rows_per_scale: int

    def pack(self, source: Source, name: str, first: int, last: int) -> Tensor:
        codes = source.read(name, (first, last))
        scales = self._numbers(source, self.scales, first, last)
        if not scales.all():
            raise SwanError(f"{source.describe()}: tensor {self.scales} holds a scale of zero: the file is damaged")
        offsets = self._numbers(source, self.offsets, first, last) if self.offsets else None
        return pack_rows(self.scheme, self.shape[1], codes, scales, offsets)

    def _numbers(self, source: Source, name: str, first: int, last: int) -> Tensor:
        """Scales or offsets of some rows, [rows, groups]."""
        groups = self.scheme.groups(self.shape[1])
        if self.rows_per_scale == 1 and source.info(name).shape[0] == self.shape[0]:
            numbers = source.read(name, (first, last)).reshape(last - first, groups)
        else:
            whole = source.read(name).reshape(-1, groups)
            numbers = whole[torch.arange(first, last) // self.rows_per_scale]
        return check_finite(source, name, numbers)


class ScaledSource(Source):
    """A source whose quantised tensors are one with their scales: they have their true shape and are dequantised when
    read. Their companions are in no list."""

    def __init__(self, inner: Source, stored: dict[str, Stored]):
        self._inner, self._stored = inner, stored
        self.metadata = getattr(inner, "metadata", {})
        hidden = {name for one in stored.values() for name in one.hidden}
        infos = {name: inner.info(name) for name in inner.keys() if name not in hidden}
        infos |= {name: TensorInfo(one.shape, torch.float32) for name, one in stored.items()}
        super().__init__(inner.paths, infos)

    def read(self, name: str, rows: Span | None = None) -> Tensor:
        packed = self.packed(name, rows=rows) if name in self._stored else None
        return self._inner.read(name, rows) if packed is None else packed.dequantize()

    def read_into(self, name: str, out: Tensor, start: int = 0) -> bool:
        return name not in self._stored and self._inner.read_into(name, out, start)

    def extent(self, name: str) -> Extent | None:
        return None if name in self._stored else self._inner.extent(name)

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        one = self._stored.get(name)
        if one is None:
            return self._inner.packed(name, mapped, rows)
        first, last = rows or (0, one.shape[0])
        return PackedTensor(one.scheme, (last - first, one.shape[1]), one.pack(self._inner, name, first, last))

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        return self._stored[name].scheme if name in self._stored else self._inner.block_type(name)


def join_scales(source: Source) -> Source:
    """`source` with its quantised tensors made one with their scales; itself if there are none.

    Tensors whose scales are not in it stay as they are (they may be in another file of the same checkpoint), see
    `check_scales`. Raises SwanError for scales of a wrong shape or type.
    """
    names, notes = set(source.keys()), read_notes(source)
    stored = {}
    for name in source.keys():
        path, _, leaf = name.rpartition(".")
        shape = source.info(name).shape
        if leaf != "weight" or len(shape) != 2 or 0 in shape or source.block_type(name) is not None:
            continue
        found = _find(source, name, path, names, notes.get(name))
        if found is not None:
            stored[name] = found
    _check_unsaid(source, stored, notes)
    return ScaledSource(source, stored) if stored else source


def check_scales(source: Source) -> None:
    """Raises SwanError, one line, for a quantised tensor without scales, scales without a tensor, or both in a way of
    quantising that is not read."""
    names = set(source.keys())
    for name in source.keys():
        path, _, leaf = name.rpartition(".")
        if _FOREIGN.fullmatch(leaf) and path and (leaf not in ("scales", "biases") or f"{path}.weight" in names):
            _refuse(source, name, f"{path}.weight", names)
        dtype = source.info(name).dtype
        if leaf == "weight" and dtype in (torch.int8, torch.uint32) and source.block_type(name) is None:
            lacks = f"{path}.weight_scale" if dtype == torch.int8 else f"{path}.scales and {path}.biases"
            raise SwanError(f"{source.describe()}: {name} holds {label(dtype)} codes, and there is no {lacks}")
    _check_twins(source)


def _refuse(source: Source, name: str, weight: str, names: set[str]) -> None:
    if weight in names and source.block_type(weight) is None:
        if lost := lost_scales(source, weight, names):
            raise SwanError(f"{source.describe()}: {weight} is NVFP4, and there is no {lost}")
        what = f"{weight} ({label(source.info(weight).dtype)}, with {name}) is quantised in an unknown way"
        raise SwanError(f"{source.describe()}: {what}; {_READ}")
    if weight not in names and name.endswith(_SCALES):
        raise SwanError(f"{source.describe()}: {name} belongs to {weight}, which is not there")
    raise SwanError(f"{source.describe()}: {name} is part of an unknown way of quantising; {_READ}")


def _check_twins(source: Source) -> None:
    """An fp8 matrix without a scale, where those of the same name in other blocks have one, lost it."""
    scaled = {_pattern(name): name for name in source.keys() if isinstance(source.block_type(name), Scheme)}
    for name in source.keys():
        if source.info(name).dtype in FLOAT8 and (twin := scaled.get(_pattern(name))):
            raise SwanError(f"{source.describe()}: {name} is fp8 without a scale, and {twin} has one")


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name, count=1)


def _check_unsaid(source: Source, stored: Mapping[str, Stored], notes: Mapping[str, Note]) -> None:
    """Of a matrix that the file says nothing of, where it speaks of those of the same name in other blocks, nobody
    knows whether it is rotated."""
    said = {_pattern(name): note for name, note in notes.items()}
    for name in stored:
        if name not in notes and (note := said.get(_pattern(name))):
            raise SwanError(f"{source.describe()}: nothing says how {name} is stored, as {note.where} does for others")


def _find(source: Source, name: str, path: str, names: set[str], note: Note | None) -> Stored | None:
    """What makes up the matrix `name`; None if it is not quantised, or not all of it is here."""
    dtype = source.info(name).dtype
    if found := find_block_floats(source, name, path, names, note):
        return found
    if dtype in _NAMES or note:
        scales = [f"{path}.{leaf}" for leaf in _SCALES if f"{path}.{leaf}" in names]
        if len(scales) > 1:
            raise SwanError(f"{source.describe()}: {name} has two scales, {' and '.join(scales)}")
        if note and not scales:
            raise SwanError(f"{source.describe()}: {name} is {note.format}, by {note.where}, and has no weight_scale")
        return _scaled(source, name, scales[0], path, names, note) if scales else None
    if dtype == torch.uint32 and {f"{path}.scales", f"{path}.biases"} <= names:
        return _affine(source, name, path)
    return None


def _scaled(source: Source, name: str, scale: str, path: str, names: set[str], note: Note | None) -> Stored:
    (height, columns), dtype = source.info(name).shape, source.info(name).dtype
    told, scale_dtype = source.info(scale).shape, _scale_dtype(source, scale)
    size = note.block if note and note.block else _BLOCK
    blocks = (-(-height // size), -(-columns // size))
    if told == blocks and note and note.block:
        group, rows_per_scale = size, size
    elif told in ((), (1,), (1, 1)):
        group, rows_per_scale = columns, max(height, 1)
    elif told in ((height,), (height, 1), (1, height)):
        group, rows_per_scale = columns, 1
    elif told == blocks:
        group, rows_per_scale = size, size
    else:
        fits = f"[], [{height}, 1] or {list(blocks)}"
        raise SwanError(f"{source.describe()}: {scale} has the shape {list(told)}, and {name} needs {fits}")
    if note:
        _check_shared(source, note, scale, (group, rows_per_scale), (columns, height))
        dtype = note.code_dtype
    beside = (*ACTIVATIONS, LEAF)
    hidden = (scale, *(f"{path}.{leaf}" for leaf in beside if f"{path}.{leaf}" in names))
    rotation = note.rotation if note else 0
    label = _NAMES[dtype] + ("-rotated" if rotation else "")
    scheme = Scheme(label, dtype, group, scale_dtype, rotation=rotation)
    return WithScales(scheme, (height, columns), hidden, scale, None, rows_per_scale)


def _check_shared(source: Source, note: Note, scale: str, found: tuple[int, int], whole: tuple[int, int]) -> None:
    """What shares a scale, by the shape of the scales and by what the file says."""
    columns, height = whole
    is_blocks, is_rows = note.block > 0, found == (columns, 1) and height > 1
    said = "blocks" if is_blocks else {True: "rows", False: "the tensor", None: ""}[note.per_row]
    fits = found == (note.block, note.block) if is_blocks else note.per_row in (None, is_rows) or height == 1
    if not fits or (not is_blocks and found[0] != columns):
        shape = list(source.info(scale).shape)
        what = f"{note.format}{f', with scales of {said},' if said else ''} by {note.where}"
        raise SwanError(f"{source.describe()}: {scale} has the shape {shape}, which does not fit {what}")


def _affine(source: Source, name: str, path: str) -> Stored:
    scales, offsets = f"{path}.scales", f"{path}.biases"
    (height, words), told = source.info(name).shape, source.info(scales).shape
    if source.info(offsets).shape != told or _scale_dtype(source, scales) != _scale_dtype(source, offsets):
        raise SwanError(f"{source.describe()}: {scales} {list(told)} and {offsets} differ in shape or type")
    if len(told) != 2 or told[0] != height or not told[1]:
        raise SwanError(f"{source.describe()}: {scales} has the shape {list(told)}, and {name} has {height} rows")
    fits = [(bits, group) for bits in (4, 8) for group in _GROUPS if words * 32 == told[1] * group * bits]
    said = _mlx_config(source)
    if said:
        if said["bits"] not in (4, 8) or said["group_size"] not in _GROUPS:
            way = f"MLX's {said['bits']} bits in groups of {said['group_size']}"
            raise SwanError(f"{source.describe()}: {name} is in {way}, by config.json; {_READ}")
        fits = [one for one in fits if one == (said["bits"], said["group_size"])]
    if not fits:
        by = f" for {said['bits']} bits in groups of {said['group_size']}, as config.json has it" if said else ""
        raise SwanError(f"{source.describe()}: {scales} has the shape {list(told)}, which does not fit {name}{by}")
    if len(fits) > 1:
        told = " or ".join(f"{bits} bits in groups of {group}" for bits, group in fits)
        raise SwanError(f"{source.describe()}: {name} is in {told}; the config.json that tells is not beside it")
    bits, group = fits[0]
    scheme = Scheme(f"affine{bits}", torch.uint8, group, _scale_dtype(source, scales), bits, has_offsets=True)
    return WithScales(scheme, (height, words * 32 // bits), (scales, offsets), scales, offsets, 1)


def _mlx_config(source: Source) -> dict[str, int] | None:
    """`bits` and `group_size` in the config.json beside the weights, if it has them."""
    told = config_beside(source).get("quantization")
    try:
        return {key: int(told[key]) for key in ("bits", "group_size")}
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _scale_dtype(source: Source, name: str) -> torch.dtype:
    dtype = source.info(name).dtype
    if dtype not in SCALE_DTYPES:
        raise SwanError(f"{source.describe()}: {name} holds {label(dtype)} scales, an unknown way; {_READ}")
    return dtype
