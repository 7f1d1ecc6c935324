"""Matrices of small floats whose scales are small floats as well: NVFP4, MXFP4, MXFP6 and MXFP8.

    made by   X.weight                            X.weight_scale    beside them
    LightX2V  E2M1, the first in the low half     E4M3 for 16       X.weight_global_scale, or alpha, input_global_scale
    ComfyUI   E2M1, the first in the high half    E4M3 for 16       X.weight_scale_2
    LightX2V  E2M1 likewise, E3M2, E4M3 in bytes  E8M0 for 32       nothing
    ComfyUI   E4M3                                E8M0 for 32       nothing

A weight is code * scale, of NVFP4 code * scale * weight_scale_2, or / weight_global_scale, whose inverse is alpha *
input_global_scale. ComfyUI's files say what they are, see `comfy_quant`; LightX2V's are told by their types, and of
which MX format they are by how many scales there are.

Scales lie as matrix units of GPUs read them: in tiles of 128 rows and four columns, padded with zeros; row 32 a + b of
a tile is its b-th run of 16, there the a-th of four. Sources:
https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout, https://github.com/ModelTC/LightX2V
(lightx2v_kernel), https://github.com/Comfy-Org/comfy-kitchen
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.schemes import E8M0, SCALE_DTYPES, Scheme, pack_rows
from wan.weights.comfy_quant import LEAF, Note
from wan.weights.source import Source
from wan.weights.stored import ACTIVATIONS, Stored, check_finite, label

_NVFP4 = Scheme("nvfp4", torch.uint8, 16, torch.float8_e4m3fn, 4, minifloat=(2, 1), has_row_scale=True)
_MXFP8 = Scheme("mxfp8", torch.float8_e4m3fn, 32, torch.uint8)
_MXFP6 = Scheme("mxfp6", torch.uint8, 32, torch.uint8, 6, minifloat=(3, 2))
_MXFP4 = Scheme("mxfp4", torch.uint8, 32, torch.uint8, 4, minifloat=(2, 1))
_BY_FORMAT = {"nvfp4": _NVFP4, "mxfp8": _MXFP8}  # as `comfy_quant` calls them
TILE_ROWS, _TILE_COLUMNS = 128, 4
# Where a scale for the whole matrix is, by last parts of names: one number, its inverse, or two to be multiplied.
_COMFY, _INVERSE, _FACTORS = "weight_scale_2", "weight_global_scale", ("alpha", "input_global_scale")
_BESIDE = (_COMFY, _INVERSE, *_FACTORS, "input_absmax", *ACTIVATIONS, LEAF)


@dataclass(frozen=True)
class BlockFloats(Stored):
    """scales: name of the tensor; whole: names of those that make the scale of the whole matrix; is_high_first: whether
    the first of two codes is in the high half of its byte."""

    scales: str
    whole: tuple[str, ...]
    is_high_first: bool

    def pack(self, source: Source, name: str, first: int, last: int) -> Tensor:
        codes = source.read(name, (first, last)).view(torch.uint8)
        if self.is_high_first:
            codes = codes << 4 | codes >> 4
        scales = self._block_scales(source, first, last)
        if self.scheme.has_row_scale:
            grouped = codes.unflatten(1, (scales.shape[1], -1))
            if ((scales.float() == 0) & (grouped & 0x77).any(-1)).any():
                where = f"tensor {self.scales} holds a scale of zero for codes that are not"
                raise SwanError(f"{source.describe()}: {where}: the file is damaged")
        return pack_rows(self.scheme, self.shape[1], codes, scales, row_scales=self._whole_scale(source))

    def _block_scales(self, source: Source, first: int, last: int) -> Tensor:
        """Of some rows, [rows, groups], out of their tiles."""
        start, end = first // TILE_ROWS * TILE_ROWS, _padded(last, TILE_ROWS)
        tiles = source.read(self.scales, (start, end)).view(torch.uint8)
        by_tile = tiles.view(-1, tiles.shape[1] // _TILE_COLUMNS, 32, 4, _TILE_COLUMNS)
        in_order = by_tile.permute(0, 3, 2, 1, 4).reshape(tiles.shape)
        scales = in_order[first - start : last - start, : self.scheme.groups(self.shape[1])].contiguous()
        return check_finite(source, self.scales, scales.view(self.scheme.scale_dtype))

    def _whole_scale(self, source: Source) -> Tensor | None:
        """fp32 [1, 1]."""
        if not self.whole:
            return None
        numbers = [source.read(name).float().reshape(1, 1) for name in self.whole]
        scale = numbers[0] if len(numbers) == 1 else numbers[0] * numbers[1]
        if self.whole[0].endswith(_INVERSE):
            scale = 1 / scale
        if not scale.isfinite().all() or not scale.all():
            told = " * ".join(self.whole)
            raise SwanError(f"{source.describe()}: {told} makes no scale: the file is damaged")
        return scale


def find_block_floats(
    source: Source, name: str, path: str, names: Collection[str], note: Note | None
) -> BlockFloats | None:
    """What makes up the matrix `name`, X.weight, of path X; None if it is none of these, or not all of it is here.

    Raises SwanError for what does not fit together.
    """
    scale = f"{path}.weight_scale"
    if note is not None:
        scheme = _BY_FORMAT.get(note.format)
        whole = (f"{path}.{_COMFY}",) if scheme is _NVFP4 else ()
        lost = [one for one in (scale, *whole) if one not in names]
        if scheme is not None and lost:
            raise SwanError(f"{source.describe()}: {name} is {note.format}, by {note.where}, and has no {lost[0]}")
    else:
        scheme = _told_by_types(source, name, scale, names)
        whole = _lightx2v_whole(path, names) if scheme is _NVFP4 else ()
        if scheme is _NVFP4 and not whole:
            return None
    if scheme is None:
        return None
    rows, size_bytes = source.info(name).shape
    columns = size_bytes * 8 // scheme.bits
    _check_shape(source, name, scheme, (rows, columns), scale)
    for one in whole:
        info = source.info(one)
        if info.shape not in ((), (1,), (1, 1)) or info.dtype not in SCALE_DTYPES:
            held = f"{label(info.dtype)} {list(info.shape)}"
            raise SwanError(f"{source.describe()}: {one} is {held}, and {name} needs one number")
    hidden = (scale, *(f"{path}.{leaf}" for leaf in _BESIDE if f"{path}.{leaf}" in names))
    return BlockFloats(scheme, (rows, columns), hidden, scale, whole, note is not None and scheme is _NVFP4)


def tiled(scales: Tensor) -> Tensor:
    """Scales [rows, groups] -> as they lie in a file, padded with zeros."""
    rows, groups = scales.shape
    whole = torch.zeros(tiled_shape(rows, groups), dtype=torch.uint8)
    whole[:rows, :groups] = scales.view(torch.uint8)
    by_tile = whole.view(-1, 4, 32, whole.shape[1] // _TILE_COLUMNS, _TILE_COLUMNS).permute(0, 3, 2, 1, 4)
    return by_tile.reshape(whole.shape).view(scales.dtype)


def tiled_shape(rows: int, groups: int) -> tuple[int, int]:
    return _padded(rows, TILE_ROWS), _padded(groups, _TILE_COLUMNS)


def lost_scales(source: Source, name: str, names: Collection[str]) -> str:
    """What a matrix of LightX2V's NVFP4 lacks, in words; "" for any other."""
    path = name.removesuffix(".weight")
    if _told_by_types(source, name, f"{path}.weight_scale", names) is not _NVFP4 or f"{path}.{_COMFY}" in names:
        return ""
    return f"{path}.{_INVERSE}, nor both of {' and '.join(f'{path}.{one}' for one in _FACTORS)}"


def _told_by_types(source: Source, name: str, scale: str, names: Collection[str]) -> Scheme | None:
    """Of a matrix of LightX2V."""
    info = source.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 2 or scale not in names:
        return None
    scales = source.info(scale)
    if scales.dtype == torch.float8_e4m3fn:
        return _NVFP4
    if scales.dtype != E8M0:
        return None
    rows, size_bytes = info.shape
    fits = [one for one in (_MXFP8, _MXFP6, _MXFP4) if scales.shape == _tiled_shape(one, rows, size_bytes)]
    if len(fits) == 1:
        return fits[0]
    told = f"{scale} has the shape {list(scales.shape)}"
    if not fits:
        raise SwanError(f"{source.describe()}: {told}, which fits {name} in no MX format: {_needed(rows, size_bytes)}")
    raise SwanError(f"{source.describe()}: {told}: {name} may be {' or '.join(one.name for one in fits)}")


def _needed(rows: int, size_bytes: int) -> str:
    shapes = ((one.name, _tiled_shape(one, rows, size_bytes)) for one in (_MXFP8, _MXFP6, _MXFP4))
    return ", ".join(f"{name} needs {list(shape)}" for name, shape in shapes if shape)


def _lightx2v_whole(path: str, names: Collection[str]) -> tuple[str, ...]:
    """Names of what makes the scale of the whole matrix, if it is all there."""
    for leaves in ((_INVERSE,), _FACTORS):
        if all(f"{path}.{leaf}" in names for leaf in leaves):
            return tuple(f"{path}.{leaf}" for leaf in leaves)
    return ()


def _tiled_shape(scheme: Scheme, rows: int, size_bytes: int) -> tuple[int, int] | None:
    """Of the scales of a matrix with so many bytes of codes a row; None where these are no whole number of groups."""
    group_bytes = scheme.code_bytes(scheme.group)
    if size_bytes % group_bytes:
        return None
    return tiled_shape(rows, size_bytes // group_bytes)


def _check_shape(source: Source, name: str, scheme: Scheme, shape: tuple[int, int], scale: str) -> None:
    rows, columns = shape
    if columns % scheme.group:
        way = f"{scheme.name}, and rows of {columns} are no whole number of groups of {scheme.group}"
        raise SwanError(f"{source.describe()}: {name} is {way}")
    needed, info = _tiled_shape(scheme, rows, scheme.code_bytes(columns)), source.info(scale)
    if info.shape != needed:
        told = f"{scale} has the shape {list(info.shape)}"
        raise SwanError(f"{source.describe()}: {told}, and {name} ({scheme.name}) needs {list(needed)}, in tiles")
    stored = torch.float8_e4m3fn if scheme is _NVFP4 else E8M0
    if info.dtype not in (stored, torch.uint8):
        held = f"{label(info.dtype)} scales, and {scheme.name} has {label(stored)}"
        raise SwanError(f"{source.describe()}: {scale} holds {held}")


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
