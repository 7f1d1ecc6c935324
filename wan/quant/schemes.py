"""Matrices of 8- or 4-bit codes with scales, as LightX2V, ComfyUI and MLX store them: the definition of the formats.

A weight is code * scale, for MLX code * scale + offset, in fp32. Files keep codes, scales and offsets as tensors of
their own; here one row of a matrix is one run of bytes with all three in it, so that whatever cuts a matrix by rows
(ranks, look-ups, loading) needs to know of one tensor only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGN_BYTES = 16  # of codes and rows, as matrix products of GPUs want them
_SLICE_WEIGHTS = 1 << 17  # 512 KiB in fp32: what is done to a slice stays in the cache


@dataclass(frozen=True)
class Scheme:
    """How the rows of one matrix are stored: codes, then a scale for each `group` columns, then as many offsets.

    name: "fp8", "int8", "affine4" or "affine8", with "-rotated" where `rotation` is not 0. code_dtype: of a code, uint8
    for affine ones, of which a byte holds 8 / bits, the first in the lowest bits. The last group of a row may be cut
    short. rotation: so many columns together were multiplied by a Hadamard matrix before they were rounded (ConvRot), a
    power of 4; 0 for none.
    """

    name: str
    code_dtype: torch.dtype
    group: int
    scale_dtype: torch.dtype = torch.float32
    bits: int = 8
    has_offsets: bool = False
    rotation: int = 0

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
        return _aligned(_aligned(self.code_bytes(weights)) + numbers * self.scale_dtype.itemsize)


def pack_rows(scheme: Scheme, columns: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """codes (any type, [rows, ...]), scales and offsets [rows, groups] -> uint8 [rows, bytes a row]."""
    blocks = torch.zeros(len(codes), scheme.row_bytes(columns), dtype=torch.uint8)
    stored_codes, stored_scales, stored_offsets = split_rows(blocks, scheme, columns)
    stored_codes.copy_(codes.contiguous().view(torch.uint8))
    stored_scales.copy_(scales)
    if stored_offsets is not None:
        stored_offsets.copy_(offsets)
    return blocks


def split_rows(blocks: Tensor, scheme: Scheme, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of the rows: codes as bytes [rows, code bytes], scales and, for affine codes, offsets [rows, groups]."""
    code_bytes, groups = scheme.code_bytes(columns), scheme.groups(columns)
    start, size = _aligned(code_bytes), groups * scheme.scale_dtype.itemsize
    scales = blocks[:, start : start + size].view(scheme.scale_dtype)
    offsets = blocks[:, start + size : start + 2 * size].view(scheme.scale_dtype) if scheme.has_offsets else None
    return blocks[:, :code_bytes], scales, offsets


def dequantize_rows(
    blocks: Tensor, scheme: Scheme, columns: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """uint8 [rows, bytes a row] -> `dtype` [rows, columns] on the same device; into `out`, where given.

    Computed in fp32 and rounded once.
    """
    if out is None:
        out = torch.empty(len(blocks), columns, dtype=dtype, device=blocks.device)
    step = max(1, _SLICE_WEIGHTS // columns) if blocks.device.type == "cpu" else max(1, len(blocks))
    for start in range(0, len(blocks), step):
        out[start : start + step] = _weights(blocks[start : start + step], scheme, columns)
    return out


def _weights(blocks: Tensor, scheme: Scheme, columns: int) -> Tensor:
    codes, scales, offsets = split_rows(blocks, scheme, columns)
    weights = _numbers(codes, scheme) * _spread(scales, scheme.group, columns)
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


def _numbers(codes: Tensor, scheme: Scheme) -> Tensor:
    """The codes as fp32 [rows, columns]."""
    if scheme.bits == 4:
        return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).float()
    if scheme.code_dtype in FLOAT8 and codes.device.type == "cpu":  # torch's own conversion takes four times as long
        return _float8_values(scheme.code_dtype).index_select(0, codes.flatten().int()).view(codes.shape)
    return codes.view(scheme.code_dtype).float()


@functools.cache
def _float8_values(dtype: torch.dtype) -> Tensor:
    """fp32 [256]: the value of each code."""
    with torch.inference_mode(False):  # it outlives the mode that it is first needed in
        return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] -> fp32, to be multiplied with [rows, columns]."""
    scales = scales.float()
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(group, dim=1)[:, :columns]


def _aligned(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _ALIGN_BYTES
