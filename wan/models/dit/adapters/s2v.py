"""Speech to video: the audio moves what a reference picture shows, clip by clip, each going on from the one before.

Tokens of the pose are added to those of the video; tokens of the reference and of the frames before (motion) come
behind them, at timestep 0. After some blocks, the video's tokens of each latent frame attend to those of its audio.

Source: behaviour of the official Wan2.2 `WanModel_S2V`; parameter names are its own.
Shape legend: B batch, T latent frames, L tokens of this rank, N audio tokens a frame, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.models.dit.adapters import Adapter, After
from wan.models.dit.block import Context, CrossAttention, Hold
from wan.models.dit.sequence import Group, Sequence
from wan.models.layers import Conv3d, Linear
from wan.models.ops.reference import Modulated
from wan.weights.infer import AUDIO_LAYERS

REFERENCE_AT = 30  # frame that the reference stands at
PACKED = (1, 2, 16)  # motion latents by how finely they are cut: the nearest, those before it, and the rest
EPS = 1e-6  # of its norms, whatever that of the blocks
VIDEO, REFERENCE, MOTION = range(3)  # rows of the learned marks


class Part(NamedTuple):
    """The video's tokens of this rank: where they are among its own, the latent frames that they are of, and how many
    tokens of the first and of the last of these frames other ranks have."""

    where: slice
    frames: slice
    before: int
    behind: int

    @classmethod
    def of(cls, sequence: Sequence) -> Part:
        where, tokens = sequence.mine(0)
        _, rows, columns = sequence.groups[0].grid
        area = rows * columns
        frames = slice(tokens.start // area, -(-tokens.stop // area))
        return cls(where, frames, tokens.start - frames.start * area, frames.stop * area - tokens.stop)


class CausalConv1d(nn.Module):
    """Looks at this step and the two before it; before the first there are copies of it: `[B, C, T] -> [B, C', T']`."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCT, (2, 0), mode="replicate"))


class AudioTokens(nn.Module):
    """Audio features of four frames to tokens of one latent frame, and (with `adain`) to one vector for the whole."""

    def __init__(self, in_dim: int, dim: int, num_tokens: int, adain: bool):
        super().__init__()
        self.num_tokens = num_tokens
        self.conv1_local = CausalConv1d(in_dim, dim // 4 * num_tokens)
        self.conv1_global = CausalConv1d(in_dim, dim // 4) if adain else None
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = Linear(dim, dim) if adain else None
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x_BCT: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, in_dim, 4T] -> ([B, T, N, C], [B, T, C])`, N = num_tokens + 1: the last is learned, the same for all."""
        B = len(x_BCT)
        local = self._shrink(self.conv1_local(x_BCT).unflatten(1, (self.num_tokens, -1)).flatten(0, 1))
        local_BTNC = local.unflatten(0, (B, -1)).transpose(1, 2)
        padding = self.padding_tokens.expand(B, local_BTNC.shape[1], 1, -1)
        tokens_BTNC = torch.cat([local_BTNC, padding], dim=2)
        if self.conv1_global is None:
            return tokens_BTNC, None
        return tokens_BTNC, self.final_linear(self._shrink(self.conv1_global(x_BCT)))

    def _shrink(self, x_BCT: Tensor) -> Tensor:
        """`[B, C / 4, 4T] -> [B, T, C]`."""
        x_BTC = _norm_silu(x_BCT.transpose(1, 2))
        for conv in (self.conv2, self.conv3):
            x_BTC = _norm_silu(conv(x_BTC.transpose(1, 2)).transpose(1, 2))
        return x_BTC


class AudioEncoder(nn.Module):
    """A learned mixture of the layers of wav2vec2, made into tokens."""

    def __init__(self, in_dim: int, dim: int, num_tokens: int, adain: bool):
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, AUDIO_LAYERS, 1, 1), 0.01))
        self.encoder = AudioTokens(in_dim, dim, num_tokens, adain)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, 25, in_dim, 4T]`, see `AudioTokens`."""
        weights = F.silu(self.weights)
        return self.encoder((audio * (weights / weights.sum(1, keepdim=True))).sum(1))


class AudioNorm(nn.Module):
    """LayerNorm, scaled and shifted by what the audio of each latent frame says (AdaIN)."""

    parts = ("linear",)
    eps = 1e-5

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, x_BLC: Tensor, audio_BTC: Tensor, part: Part, sequence: Sequence, hold: Hold) -> Tensor:
        with hold(self.linear):
            shift_BTC, scale_BTC = self.linear(F.silu(audio_BTC[:, part.frames])).chunk(2, dim=-1)
        if not x_BLC.shape[1]:
            return x_BLC
        count, (_, rows, columns) = shift_BTC.shape[1], sequence.groups[0].grid
        tokens = [rows * columns] * count
        tokens[0] -= part.before
        tokens[-1] -= part.behind
        segments = [(b * count + frame, n) for b in range(len(x_BLC)) for frame, n in enumerate(tokens)]
        norm = Modulated(shift_BTC.flatten(0, 1), scale_BTC.flatten(0, 1), self.eps)
        return sequence.ops.norm(x_BLC, norm, segments)


class Injector(CrossAttention):
    """Attention of the video's tokens to those of the audio of their latent frame."""

    parts = ("q", "k", "v", "o")

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, EPS, images=False)

    def forward(self, x_BLC: Tensor, audio_BTNC: Tensor, part: Part, sequence: Sequence, hold: Hold) -> Tensor:
        B, L, _ = x_BLC.shape
        audio = audio_BTNC[:, part.frames].flatten(0, 1)
        if not L:
            return x_BLC
        with hold(self.q):
            q = self.q(F.pad(x_BLC, (0, 0, part.before, part.behind)))  # whole frames
        q = self.normed(q.view(len(audio), -1, q.shape[-1]), self.norm_q, sequence.ops)
        with hold(self.k):
            k = self.normed(self.k(audio), self.norm_k, sequence.ops)
        with hold(self.v):
            v = self.heads(self.v(audio))
        y = sequence.attention(q, k, v).flatten(2).view(B, -1, x_BLC.shape[-1])
        with hold(self.o):
            return self.o(y[:, part.before : part.before + L])


class AudioInjector(nn.Module):
    """What is used after the blocks where audio comes in, one each."""

    def __init__(self, count: int, dim: int, num_heads: int, adain: bool):
        super().__init__()
        self.injector = nn.ModuleList(Injector(dim, num_heads) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AudioNorm(dim) for _ in range(count)) if adain else None


class FramePacker(nn.Module):
    """Motion latents to few tokens: the further back in time, the more goes into one (FramePack, arXiv 2504.12626)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = Conv3d(in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.proj_2x = Conv3d(in_dim, dim, (2, 4, 4), (2, 4, 4))
        self.proj_4x = Conv3d(in_dim, dim, (4, 8, 8), (4, 8, 8))

    def forward(self, motion_BCTHW: Tensor) -> list[tuple[Tensor, Group]]:
        """Tokens of the nearest latent, of the two before it and of the 16 before these; what is not there is 0."""
        total, (height, width) = sum(PACKED), motion_BCTHW.shape[-2:]
        motion = motion_BCTHW[:, :, -total:]
        motion = F.pad(motion, (0, 0, 0, 0, total - motion.shape[2], 0))
        packed, end = [], total
        for count, proj in zip(PACKED, (self.proj, self.proj_2x, self.proj_4x), strict=True):
            tokens, grid = _tokens(proj(motion[:, :, end - count : end]))
            end -= count
            packed.append((tokens, _given(grid, end - total, (count, height // 2, width // 2))))
        return packed


class S2V(Adapter):
    """Its inputs:
    ref_latents: `[B, C_in, 1, H, W]` of the reference picture
    motion_latents: `[B, C_in, T_m, H, W]` of the frames before this clip; None: there are none
    cond_states: `[B, cond_dim, T, H, W]` of the pose; 0 without one
    audio_input: `[B, 25, audio_dim, T_a]` features of wav2vec2, one for each frame, T_a = 4T
    motion_frames: how many frames come before the clip, and in how many latents: the audio begins with them
    """

    inputs = ("ref_latents", "motion_latents", "cond_states", "audio_input", "motion_frames")

    def __init__(
        self,
        layers: Iterable[int],
        patch_embedding: Conv3d,
        num_heads: int,
        *,
        cond_dim: int,
        audio_dim: int,
        num_audio_token: int,
        adain: bool,
        framepack: bool,
        motion_frames: int,
    ):
        """patch_embedding: the model's own, which the reference goes through too; motion_frames: as runs give it."""
        self.motion_frames = motion_frames
        self.layers = {layer: n for n, layer in enumerate(sorted(layers))}
        self.patch_embedding, dim = patch_embedding, patch_embedding.out_channels
        self.cond_encoder = Conv3d(cond_dim, dim, patch_embedding.kernel_size, patch_embedding.stride)
        self.audio_encoder = AudioEncoder(audio_dim, dim, num_audio_token, adain)
        self.injector = AudioInjector(len(self.layers), dim, num_heads, adain)
        self.marks = nn.Embedding(3, dim)
        self.packer = FramePacker(patch_embedding.in_channels, dim) if framepack else None
        self.names = {
            "cond_encoder": self.cond_encoder,
            "casual_audio_encoder": self.audio_encoder,
            "audio_injector": self.injector,
            "trainable_cond_mask": self.marks,
        } | ({"frame_packer": self.packer} if framepack else {})

    def empty_inputs(self, latent: Tensor) -> dict[str, Any]:
        _, channels, frames, *size = latent.shape
        motion = self.motion_frames, (self.motion_frames + 3) // 4
        audio_dim = self.audio_encoder.encoder.conv1_local.conv.in_channels
        return {
            "ref_latents": latent.new_empty(1, channels, 1, *size),
            "motion_latents": latent.new_empty(1, channels, motion[1], *size),
            "cond_states": latent.new_empty(1, self.cond_encoder.in_channels, frames, *size),
            "audio_input": latent.new_empty(1, AUDIO_LAYERS, audio_dim, 4 * frames),
            "motion_frames": motion,
        }

    def modules(self, block: int) -> dict[str, nn.Module]:
        n, norms = self.layers.get(block), self.injector.injector_adain_layers
        if n is None:
            return {}
        first = {} if norms is None else {f"audio_injector.injector_adain_layers.{n}": norms[n]}
        return {**first, f"audio_injector.injector.{n}": self.injector.injector[n]}

    def embed(self, inputs: dict[str, Any], x_BLC: Tensor, groups: list[Group]) -> tuple[Tensor, list[Group]]:
        pose, grid = _tokens(self.cond_encoder(inputs["cond_states"].to(x_BLC.dtype)))
        if grid != groups[0].grid:
            raise ValueError(f"cond_states make tokens of {grid}, and the latents of {groups[0].grid}")
        reference, grid = _tokens(self.patch_embedding(inputs["ref_latents"].to(x_BLC.dtype)))
        if grid != (1, *groups[0].grid[1:]):
            raise ValueError(f"ref_latents make tokens of {grid}; these latents need {(1, *groups[0].grid[1:])}")
        marks = self.marks.weight.to(x_BLC.dtype)
        parts = [x_BLC + pose + marks[VIDEO], reference + marks[REFERENCE]]
        groups = [*groups, _given(grid, REFERENCE_AT)]
        for tokens, group in self._motion(inputs["motion_latents"], x_BLC.dtype):
            parts.append(tokens + marks[MOTION])
            groups.append(group)
        return torch.cat(parts, dim=1), groups

    def _motion(self, latents: Tensor | None, dtype: torch.dtype) -> list[tuple[Tensor, Group]]:
        if latents is None or not latents.shape[2]:
            return []
        if self.packer is not None:
            return self.packer(latents.to(dtype))
        tokens, grid = _tokens(self.patch_embedding(latents.to(dtype)))
        return [(tokens, _given(grid, -grid[0]))]

    def begin(self, inputs: dict[str, Any], x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold) -> After:
        audio_BTNC, whole_BTC = self._audio(inputs["audio_input"], *inputs["motion_frames"])
        frames = sequence.groups[0].grid[0]
        if audio_BTNC.shape[1] != frames:
            raise ValueError(f"audio_input is for {audio_BTNC.shape[1]} latent frames, and there are {frames}")
        audio_BTNC, whole_BTC = (None if one is None else one.to(x_BLC.dtype) for one in (audio_BTNC, whole_BTC))
        part, norms = Part.of(sequence), self.injector.injector_adain_layers
        zeros = x_BLC.new_zeros(1, x_BLC.shape[-1])

        def after(block: int, y_BLC: Tensor) -> Tensor:
            n = self.layers.get(block)
            if n is None:
                return y_BLC
            video = y_BLC[:, part.where]
            if norms is None:
                segments = [(0, video.shape[0] * video.shape[1])]
                normed = sequence.ops.norm(video, Modulated(zeros, zeros, EPS), segments)
            else:
                with hold(norms[n]):
                    normed = norms[n](video, whole_BTC, part, sequence, hold)
            with hold(self.injector.injector[n]):
                heard = self.injector.injector[n](normed, audio_BTNC, part, sequence, hold)
            y_BLC = y_BLC.clone()  # whoever gave it may keep it
            y_BLC[:, part.where] += heard
            return y_BLC

        return after

    def _audio(self, audio: Tensor, motion_frames: int, motion_latents: int) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, T, N, C]` and (with AdaIN) one vector `[B, T, C]` for each latent frame, fp32. Before the audio
        there is its first frame, as often as there are frames of motion, whose tokens are dropped."""
        before = audio[..., :1].expand(-1, -1, -1, motion_frames)
        tokens, whole = self.audio_encoder(torch.cat([before, audio], dim=-1).float())
        return tokens[:, motion_latents:], None if whole is None else whole[:, motion_latents:]


def _given(grid: tuple[int, int, int], frame: int, extent: tuple[int, int, int] | None = None) -> Group:
    """Tokens of what is there already: at timestep 0, from `frame` on, and nothing is made of them."""
    return Group(grid, (frame, 0, 0), extent, time=0.0, is_seen=False)


def _tokens(x_BCTHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    return x_BCTHW.flatten(2).transpose(1, 2), tuple(x_BCTHW.shape[2:])


def _norm_silu(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=EPS))
