"""Weights -> codes and scales of the schemes in schemes.py, under the conventions of LightX2V, ComfyUI and MLX.

All functions take any float type on the CPU, work in fp32 and raise ValueError for values that are not finite.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from wan.quant.schemes import scale_values

LARGEST = {"fp8": 448.0, "int8": 127.0}


def quantize_channels(weights: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] in float8_e4m3fn ("fp8") or int8 ("int8") and fp32 scales [out, 1].

    A scale is amax / 448 or amax / 127, so that int8 weights are off by half a scale at most, and fp8 ones by a 16th
    of themselves (or, below 2^-6 scales, by 2^-10 scales).
    """
    weights = _checked(weights)
    scales = weights.abs().amax(1, keepdim=True) / LARGEST[name]
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    codes = weights / scales
    if name == "int8":
        return codes.round_().clamp_(-128, 127).to(torch.int8), scales
    return codes.clamp_(-LARGEST[name], LARGEST[name]).to(torch.float8_e4m3fn), scales


def quantize_affine(weights: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> codes uint32 [out, in * bits / 32], scales and biases [out, in / group] in `dtype`, as MLX has them.

    A weight is code * scale + bias and off by half a scale at most: bias and scale are rounded outwards, so that the
    codes reach both ends of a group after they were rounded to `dtype`.
    """
    grouped = _grouped(weights, group)
    steps = (1 << bits) - 1
    biases = _rounded(grouped.amin(-1, keepdim=True), dtype, float("-inf"))
    scales = _rounded((grouped.amax(-1, keepdim=True) - biases.float()) / steps, dtype, float("inf"))
    if not (biases.isfinite().all() and scales.isfinite().all()):
        raise ValueError(f"{str(dtype).removeprefix('torch.')} cannot hold its scales")
    scales = torch.where(scales > 0, scales, 1.0)  # a group of equal weights
    codes = ((grouped - biases.float()) / scales.float()).round_().clamp_(0, steps).to(torch.uint8).flatten(1)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return _words(codes), scales.squeeze(-1), biases.squeeze(-1)


def quantize_nvfp4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> E2M1 codes uint8 [out, in], E4M3 scales [out, in / 16] and the fp32 scale of the whole matrix, [].

    That one is amax / 2688, so that the largest block has a scale of 448. A weight is off by half the distance of its
    neighbours at most, but where the scale of its block was rounded down: there the largest are cut to 6.
    """
    grouped = _grouped(weights, 16)
    largest = grouped.abs().amax(-1)
    whole = largest.amax() / (6 * LARGEST["fp8"])
    whole = torch.where(whole > 0, whole, 1.0)  # a matrix of zeros
    scales = (largest / 6 / whole).clamp_(max=LARGEST["fp8"]).to(torch.float8_e4m3fn)
    steps = (scales.float() * whole).unsqueeze(-1)
    sizes = grouped.abs() / torch.where(steps > 0, steps, float("inf"))
    # Codes are evenly apart below 2, between 2 and 4, and between 4 and 6; ties go to even ones.
    codes = torch.where(
        sizes < 2, (2 * sizes).round(), torch.where(sizes < 4, 2 + sizes.round(), 4 + (sizes / 2).round())
    )
    codes = codes.clamp_(max=7).to(torch.uint8) | (grouped < 0).to(torch.uint8) << 3
    return codes.flatten(1), scales, whole


def quantize_mxfp8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] in float8_e4m3fn and E8M0 scales, uint8 [out, in / 32].

    A scale is the least power of two with which no weight of its block is cut, so that a weight is off by a 16th of
    itself at most (or, below 2^-6 scales, by 2^-10 scales).
    """
    grouped = _grouped(weights, 32)
    mantissas, exponents = torch.frexp(grouped.abs().amax(-1) / LARGEST["fp8"])  # 0.5 <= mantissa < 1, or both are 0
    scales = (exponents - (mantissas == 0.5).int() + 127).clamp_(min=0).to(torch.uint8)
    codes = (grouped / scale_values(scales).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes.flatten(1), scales


def _grouped(weights: Tensor, group: int) -> Tensor:
    if weights.shape[1] % group:
        raise ValueError(f"rows of {weights.shape[1]} weights are no whole number of groups of {group}")
    return _checked(weights).unflatten(1, (-1, group))


def _words(codes: Tensor) -> Tensor:
    """uint8 [out, 4 n] -> uint32 [out, n], the first byte lowest."""
    if sys.byteorder != "little":
        raise ValueError("MLX weights are written on little-endian machines only")
    return codes.contiguous().view(torch.uint32)


def _rounded(values: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """fp32 `values` in `dtype`, rounded towards plus or minus infinity."""
    nearest = values.to(dtype)
    if dtype == torch.float32:
        return nearest
    limit = torch.tensor(towards, dtype=dtype)
    wrong = nearest.float() < values if towards > 0 else nearest.float() > values
    return torch.where(wrong, _next(nearest, limit), nearest)


def _next(values: Tensor, limit: Tensor) -> Tensor:
    """The next numbers of the same type on the way to `limit`, which is infinite: by their bits, in order of size."""
    bits = values.contiguous().view(torch.int16)
    up = bool(limit > 0)
    smallest = torch.tensor(1 if up else 1 - (1 << 15), dtype=torch.int16)
    step = torch.where((values > 0) == up, 1, -1).to(torch.int16)
    return torch.where(values == 0, smallest, bits + step).view(values.dtype)


def _checked(weights: Tensor) -> Tensor:
    weights = weights.float()
    if not weights.isfinite().all():
        raise ValueError("it holds values that are not finite")
    return weights
