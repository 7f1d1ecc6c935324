"""Blocks -> weights, the fastest way there is on the device that holds them.

CPU: the compiled kernels of native.py, else torch in slices that stay in the cache. CUDA: one kernel made by
torch.compile, else torch as it is. Types without a formula in blocks.py: the `gguf` package. All agree bit for bit in
fp32; other types are rounded once from it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.ggml import BY_NAME, GGMLType, random_blocks
from wan.quant.native import dequantize_native

_SLICE_WEIGHTS = 1 << 17  # 512 KiB in fp32


def dequantize(blocks: Tensor, type: GGMLType, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """uint8 [rows, bytes a row] -> `dtype` [rows, weights a row] on the same device; into `out`, where given."""
    rows, row_bytes = blocks.shape
    if blocks.device.type == "cuda" and type.name in UNPACK:
        weights = _compiled(type.name, dtype, blocks.device)(blocks.reshape(-1, type.block_bytes)).view(rows, -1)
        return weights if out is None else out.copy_(weights)
    if out is None:
        shape = (rows, row_bytes // type.block_bytes * type.block_weights)
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
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


def _by_gguf(blocks: Tensor, type: GGMLType) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(blocks.cpu().numpy(), GGMLQuantizationType(type.id)))


@functools.cache
def _compiled(name: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """`dequantize_blocks` and the rounding as one kernel, if this machine can make it and its numbers are right."""

    def eager(blocks: Tensor) -> Tensor:
        return dequantize_blocks(blocks, name).to(dtype)

    # torch compiles a piece of code a few times only, and then runs it as it is without a word: each has its own, and
    # fullgraph makes it an error.
    eager.__code__ = eager.__code__.replace(co_name=f"dequantize_{name}")
    compiled = torch.compile(eager, dynamic=True, fullgraph=True)
    failed = False

    def run(blocks: Tensor) -> Tensor:
        nonlocal failed
        if not failed:
            try:
                return compiled(blocks)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler can meet: no Triton, no driver, a bug of its own
                failed = True
                _warn(name, type(error).__name__)
        return eager(blocks)

    blocks = random_blocks(BY_NAME[name], 500).to(device)
    if torch.equal(run(blocks), eager(blocks)):
        return run
    _warn(name, "its numbers are wrong")
    return eager


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"{name} weights are not dequantised by a compiled kernel ({reason}): slower", stacklevel=3)
