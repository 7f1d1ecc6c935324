"""VACE: a branch beside the transformer that sees the source video, its mask and the references, and gives hints.

Source: behaviour of the official Wan2.1 `VaceWanModel`; parameter names are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wan.models.dit.adapters import Adapter, After
from wan.models.dit.block import Block, Context, Hold
from wan.models.dit.sequence import Sequence
from wan.models.layers import Conv3d, Linear


class VaceBlock(Block):
    """A block of the branch. The first one is given the tokens of the video as well."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, is_first: bool):
        super().__init__(dim, ffn_dim, num_heads, eps, images=False)
        self.before_proj = Linear(dim, dim) if is_first else None
        self.after_proj = Linear(dim, dim)
        self.parts = (*(("before_proj",) if is_first else ()), *Block.parts, "after_proj")

    def forward(
        self, c_BLC: Tensor, x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold
    ) -> tuple[Tensor, Tensor]:
        """What the next block gets, and the hint. x: the tokens of the video as they enter the first block."""
        if self.before_proj is not None:
            with hold(self.before_proj):
                c_BLC = self.before_proj(c_BLC) + x_BLC
        c_BLC = super().forward(c_BLC, sequence, context, hold)
        with hold(self.after_proj):
            return c_BLC, self.after_proj(c_BLC)


class Vace(Adapter):
    """Hint n, times the scale, is added to the hidden states after main block `layers[n]`; it is made when they come.

    Its inputs:
        vace_context: `[B, 96, F, H, W]`, see `wan.conditioning.vace`; of the latent's size
        vace_context_scale: a number
    """

    inputs = ("vace_context", "vace_context_scale")

    def __init__(self, layers: Iterable[int], in_dim: int, patch_size: tuple[int, ...], block: dict[str, Any]):
        """block: the arguments of a `Block`, but for its images."""
        self.layers = {layer: n for n, layer in enumerate(layers)}
        self.patch_embedding = Conv3d(in_dim, block["dim"], patch_size, patch_size)
        self.blocks = nn.ModuleList(VaceBlock(**block, is_first=n == 0) for n in range(len(self.layers)))
        self.names = {"vace_patch_embedding": self.patch_embedding, "vace_blocks": self.blocks}

    def empty_inputs(self, latent: Tensor) -> dict[str, Any]:
        shape = len(latent), self.patch_embedding.in_channels, *latent.shape[2:]
        return {"vace_context": latent.new_empty(shape), "vace_context_scale": 1.0}

    def modules(self, block: int) -> dict[str, nn.Module]:
        n = self.layers.get(block)
        return {} if n is None else {f"vace_blocks.{n}": self.blocks[n]}

    def begin(self, inputs: dict[str, Any], x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold) -> After:
        latents, scale = inputs["vace_context"], inputs["vace_context_scale"]
        grid, patch = sequence.groups[0].grid, self.patch_embedding.stride
        wanted = [len(x_BLC), self.patch_embedding.in_channels, *(n * p for n, p in zip(grid, patch, strict=True))]
        if list(latents.shape) != wanted:
            raise ValueError(f"vace_context is {list(latents.shape)}; these latents need {wanted}")
        context = Context(context.text_BMC)
        c_BLC, made = None, 0  # what hint `made` is made of

        def after(block: int, y_BLC: Tensor) -> Tensor:
            nonlocal c_BLC, made
            n = self.layers.get(block)
            if n is None:
                return y_BLC
            if n < made or c_BLC is None:  # blocks that run again begin anew
                embedded = self.patch_embedding(latents.to(x_BLC.dtype)).flatten(2).transpose(1, 2)
                c_BLC, made = sequence.shard(embedded.contiguous()), 0
            while made <= n:
                with hold(self.blocks[made]):
                    c_BLC, hint_BLC = self.blocks[made](c_BLC, x_BLC, sequence, context, hold)
                made += 1
            return torch.add(y_BLC, hint_BLC, alpha=scale)

        return after
