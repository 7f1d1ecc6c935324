"""All transformers of Wan2.1 and 2.2 in one class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.cache import NO_CACHE, NoCache, StepContext
from wan.distributed.parallel import Parallel
from wan.memory.offload import Resident
from wan.models.attention import get_attention
from wan.models.dit.adapters import Adapter
from wan.models.dit.adapters.animate import Animate
from wan.models.dit.adapters.s2v import S2V
from wan.models.dit.adapters.vace import Vace
from wan.models.dit.block import Block, Context, Head, ImageEmbedding
from wan.models.dit.sequence import Group, Segments, Sequence, Times
from wan.models.layers import Conv3d, Linear
from wan.models.ops import Reference, choose_ops

_IN_FP32 = ("time_embedding.", "time_projection.", "casual_audio_encoder.", "trainable_cond_mask.")


class WanModel(nn.Module):
    """`model_type`: "t2v", "i2v", "flf2v", "ti2v", "vace", "s2v" or "animate". Wan2.2's i2v experts are "i2v" with
    `clip=False`.

    `clip` (image tokens from CLIP) defaults to what the type means in Wan2.1. `attention` names a back end of
    `wan.models.attention`, `ops` some of `wan.models.ops` (None: by the device). Activations have the type of the
    weights; what `keep_fp32` names stays in fp32. `parallel`: the processes that share the work; by default this one
    alone. `offload`: brings the weights of blocks that are not on the device, see `wan.memory.offload`.
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
        vace_layers: Iterable[int] = (),
        vace_in_dim: int = 96,
        audio_inject_layers: Iterable[int] = (),
        audio_dim: int = 1024,
        num_audio_token: int = 4,
        cond_dim: int = 16,
        enable_adain: bool = True,
        enable_framepack: bool = True,
        motion_frames: int = 73,
        motion_encoder_dim: int | None = None,
        face_px: int = 512,
        face_dim: int = 1024,
        motion_channels: int = 512,
        attention: str = "sdpa",
        ops: str | None = None,
        parallel: Parallel | None = None,
    ):
        super().__init__()
        self.patch_size, self.text_len, self.freq_dim = tuple(patch_size), text_len, freq_dim
        self.head_dim, self.out_dim = dim // num_heads, out_dim
        self.attention, self.ops = get_attention(attention), ops
        self.parallel = parallel or Parallel()
        self.offload = Resident()
        clip = model_type in ("i2v", "flf2v", "animate") if clip is None else clip

        self.patch_embedding = Conv3d(in_dim, dim, self.patch_size, self.patch_size)
        self.text_embedding = _mlp(text_dim, dim)
        self.time_embedding = _mlp(freq_dim, dim)
        self.time_projection = nn.ModuleDict({"1": Linear(dim, 6 * dim)})
        block = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "eps": eps}
        self.blocks = nn.ModuleList(Block(**block, images=clip) for _ in range(num_layers))
        self.head = Head(dim, out_dim * self.patch_size[0] * self.patch_size[1] * self.patch_size[2], eps)
        self.img_emb = ImageEmbedding(dim, positions=model_type == "flf2v") if clip else None
        self.adapters: list[Adapter] = []
        if vace_layers:
            self.adapters.append(Vace(vace_layers, vace_in_dim, self.patch_size, block))
        if audio_inject_layers:
            sizes = {"cond_dim": cond_dim, "audio_dim": audio_dim, "num_audio_token": num_audio_token}
            parts = {"adain": enable_adain, "framepack": enable_framepack, "motion_frames": motion_frames}
            self.adapters.append(S2V(audio_inject_layers, self.patch_embedding, num_heads, **sizes, **parts))
        if motion_encoder_dim is not None:
            sizes = {"face_px": face_px, "face_dim": face_dim, "motion_channels": motion_channels}
            self.adapters.append(Animate(motion_encoder_dim, num_layers, self.patch_size, block, **sizes))
        for name, module in (pair for adapter in self.adapters for pair in adapter.names.items()):
            self.add_module(name, module)

    @staticmethod
    def keep_fp32(name: str) -> bool:
        """Parameters that stay in fp32 whatever the compute type: all that forms the modulation, and audio's tokens."""
        return name.startswith(_IN_FP32) or name.endswith("modulation")

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def units(self) -> dict[str, nn.Module]:
        """The blocks and what adapters put after each, by their paths, in the order of use. Each has `parts`."""
        found = {}
        for adapter in self.adapters:
            found |= adapter.modules(-1)
        for i, block in enumerate(self.blocks):
            found[f"blocks.{i}"] = block
            for adapter in self.adapters:
                found |= adapter.modules(i)
        return found

    def forward(
        self,
        x,
        t: Tensor | Times,
        context,
        *,
        y=None,
        clip_fea: Tensor | None = None,
        cache: NoCache = NO_CACHE,
        ctx: StepContext | None = None,
        **inputs: Any,
    ):
        """Velocity prediction, fp32, in the form of `x`. Raises ValueError where the arguments do not fit together.

        Args:
            x: noisy latents `[B, C_in, F, H, W]`, or a list of `[C_in, F, H, W]` of any sizes.
            t: timesteps 0..1000, `[B]`, or one a token `[B, >= L]` (what exceeds L is ignored), read by the host; or a
                step of a `Schedule`, whose embeddings are made once for all its steps.
            context: text embeddings `[B, M, text_dim]` or a list of `[M_i, text_dim]`, M <= text_len.
            y: conditioning latents, as `x`, concatenated after it on the channels.
            clip_fea: CLIP features `[n, 257, 1280]`, n = B (i2v) or 2B (flf2v).
            cache: goes around the block loop; `ctx` says where in a run this prediction stands. Not for lists.
            inputs: those of the adapters; tensors as `x`, or a list of them where `x` is a list.
        """
        if len(context) != len(x):
            raise ValueError(f"{len(context)} texts for a batch of {len(x)}")
        if (clip_fea is None) != (self.img_emb is None):
            raise ValueError(
                f"clip_fea is {'missing' if clip_fea is None else 'given, but this model has no image branch'}"
            )
        self._check_inputs(inputs)
        if isinstance(x, Tensor):
            times = t if isinstance(t, Times) else Times.of(t)
            return self._forward(x if y is None else torch.cat([x, y], 1), times, context, clip_fea, inputs, cache, ctx)
        if cache is not NO_CACHE:
            raise ValueError("a cache needs one tensor, not a list")
        t = t.t if isinstance(t, Times) else t
        t = t.expand(len(x), *t.shape[1:])
        images = clip_fea.chunk(len(x)) if clip_fea is not None else [None] * len(x)
        ys = y if y is not None else [None] * len(x)
        outs = []
        for i, (latent, cond, image) in enumerate(zip(x, ys, images, strict=True)):
            latent = (latent if cond is None else torch.cat([latent, cond])).unsqueeze(0)
            mine = {name: value[i][None] if isinstance(value, list) else value for name, value in inputs.items()}
            outs.append(self._forward(latent, Times.of(t[i : i + 1]), [context[i]], image, mine)[0])
        return outs

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        wanted = {name for adapter in self.adapters for name in adapter.inputs}
        for name in sorted(wanted ^ inputs.keys()):
            raise ValueError(f"{name} is {'missing' if name in wanted else 'given, but this model has no use for it'}")

    def _forward(
        self,
        x_BCFHW: Tensor,
        times: Times,
        context,
        clip_fea: Tensor | None,
        inputs: dict[str, Any],
        cache: NoCache = NO_CACHE,
        ctx: StepContext | None = None,
    ) -> Tensor:
        x_BLC, grid = self.embed_patches(x_BCFHW)
        ops, groups = choose_ops(self.ops, x_BLC.device), [Group(grid)]
        for adapter in self.adapters:
            x_BLC, groups = adapter.embed(inputs, x_BLC, groups)
        sequence = Sequence(groups, self.parallel, self.attention, ops, self.head_dim, x_BLC.device)
        sequence.set_time(*self.embed_time(times, sequence, len(x_BLC)))
        text_BMC = self.embed_text(context, ops)
        seen = Context(text_BMC, self.img_emb(clip_fea.to(self.dtype)) if self.img_emb is not None else None)
        x_BLC = sequence.shard(x_BLC)
        hold = self.offload.hold
        afters = [adapter.begin(inputs, x_BLC, sequence, seen, hold) for adapter in self.adapters]

        def run(x_BLC: Tensor, first: int, last: int) -> Tensor:
            """Blocks first..last-1: the only loop over blocks."""
            for i, block in enumerate(self.blocks[first:last], first):
                with hold(block):
                    x_BLC = block(x_BLC, sequence, seen, hold)
                for after in afters:
                    x_BLC = after(i, x_BLC)
            return x_BLC

        x_BLC = cache.blocks(ctx, x_BLC, run, len(self.blocks), self.embed_step)
        return self.unpatchify(sequence.gather(self.head(x_BLC, sequence)), grid)

    def embed_patches(self, x_BCFHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Latents to tokens: `([B, L, C], (frames, rows, columns))`."""
        if any(size % patch for size, patch in zip(x_BCFHW.shape[2:], self.patch_size, strict=True)):
            raise ValueError(f"a latent of {list(x_BCFHW.shape[2:])} cannot be cut into patches of {self.patch_size}")
        x = self.patch_embedding(x_BCFHW.to(self.dtype))
        return x.flatten(2).transpose(1, 2).contiguous(), tuple(x.shape[2:])

    def embed_text(self, context, ops: Reference) -> Tensor:
        """Text embeddings, zero-padded to `text_len` (the padding is not masked later): `[B, text_len, C]`."""
        if (longest := max(len(text) for text in context)) > self.text_len:
            raise ValueError(f"a text embedding of {longest} tokens; at most {self.text_len} fit")
        padded = [F.pad(text.to(self.dtype), (0, 0, 0, self.text_len - text.shape[0])) for text in context]
        return self.text_embedding["2"](ops.linear_gelu(self.text_embedding["0"], torch.stack(padded)))

    def embed_time(self, times: Times, sequence: Sequence, batch: int) -> tuple[Tensor, Tensor, Segments]:
        """Each distinct timestep embedded once: `([R, C], [R, 6, C], segments of equal time)`."""
        values, segments = sequence.segments(times.t, batch)
        embedded = times.schedule.embedded
        if values not in embedded:  # as each step would, row for row: a product of more rows may round otherwise
            steps = dict.fromkeys(sequence.segments(t, batch)[0] for t in times.schedule.steps)
            embedded.update(zip(steps, self._embed_times(list(steps)), strict=True))
        return *embedded[values], segments

    def embed_step(self, timestep: float) -> dict[str, Tensor]:
        """What the network makes of a timestep alone: "embedding" [1, C] and "projection" [1, 6, C], fp32."""
        [(time_RC, projected_R6C)] = self._embed_times([(timestep,)])
        return {"embedding": time_RC, "projection": projected_R6C}

    def _embed_times(self, steps: list[tuple[float, ...]]) -> list[tuple[Tensor, Tensor]]:
        """`([R, C], [R, 6, C])`, fp32, of the R timesteps of each step; one copy to the device for all."""
        half = self.freq_dim // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.tensor([t for step in steps for t in step], dtype=torch.float64), rate)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).float()
        waves = waves.to(self.patch_embedding.weight.device, non_blocking=True)
        made = []
        for wave in waves.split([len(step) for step in steps]):
            time_RC = self.time_embedding["2"](F.silu(self.time_embedding["0"](wave)))
            made.append((time_RC, self.time_projection["1"](F.silu(time_RC)).unflatten(1, (6, -1))))
        return made

    def unpatchify(self, x_BLC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens to latents `[B, C_out, F, H, W]`, fp32."""
        f, h, w = self.patch_size
        x = x_BLC.float().view(x_BLC.shape[0], *grid, f, h, w, self.out_dim)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _mlp(in_dim: int, dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Linear(in_dim, dim), "2": Linear(dim, dim)})
