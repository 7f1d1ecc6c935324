"""Matrices of codes with scales, as LightX2V, ComfyUI and MLX store them: the definition of the formats.

A weight is code * scale, for MLX code * scale + offset, for NVFP4 code * scale * row scale, in fp32. Files keep these
as tensors of their own; here one row of a matrix is one run of bytes with all of them in it, so that whatever cuts a
matrix by rows (ranks, look-ups, loading) needs to know of one tensor only.

Floats of 4, 6 and 8 bits and E8M0: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wan import kernels

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # torch >= 2.7
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGN_BYTES = 16  # of codes and rows, as matrix products of GPUs want them
_SLICE_WEIGHTS = 1 << 17  # 512 KiB in fp32: what is done to a slice stays in the cache


@dataclass(frozen=True)
class Scheme:
    """How the rows of one matrix are stored: codes, then a scale for each `group` columns, then as many offsets.

    name: "fp8", "int8", "affine4", "affine8", "nvfp4", "mxfp4", "mxfp6" or "mxfp8", with "-rotated" where `rotation` is
    not 0. code_dtype: of a code, uint8 where `bits` are less than 8; these follow each other from the lowest bit of the
    first byte on. minifloat: exponent and mantissa bits of such codes; None where they are whole numbers. The last
    group of a row may be cut short. scale_dtype: uint8 is E8M0, 2 to the power of the byte less 127. rotation: so many
    columns together were multiplied by a Hadamard matrix before they were rounded (ConvRot), a power of 4; 0 for none.
    has_row_scale: whether a row has an fp32 number that multiplies all its scales.
    """

    name: str
    code_dtype: torch.dtype
    group: int
    scale_dtype: torch.dtype = torch.float32
    bits: int = 8
    has_offsets: bool = False
    rotation: int = 0
    minifloat: tuple[int, int] | None = None
    has_row_scale: bool = False

    def code_bytes(self, weights: int) -> int:
        """Bytes of the codes of a row of `weights` weights; ValueError if that is no whole number."""
        if weights * self.bits % 8:
            raise ValueError(f"rows of {weights} weights of {self.bits} bits are no whole number of bytes")
        return weights * self.bits // 8

    def groups(self, weights: int) -> int:
        """Scales of a row of `weights` weights."""
        return -(-weights // self.group)

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of `weights` weights, padding included."""
        numbers = self.groups(weights) * (2 if self.has_offsets else 1)
        row_scale_bytes = 4 if self.has_row_scale else 0
        return _aligned(_aligned(self.code_bytes(weights)) + row_scale_bytes + numbers * self.scale_dtype.itemsize)


class Rows(NamedTuple):
    """Views of packed rows: codes as bytes [rows, code bytes], scales and perhaps offsets [rows, groups], and perhaps
    row scales, fp32 [rows, 1]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    row_scales: Tensor | None


def pack_rows(
    scheme: Scheme,
    columns: int,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """codes (any type, [rows, ...]), scales and offsets [rows, groups], row_scales [rows, 1] or one for all
    -> uint8 [rows, bytes a row]."""
    blocks = torch.zeros(len(codes), scheme.row_bytes(columns), dtype=torch.uint8)
    stored = split_rows(blocks, scheme, columns)
    stored.codes.copy_(codes.contiguous().view(torch.uint8))
    stored.scales.copy_(scales)
    if stored.offsets is not None:
        stored.offsets.copy_(offsets)
    if stored.row_scales is not None:
        stored.row_scales.copy_(row_scales)
    return blocks


def split_rows(blocks: Tensor, scheme: Scheme, columns: int) -> Rows:
    """The parts of rows of `columns` weights."""
    code_bytes, groups = scheme.code_bytes(columns), scheme.groups(columns)
    start, row_scales, offsets = _aligned(code_bytes), None, None
    if scheme.has_row_scale:
        row_scales = blocks[:, start : start + 4].view(torch.float32)
        start += 4
    size = groups * scheme.scale_dtype.itemsize
    scales = blocks[:, start : start + size].view(scheme.scale_dtype)
    if scheme.has_offsets:
        offsets = blocks[:, start + size : start + 2 * size].view(scheme.scale_dtype)
    return Rows(blocks[:, :code_bytes], scales, offsets, row_scales)


def dequantize_rows(
    blocks: Tensor, scheme: Scheme, columns: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """uint8 [rows, bytes a row] -> `dtype` [rows, columns] on the same device; into `out`, where given.

    Computed in fp32 and rounded once.
    """
    if out is None:
        out = torch.empty(len(blocks), columns, dtype=dtype, device=blocks.device)
    if blocks.device.type == "cuda" and out.is_contiguous() and _has_kernel(scheme, out.dtype, blocks.device):
        return _by_kernel(blocks, scheme, columns, out)
    step = max(1, _SLICE_WEIGHTS // columns) if blocks.device.type == "cpu" else max(1, len(blocks))
    for start in range(0, len(blocks), step):
        out[start : start + step] = _weights(blocks[start : start + step], scheme, columns)
    return out


@functools.cache
def _has_kernel(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` has a kernel for it that gives the bits of `_weights`, rounded once."""
    if scheme.minifloat or scheme.rotation or scheme.has_row_scale or not kernels.are_there(device):
        return False

    def agree() -> bool:
        columns = 2 * min(scheme.group, 512)
        whole = replace(scheme, group=min(scheme.group, 512))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 120, (40, whole.code_bytes(columns)), dtype=torch.uint8, generator=generator)
        scales = torch.rand(40, whole.groups(columns), generator=generator)
        blocks = pack_rows(whole, columns, codes, scales, -scales if scheme.has_offsets else None).to(device)
        wanted = _weights(blocks, whole, columns).to(dtype)
        return torch.equal(_by_kernel(blocks, whole, columns, torch.empty_like(wanted)), wanted)

    return kernels.is_right(f"kernel for {scheme.name} weights", agree)


def _by_kernel(blocks: Tensor, scheme: Scheme, columns: int, out: Tensor) -> Tensor:
    from wan.quant.triton import dequantize_rows_

    codes, scales, offsets, _ = split_rows(blocks, scheme, columns)
    kind = str(scheme.code_dtype).removeprefix("torch.")
    return dequantize_rows_(codes, scales, offsets, kind, scheme.bits, scheme.group, out)


def _weights(blocks: Tensor, scheme: Scheme, columns: int) -> Tensor:
    codes, scales, offsets, row_scales = split_rows(blocks, scheme, columns)
    weights = _numbers(codes, scheme) * _spread(scales, scheme.group, columns)
    if row_scales is not None:
        weights = weights * row_scales
    if offsets is not None:
        weights = weights + _spread(offsets, scheme.group, columns)
    return unrotate(weights, scheme.rotation) if scheme.rotation else weights


def unrotate(weights: Tensor, group: int) -> Tensor:
    """fp32 [rows, columns], each `group` columns of which were multiplied by the regular Hadamard matrix of that size,
    -> the weights before that. The matrix is its own inverse: this rotates as well.

    It is the Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, so that it is applied
    four columns at a time: half of their sum less the one opposite. By additions alone, whose bits do not depend on how
    many rows there are, as those of a product do. Source: ConvRot, https://arxiv.org/abs/2512.03673
    """
    step = 1  # between the four
    turned = weights
    while step < group:
        fours = turned.reshape(-1, 4, step)
        half = ((fours[:, 0] + fours[:, 1]) + (fours[:, 2] + fours[:, 3])).mul_(0.5)
        turned = half.unsqueeze(1) - fours.flip(1)
        step *= 4
    return turned.view(weights.shape)


def random_rows(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of random codes, with scales and offsets that are finite."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, scheme.row_bytes(columns)), dtype=torch.uint8, generator=generator)
    _, *numbers = split_rows(blocks, scheme, columns)
    for part in numbers:
        if part is not None:
            values = torch.rand(part.shape, generator=generator) - 0.3
            part.copy_(values * 30 + 120 if part.dtype == torch.uint8 else values)
    return blocks


def scale_values(scales: Tensor) -> Tensor:
    """Scales as fp32; of bytes, E8M0, where 255 is NaN and becomes infinite."""
    if scales.dtype != torch.uint8:
        return scales.float()
    exponents = scales.int()
    return torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)  # 2^-127 has no exponent of its own


def byte_values(dtype: torch.dtype) -> Tensor:
    """fp32 [256]: what each byte stands for as a number of `dtype` of 8 bits, or as a scale, see `scale_values`."""
    return scale_values(torch.arange(256, dtype=torch.uint8).view(dtype))


def code_values(scheme: Scheme) -> Tensor:
    """fp32: what each code stands for, of as many as its bits can tell."""
    if scheme.minifloat:
        return _minifloat_values(*scheme.minifloat, torch.device("cpu"))
    return torch.arange(1 << scheme.bits, dtype=torch.uint8).view(scheme.code_dtype).float()


def _numbers(codes: Tensor, scheme: Scheme) -> Tensor:
    """The codes as fp32 [rows, columns]."""
    if scheme.minifloat:
        return _look_up(_minifloat_values(*scheme.minifloat, codes.device), _whole_codes(codes, scheme.bits))
    if scheme.bits < 8:
        return _whole_codes(codes, scheme.bits).float()
    if scheme.code_dtype in FLOAT8 and codes.device.type == "cpu":  # torch's own conversion takes four times as long
        return _look_up(_float8_values(scheme.code_dtype), codes)
    return codes.view(scheme.code_dtype).float()


def _whole_codes(codes: Tensor, bits: int) -> Tensor:
    """Bytes [rows, n] -> codes of 4 or 6 bits, one a byte, [rows, 8 n / bits]."""
    if bits == 4:
        return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    low, middle, high = codes.unflatten(1, (-1, 3)).unbind(-1)
    second, third = low >> 6 | (middle & 15) << 2, middle >> 4 | (high & 3) << 4
    return torch.stack((low & 63, second, third, high >> 2), dim=-1).flatten(1)


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


@functools.cache
def _float8_values(dtype: torch.dtype) -> Tensor:
    """fp32 [256]: the value of each code."""
    with torch.inference_mode(False):  # it outlives the mode that it is first needed in
        return torch.arange(256, dtype=torch.uint8).view(dtype).float()


@functools.cache
def _minifloat_values(exponent_bits: int, mantissa_bits: int, device: torch.device) -> Tensor:
    """fp32: the value of each code of a sign, an exponent and a mantissa, which has neither infinity nor NaN."""
    steps, bias = 1 << mantissa_bits, (1 << exponent_bits - 1) - 1
    values = [mantissa / steps * 2.0 ** (1 - bias) for mantissa in range(steps)]  # those below the first power of two
    for exponent in range(1, 1 << exponent_bits):
        values += [(1 + mantissa / steps) * 2.0 ** (exponent - bias) for mantissa in range(steps)]
    with torch.inference_mode(False):
        return torch.tensor(values + [-value for value in values], device=device)


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] -> fp32, to be multiplied with [rows, columns]."""
    scales = scale_values(scales)
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(group, dim=1)[:, :columns]


def _aligned(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _ALIGN_BYTES
