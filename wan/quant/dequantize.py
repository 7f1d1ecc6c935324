"""Blocks -> weights, the fastest way there is on the device that holds them.

CPU: the compiled kernels of native.py, else torch in slices that stay in the cache. CUDA: a kernel in Triton, else
torch as it is. Types without a formula in blocks.py: the `gguf` package. All agree bit for bit in
fp32; other types are rounded once from it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from wan import kernels
from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.ggml import BY_NAME, GGMLType, random_blocks
from wan.quant.native import dequantize_native, dequantize_rows_native
from wan.quant.schemes import Scheme, dequantize_rows

_SLICE_WEIGHTS = 1 << 17  # 512 KiB in fp32


def dequantize(blocks: Tensor, type: GGMLType, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """uint8 [rows, bytes a row] -> `dtype` [rows, weights a row] on the same device; into `out`, where given."""
    rows, row_bytes = blocks.shape
    if out is None:
        shape = (rows, row_bytes // type.block_bytes * type.block_weights)
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    if blocks.device.type == "cuda" and type.name in UNPACK:
        if out.is_contiguous() and _has_kernel(type.name, out.dtype, blocks.device):
            return _by_kernel(blocks.contiguous(), type.name, out)
        return out.copy_(dequantize_blocks(blocks.reshape(-1, type.block_bytes), type.name).view(rows, -1))
    if dequantize_native(blocks, type, out):
        return out
    flat, weights = blocks.reshape(-1, type.block_bytes), out.view(-1, type.block_weights)
    if type.name not in UNPACK:
        weights.copy_(_by_gguf(flat, type))
    else:
        step = max(1, _SLICE_WEIGHTS // type.block_weights)
        for start in range(0, len(flat), step):
            weights[start : start + step] = dequantize_blocks(flat[start : start + step], type.name)
    return out


def dequantize_scheme(
    blocks: Tensor, scheme: Scheme, columns: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """uint8 [rows, bytes a row] of a scheme -> `dtype` [rows, columns] on the same device; into `out`, where given."""
    if out is None:
        out = torch.empty(len(blocks), columns, dtype=dtype, device=blocks.device)
    if dequantize_rows_native(blocks, scheme, columns, out):
        return out
    return dequantize_rows(blocks, scheme, columns, dtype, out)


def _by_gguf(blocks: Tensor, type: GGMLType) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(blocks.cpu().numpy(), GGMLQuantizationType(type.id)))


@functools.cache
def _has_kernel(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` has a kernel for a type that gives the bits of `dequantize_blocks`, rounded once."""

    def agree() -> bool:
        blocks = random_blocks(BY_NAME[name], 500).to(device)
        wanted = dequantize_blocks(blocks, name).to(dtype)
        return torch.equal(_by_kernel(blocks, name, torch.empty_like(wanted)), wanted)

    return kernels.are_there(device) and kernels.is_right(f"kernel for {name} weights", agree)


def _by_kernel(blocks: Tensor, name: str, out: Tensor) -> Tensor:
    from wan.quant.triton import dequantize_blocks_

    return dequantize_blocks_(blocks, name, out)
