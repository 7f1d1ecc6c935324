"""What a transformer is made of: the block and its parts, the head, the embedding of images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wan.models.dit.sequence import Sequence
from wan.models.layers import Linear
from wan.models.ops.reference import Modulated, Reference
from wan.quant.linear import project

CLIP_DIM = 1280
CLIP_TOKENS = 257  # per image
Hold = Callable[[nn.Module], AbstractContextManager]  # stands around the use of a block or part: its weights are there


class Context(NamedTuple):
    """What the tokens attend to besides themselves: the text, and images as CLIP sees them (Wan2.1 i2v, flf2v)."""

    text_BMC: Tensor
    image_BMC: Tensor | None = None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.head_dim = dim // num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def heads(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (-1, self.head_dim))

    def normed(self, x_BLC: Tensor, norm: RMSNorm, ops: Reference, rope_LD: Tensor | None = None) -> Tensor:
        return ops.norm_rope(x_BLC, norm.weight, norm.eps, self.head_dim, rope_LD)

    def forward(self, x_BLC: Tensor, sequence: Sequence) -> Tensor:
        q_BLC, k_BLC, v_BLC = project(x_BLC, self.q, self.k, self.v)
        q_BLHD = self.normed(q_BLC, self.norm_q, sequence.ops, sequence.rope_LD)
        k_BLHD = self.normed(k_BLC, self.norm_k, sequence.ops, sequence.rope_LD)
        y_BLHD = sequence.attend(q_BLHD, k_BLHD, self.heads(v_BLC))
        return self.o(y_BLHD.flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the context; with `images` the image tokens have keys and values of their own."""

    def __init__(self, dim: int, num_heads: int, eps: float, images: bool):
        super().__init__(dim, num_heads, eps)
        if images:
            self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x_BLC: Tensor, context: Context, sequence: Sequence) -> Tensor:
        text_BMC, image_BMC = context
        attention, ops = sequence.attention, sequence.ops
        q_BLHD = self.normed(self.q(x_BLC), self.norm_q, ops)
        k_BMC, v_BMC = project(text_BMC, self.k, self.v)
        y = attention(q_BLHD, self.normed(k_BMC, self.norm_k, ops), self.heads(v_BMC))
        if image_BMC is not None:
            k_BMC, v_BMC = project(image_BMC, self.k_img, self.v_img)
            y = y + attention(q_BLHD, self.normed(k_BMC, self.norm_k_img, ops), self.heads(v_BMC))
        return self.o(y.flatten(2))


class Block(nn.Module):
    """`parts`: names of the modules that hold its matrices, in the order of their use."""

    parts = ("self_attn", "cross_attn", "ffn")

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, images: bool):
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, images)
        self.ffn = nn.ModuleDict({"0": Linear(dim, ffn_dim), "2": Linear(ffn_dim, dim)})
        self.modulation = nn.Parameter(_random_modulation(6, dim))

    def forward(self, x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = sequence.modulation(self.modulation)
        with hold(self.self_attn):
            y = self.self_attn(sequence.norm(x_BLC, Modulated(shift1, scale1, self.eps)), sequence)
        x_BLC, y = sequence.gated_add_norm(x_BLC, y, gate1, self.norm3)
        with hold(self.cross_attn):
            y = self.cross_attn(y, context, sequence)
        x_BLC, y = sequence.gated_add_norm(x_BLC, y, None, Modulated(shift2, scale2, self.eps))
        with hold(self.ffn):
            y = sequence.ops.linear_gelu(self.ffn["0"], y)
            return sequence.gated_add(x_BLC, self.ffn["2"](y), gate2)


class ImageEmbedding(nn.Module):
    """CLIP features to context tokens; flf2v adds a learned position to its two images' tokens."""

    def __init__(self, dim: int, positions: bool):
        super().__init__()
        proj = [nn.LayerNorm(CLIP_DIM), Linear(CLIP_DIM, CLIP_DIM), nn.GELU(), Linear(CLIP_DIM, dim)]
        self.proj = nn.Sequential(*proj, nn.LayerNorm(dim))
        self.emb_pos = nn.Parameter(torch.zeros(1, 2 * CLIP_TOKENS, CLIP_DIM)) if positions else None

    def forward(self, clip_fea: Tensor) -> Tensor:
        """`[B * n, 257, 1280] -> [B, n * 257, dim]`, n = 2 for flf2v, else 1."""
        if self.emb_pos is not None:
            clip_fea = clip_fea.reshape(-1, 2 * CLIP_TOKENS, CLIP_DIM) + self.emb_pos
        return self.proj(clip_fea)


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = Linear(dim, out_dim)
        self.modulation = nn.Parameter(_random_modulation(2, dim))

    def forward(self, x_BLC: Tensor, sequence: Sequence) -> Tensor:
        return self.head(sequence.norm(x_BLC, Modulated(*sequence.modulation(self.modulation), self.eps)))


def _random_modulation(rows: int, dim: int) -> Tensor:
    """Normal; by trunc_normal_, which on the meta device does not import the compiler, a second's work."""
    return nn.init.trunc_normal_(torch.empty(1, rows, dim), std=dim**-0.5)
