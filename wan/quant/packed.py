"""What is stored of a quantised tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wan.quant.dequantize import dequantize, dequantize_scheme
from wan.quant.ggml import GGMLType
from wan.quant.schemes import Scheme
from wan.quant.scratch import scratch


@dataclass(frozen=True)
class PackedTensor:
    """Rows of ggml blocks, or of a scheme's codes and scales.

    blocks: uint8 [rows, bytes a row], contiguous; shape: of the tensor they stand for. guard: called with the blocks
    before they are used, raises where they lie in a mapped file that was cut.
    """

    type: GGMLType | Scheme
    shape: tuple[int, ...]
    blocks: Tensor
    guard: Callable[[Tensor], None] | None = None

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def to(self, device: torch.device) -> PackedTensor:
        """The same there; itself if it is there."""
        return self if self.blocks.device == device else replace(self, blocks=self.blocks.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32, reuse: bool = False) -> Tensor:
        """The weights, computed in fp32 and rounded once to `dtype`; on the device of the blocks.

        reuse: on a CPU, in memory that the next such call overwrites.
        """
        if self.guard:
            self.guard(self.blocks)
        out = None
        if reuse and self.device.type == "cpu":
            out = scratch(len(self.blocks), math.prod(self.shape) // len(self.blocks), dtype)
        if isinstance(self.type, Scheme):
            return dequantize_scheme(self.blocks, self.type, self.shape[-1], dtype, out).view(self.shape)
        return dequantize(self.blocks, self.type, dtype, out).view(self.shape)
