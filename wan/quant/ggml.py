"""The tensor types of ggml, as GGUF files hold them: how many weights a block has, and how many bytes.

Source: ggml's block structs (ggml-common.h); the numbers are checked against the `gguf` package in the tests. torch is
imported only by what makes tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GGMLType:
    """One tensor type.

    scale_offsets: the bytes of a block at which its fp16 scales are. torch_name: of the type of plain numbers; None for
    block formats, whose rows are whole numbers of blocks.
    """

    id: int
    name: str
    block_weights: int
    block_bytes: int
    scale_offsets: tuple[int, ...] = ()
    torch_name: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        import torch

        return self.torch_name and getattr(torch, self.torch_name)

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of `weights` weights; ValueError if that is no whole number of blocks."""
        if weights % self.block_weights:
            raise ValueError(f"rows of {weights} weights are no whole number of {self.name} blocks")
        return weights // self.block_weights * self.block_bytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape` (last axis: the row)."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1]) if shape else self.block_bytes


_TYPES = (
    GGMLType(0, "F32", 1, 4, torch_name="float32"),
    GGMLType(1, "F16", 1, 2, torch_name="float16"),
    GGMLType(2, "Q4_0", 32, 18, (0,)),
    GGMLType(3, "Q4_1", 32, 20, (0, 2)),
    GGMLType(6, "Q5_0", 32, 22, (0,)),
    GGMLType(7, "Q5_1", 32, 24, (0, 2)),
    GGMLType(8, "Q8_0", 32, 34, (0,)),
    GGMLType(10, "Q2_K", 256, 84, (80, 82)),
    GGMLType(11, "Q3_K", 256, 110, (108,)),
    GGMLType(12, "Q4_K", 256, 144, (0, 2)),
    GGMLType(13, "Q5_K", 256, 176, (0, 2)),
    GGMLType(14, "Q6_K", 256, 210, (208,)),
    GGMLType(16, "IQ2_XXS", 256, 66, (0,)),
    GGMLType(17, "IQ2_XS", 256, 74, (0,)),
    GGMLType(18, "IQ3_XXS", 256, 98, (0,)),
    GGMLType(19, "IQ1_S", 256, 50, (0,)),
    GGMLType(20, "IQ4_NL", 32, 18, (0,)),
    GGMLType(21, "IQ3_S", 256, 110, (0,)),
    GGMLType(22, "IQ2_S", 256, 82, (0,)),
    GGMLType(23, "IQ4_XS", 256, 136, (0,)),
    GGMLType(24, "I8", 1, 1, torch_name="int8"),
    GGMLType(25, "I16", 1, 2, torch_name="int16"),
    GGMLType(26, "I32", 1, 4, torch_name="int32"),
    GGMLType(27, "I64", 1, 8, torch_name="int64"),
    GGMLType(28, "F64", 1, 8, torch_name="float64"),
    GGMLType(29, "IQ1_M", 256, 56),
    GGMLType(30, "BF16", 1, 2, torch_name="bfloat16"),
    GGMLType(34, "TQ1_0", 256, 54, (52,)),
    GGMLType(35, "TQ2_0", 256, 66, (64,)),
    GGMLType(39, "MXFP4", 32, 17),
)
BY_ID: dict[int, GGMLType] = {one.id: one for one in _TYPES}
BY_NAME: dict[str, GGMLType] = {one.name: one for one in _TYPES}


_UNUSUAL_SCALES = {"MXFP4": (0, 0x7F), "IQ1_M": (55, 0xBF)}  # byte and mask that make any of them finite


def random_blocks(type: GGMLType, count: int, seed: int = 0) -> torch.Tensor:
    """`count` blocks of random bytes with finite scales, uint8 [count, bytes a block]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, type.block_bytes), dtype=torch.uint8, generator=generator)
    for offset in type.scale_offsets:
        blocks[:, offset + 1] &= 0xBF  # the exponent stays below 2^0
    if type.name in _UNUSUAL_SCALES:
        byte, mask = _UNUSUAL_SCALES[type.name]
        blocks[:, byte] &= mask
    return blocks


def has_bad_scales(blocks: torch.Tensor, type: GGMLType) -> bool:
    """Whether a scale in `blocks` (uint8, whole blocks) is infinite or NaN: never so in a sound file."""
    blocks = blocks.view(-1, type.block_bytes)
    # Slices stay in the cache and below the size from which torch starts threads of its own.
    return any(
        _all_ones(part, masks).any().item() for masks in scale_masks(type) for part in blocks.split(_CHECKED_BLOCKS)
    )


_CHECKED_BLOCKS = 16_384


def scale_masks(type: GGMLType) -> list[tuple[tuple[int, int], ...]]:
    """For each scale the bytes and the bits in them that are all ones if it is infinite or NaN."""
    if type.name == "MXFP4":  # E8M0: NaN, or so large that weights overflow
        return [((0, 0xFC),)]
    if type.name == "IQ1_M":  # one fp16, four bits of it on top of each of four words: 1 and 2 hold the lower bits
        return [((55, 0x70), (53, 0xC0))]
    return [((offset + 1, 0x7C),) for offset in type.scale_offsets]


def _all_ones(blocks: torch.Tensor, masks: tuple[tuple[int, int], ...]) -> torch.Tensor:
    found = [(blocks[:, byte] & mask) == mask for byte, mask in masks]
    return found[0] if len(found) == 1 else found[0] & found[1]
