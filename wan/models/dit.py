"""The Wan diffusion transformer: Wan2.1 t2v, i2v, flf2v and Wan2.2 t2v / i2v experts and ti2v in one class.

Source: behaviour of the official Wan2.1 / Wan2.2 `WanModel`; parameter names are theirs.
Shape legend: B batch, L video tokens, M context tokens, C width, H heads, D head width, R distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.cache import NO_CACHE, NoCache, StepContext
from wan.distributed.parallel import Parallel, TokenShards
from wan.models.attention import get_attention
from wan.models.fused import gated_add, gelu_tanh, modulated_norm, norm_rope
from wan.models.rope import rope_table
from wan.offload import Resident

CLIP_DIM = 1280
CLIP_TOKENS = 257  # per image
Segments = list[tuple[int, int]]
Hold = Callable[[nn.Module], AbstractContextManager]  # stands around the use of a block or part: its weights are there


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.head_dim = dim // num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def heads(self, x_BLC: Tensor, norm: RMSNorm | None = None, rope_LD: Tensor | None = None) -> Tensor:
        if norm is None:
            return x_BLC.unflatten(-1, (-1, self.head_dim))
        return norm_rope(x_BLC, norm.weight, norm.eps, self.head_dim, rope_LD)

    def forward(self, x_BLC: Tensor, rope_LD: Tensor, attention, tokens: TokenShards) -> Tensor:
        q_BLHD = self.heads(self.q(x_BLC), self.norm_q, rope_LD)
        k_BLHD = self.heads(self.k(x_BLC), self.norm_k, rope_LD)
        y_BLHD = tokens.attention(attention, q_BLHD, k_BLHD, self.heads(self.v(x_BLC)))
        return self.o(y_BLHD.flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the text; with `images` (Wan2.1 i2v, flf2v) the image tokens have keys and values of their own."""

    def __init__(self, dim: int, num_heads: int, eps: float, images: bool):
        super().__init__(dim, num_heads, eps)
        if images:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x_BLC: Tensor, text_BMC: Tensor, image_BMC: Tensor | None, attention) -> Tensor:
        q_BLHD = self.heads(self.q(x_BLC), self.norm_q)
        y = attention(q_BLHD, self.heads(self.k(text_BMC), self.norm_k), self.heads(self.v(text_BMC)))
        if image_BMC is not None:
            k_BMHD = self.heads(self.k_img(image_BMC), self.norm_k_img)
            y = y + attention(q_BLHD, k_BMHD, self.heads(self.v_img(image_BMC)))
        return self.o(y.flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, images: bool):
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, images)
        self.ffn = nn.ModuleDict({"0": nn.Linear(dim, ffn_dim), "2": nn.Linear(ffn_dim, dim)})
        self.modulation = nn.Parameter(_random_modulation(6, dim))

    def forward(
        self,
        x_BLC: Tensor,
        temb_R6C: Tensor,
        segments: Segments,
        text,
        image,
        rope_LD,
        attention,
        tokens: TokenShards,
        hold: Hold,
    ) -> Tensor:
        """One block; `temb_R6C` is the projected time embedding (fp32) of each distinct timestep."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (temb_R6C + self.modulation.float()).unbind(1)
        with hold(self.self_attn):
            y = self.self_attn(modulated_norm(x_BLC, shift1, scale1, segments, self.eps), rope_LD, attention, tokens)
        x_BLC = gated_add(x_BLC, y, gate1, segments)
        with hold(self.cross_attn):
            x_BLC = x_BLC + self.cross_attn(self.norm3(x_BLC), text, image, attention)
        with hold(self.ffn):
            y = self.ffn["0"](modulated_norm(x_BLC, shift2, scale2, segments, self.eps))
            return gated_add(x_BLC, self.ffn["2"](gelu_tanh(y)), gate2, segments)


class ImageEmbedding(nn.Module):
    """CLIP features to context tokens; flf2v adds a learned position to its two images' tokens."""

    def __init__(self, dim: int, positions: bool):
        super().__init__()
        proj = [nn.LayerNorm(CLIP_DIM), nn.Linear(CLIP_DIM, CLIP_DIM), nn.GELU(), nn.Linear(CLIP_DIM, dim)]
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
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(_random_modulation(2, dim))

    def forward(self, x_BLC: Tensor, time_RC: Tensor, segments: Segments) -> Tensor:
        shift, scale = (time_RC[:, None] + self.modulation.float()).unbind(1)
        return self.head(modulated_norm(x_BLC, shift, scale, segments, self.eps))


class WanModel(nn.Module):
    """`model_type`: "t2v", "i2v", "flf2v" or "ti2v". Wan2.2's i2v experts are "i2v" with `clip=False`.

    `clip` (image tokens from CLIP) defaults to what the type means in Wan2.1. `attention` names a back end of
    `wan.models.attention`. Activations have the type of the weights; what `keep_fp32` names stays in fp32. `parallel`:
    the processes that share the work; by default this one alone. `offload`: brings the weights of blocks that are not
    on the device, see `wan.offload`.
    """

    def __init__(
        self,
        model_type: str = "t2v",
        patch_size=(1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-6,
        clip: bool | None = None,
        attention: str = "sdpa",
        parallel: Parallel | None = None,
    ):
        super().__init__()
        self.patch_size, self.text_len, self.freq_dim = tuple(patch_size), text_len, freq_dim
        self.head_dim, self.out_dim = dim // num_heads, out_dim
        self.attention = get_attention(attention)
        self.parallel = parallel or Parallel()
        self.offload = Resident()
        clip = model_type in ("i2v", "flf2v") if clip is None else clip

        self.patch_embedding = nn.Conv3d(in_dim, dim, self.patch_size, self.patch_size)
        self.text_embedding = _mlp(text_dim, dim)
        self.time_embedding = _mlp(freq_dim, dim)
        self.time_projection = nn.ModuleDict({"1": nn.Linear(dim, 6 * dim)})
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps, clip) for _ in range(num_layers))
        self.head = Head(dim, out_dim * self.patch_size[0] * self.patch_size[1] * self.patch_size[2], eps)
        self.img_emb = ImageEmbedding(dim, positions=model_type == "flf2v") if clip else None

    @staticmethod
    def keep_fp32(name: str) -> bool:
        """Parameters that stay in fp32 whatever the compute type: all that forms the modulation."""
        return name.startswith(("time_embedding.", "time_projection.")) or name.endswith("modulation")

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x,
        t: Tensor,
        context,
        *,
        y=None,
        clip_fea: Tensor | None = None,
        cache: NoCache = NO_CACHE,
        ctx: StepContext | None = None,
    ):
        """Velocity prediction, fp32, in the form of `x`. Raises ValueError where the arguments do not fit together.

        Args:
            x: noisy latents `[B, C_in, F, H, W]`, or a list of `[C_in, F, H, W]` of any sizes.
            t: timesteps 0..1000, `[B]`, or one a token `[B, >= L]` (what exceeds L is ignored). Read by the host.
            context: text embeddings `[B, M, text_dim]` or a list of `[M_i, text_dim]`, M <= text_len.
            y: conditioning latents, as `x`, concatenated after it on the channels.
            clip_fea: CLIP features `[n, 257, 1280]`, n = B (i2v) or 2B (flf2v).
            cache: goes around the block loop; `ctx` says where in a run this prediction stands. Not for lists.
        """
        if len(context) != len(x):
            raise ValueError(f"{len(context)} texts for a batch of {len(x)}")
        if (clip_fea is None) != (self.img_emb is None):
            raise ValueError(
                f"clip_fea is {'missing' if clip_fea is None else 'given, but this model has no image branch'}"
            )
        t = t.expand(len(x), *t.shape[1:])
        if isinstance(x, Tensor):
            return self._forward(x if y is None else torch.cat([x, y], 1), t, context, clip_fea, cache, ctx)
        if cache is not NO_CACHE:
            raise ValueError("a cache needs one tensor, not a list")
        images = clip_fea.chunk(len(x)) if clip_fea is not None else [None] * len(x)
        ys = y if y is not None else [None] * len(x)
        outs = []
        for i, (latent, cond, image) in enumerate(zip(x, ys, images, strict=True)):
            latent = (latent if cond is None else torch.cat([latent, cond])).unsqueeze(0)
            outs.append(self._forward(latent, t[i : i + 1], [context[i]], image)[0])
        return outs

    def _forward(
        self,
        x_BCFHW: Tensor,
        t: Tensor,
        context,
        clip_fea: Tensor | None,
        cache: NoCache = NO_CACHE,
        ctx: StepContext | None = None,
    ) -> Tensor:
        x_BLC, grid = self.embed_patches(x_BCFHW)
        tokens = self.parallel.tokens(x_BLC.shape[1])
        time_RC, temb_R6C, segments = self.embed_time(t, tokens)
        text_BMC = self.embed_text(context)
        image_BMC = self.img_emb(clip_fea.to(self.dtype)) if self.img_emb is not None else None
        x_BLC = tokens.shard(x_BLC, dim=1)
        rope_LD = tokens.shard(rope_table(grid, self.head_dim, x_BLC.device), dim=0)
        hold = self.offload.hold

        def run(x_BLC: Tensor, first: int, last: int) -> Tensor:
            """Blocks first..last-1: the only loop over blocks."""
            for block in self.blocks[first:last]:
                with hold(block):
                    x_BLC = block(x_BLC, temb_R6C, segments, text_BMC, image_BMC, rope_LD, self.attention, tokens, hold)
            return x_BLC

        x_BLC = cache.blocks(ctx, x_BLC, run, len(self.blocks), self.embed_step)
        x_BLC = tokens.gather(self.head(x_BLC, time_RC, segments), dim=1)
        return self.unpatchify(x_BLC, grid)

    def embed_patches(self, x_BCFHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Latents to tokens: `([B, L, C], (frames, rows, columns))`."""
        if any(size % patch for size, patch in zip(x_BCFHW.shape[2:], self.patch_size, strict=True)):
            raise ValueError(f"a latent of {list(x_BCFHW.shape[2:])} cannot be cut into patches of {self.patch_size}")
        x = self.patch_embedding(x_BCFHW.to(self.dtype))
        return x.flatten(2).transpose(1, 2).contiguous(), tuple(x.shape[2:])

    def embed_text(self, context) -> Tensor:
        """Text embeddings, zero-padded to `text_len` (the padding is not masked later): `[B, text_len, C]`."""
        if (longest := max(len(text) for text in context)) > self.text_len:
            raise ValueError(f"a text embedding of {longest} tokens; at most {self.text_len} fit")
        padded = [F.pad(text.to(self.dtype), (0, 0, 0, self.text_len - text.shape[0])) for text in context]
        x = gelu_tanh(self.text_embedding["0"](torch.stack(padded)))
        return self.text_embedding["2"](x)

    def embed_time(self, t: Tensor, tokens: TokenShards) -> tuple[Tensor, Tensor, Segments]:
        """Each distinct timestep of this rank's tokens embedded once: `([R, C], [R, 6, C], segments of equal time)`.

        The segments are those of all B*L tokens.
        """
        if t.ndim == 2 and t.shape[1] < tokens.total:
            raise ValueError(f"{t.shape[1]} timesteps for {tokens.total} tokens")
        device = self.patch_embedding.weight.device
        per_token = t.cpu()[:, : tokens.total] if t.ndim == 2 else t.cpu()[:, None].expand(-1, tokens.total)
        runs, counts = torch.unique_consecutive(tokens.shard(per_token, dim=1).reshape(-1), return_counts=True)
        values, rows = torch.unique(runs, return_inverse=True)
        segments = list(zip(rows.tolist(), counts.tolist(), strict=True))
        half = self.freq_dim // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(values.double(), rate)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).float().to(device, non_blocking=True)
        time_RC = self.time_embedding["2"](F.silu(self.time_embedding["0"](wave)))
        temb = self.time_projection["1"](F.silu(time_RC))
        return time_RC, temb.unflatten(1, (6, -1)), segments

    def embed_step(self, timestep: float) -> dict[str, Tensor]:
        """What the network makes of a timestep alone: "embedding" [1, C] and "projection" [1, 6, C], fp32."""
        time_RC, temb_R6C, _ = self.embed_time(torch.tensor([timestep]), Parallel().tokens(1))
        return {"embedding": time_RC, "projection": temb_R6C}

    def unpatchify(self, x_BLC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens to latents `[B, C_out, F, H, W]`, fp32."""
        f, h, w = self.patch_size
        x = x_BLC.float().view(x_BLC.shape[0], *grid, f, h, w, self.out_dim)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _mlp(in_dim: int, dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": nn.Linear(in_dim, dim), "2": nn.Linear(dim, dim)})


def _random_modulation(rows: int, dim: int) -> Tensor:
    """Normal; by trunc_normal_, which on the meta device does not import the compiler, a second's work."""
    return nn.init.trunc_normal_(torch.empty(1, rows, dim), std=dim**-0.5)
