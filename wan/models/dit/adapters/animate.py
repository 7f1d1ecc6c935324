"""Animate: poses are added to the tokens of the video, and a face video is looked at after every fifth block.

Source: behaviour of the official Wan2.2 `WanAnimateModel`; parameter names are its own.
Shape legend: B batch, L tokens of this rank, C width; of the face: T frames, F latent frames, N tokens a latent frame.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.models.dit.adapters import Adapter, After
from wan.models.dit.adapters.motion import MotionEncoder
from wan.models.dit.adapters.s2v import CausalConv1d
from wan.models.dit.block import Context, Hold, RMSNorm
from wan.models.dit.sequence import Group, Sequence
from wan.models.layers import Conv3d, Linear

POSE_DIM = 16  # channels of a latent of Wan2.1's VAE
FACE_EVERY = 5  # blocks, after the first of which it is looked at
_HEADS = 4  # of the face encoder
_EPS = 1e-6


class Face:
    """A face video, which is encoded by the first forward that sees it, and not again by the others of its run.

    What was made belongs to that network and to the weights it had.

    pixels: `[B, 3, T, S, S]`, S = `face_px`, in [-1, 1], on any device; let go of once they are encoded
    frames: T of a video whose single picture stays the same
    tokens: `[B, F, 5, C]` that were made of it, the first latent frame's zeros
    """

    def __init__(self, pixels: Tensor, frames: int | None = None):
        self.pixels: Tensor | None = pixels
        self.frames = frames or pixels.shape[2]
        self.tokens: Tensor | None = None


class FaceEncoder(nn.Module):
    """Vectors of motion to tokens: some that are made of them and a learned one."""

    def __init__(self, in_dim: int, hidden_dim: int, num_heads: int = _HEADS, head_dim: int = 1024):
        super().__init__()
        self.num_heads = num_heads
        self.conv1_local = CausalConv1d(in_dim, num_heads * head_dim)
        self.conv2, self.conv3 = (CausalConv1d(head_dim, head_dim, stride=2) for _ in range(2))
        self.out_proj = Linear(head_dim, hidden_dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, hidden_dim))

    def forward(self, motion_BTC: Tensor) -> Tensor:
        """`[B, T, in_dim] -> [B, F, heads + 1, hidden_dim]`, F = n + 1 of T = 4n + 1 frames."""
        x = self.conv1_local(motion_BTC.transpose(1, 2))
        x = _norm_silu(x.unflatten(1, (self.num_heads, -1)).flatten(0, 1))
        x = self.out_proj(_norm_silu(self.conv3(_norm_silu(self.conv2(x)))).transpose(1, 2))
        tokens = x.unflatten(0, (-1, self.num_heads)).transpose(1, 2)
        return torch.cat([tokens, self.padding_tokens.expand(*tokens.shape[:2], 1, -1)], dim=2)


def _norm_silu(x_BCT: Tensor) -> Tensor:
    x = x_BCT.transpose(1, 2)
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=_EPS)).transpose(1, 2)


class FaceBlock(nn.Module):
    """The tokens of each latent frame attend to those of the face at that time. `parts`: see `Block`."""

    parts = ("linear1_kv", "linear1_q", "linear2")

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.head_dim = dim // num_heads
        self.linear1_kv, self.linear1_q = Linear(dim, 2 * dim), Linear(dim, dim)
        self.linear2 = Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, _EPS), RMSNorm(self.head_dim, _EPS)

    def forward(self, x_BLC: Tensor, face_BFNC: Tensor, sequence: Sequence, hold: Hold) -> Tensor:
        """What is added to x, the tokens of the video."""
        with hold(self.linear1_kv):
            k_BFNC, v_BFNC = self.linear1_kv(F.layer_norm(face_BFNC, face_BFNC.shape[-1:], eps=_EPS)).chunk(2, -1)
        with hold(self.linear1_q):
            q_BLC = self.linear1_q(F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=_EPS))
        q_BLHD, k_BFNHD = self._normed(q_BLC, self.q_norm, sequence), self._normed(k_BFNC, self.k_norm, sequence)
        v_BFNHD = v_BFNC.unflatten(-1, (-1, self.head_dim))
        y_BLHD = torch.zeros_like(q_BLHD)
        for frame, rows in sequence.frames_of(0):
            y_BLHD[:, rows] = sequence.attention(q_BLHD[:, rows], k_BFNHD[:, frame], v_BFNHD[:, frame])
        with hold(self.linear2):
            return self.linear2(y_BLHD.flatten(2))

    def _normed(self, x: Tensor, norm: RMSNorm, sequence: Sequence) -> Tensor:
        """`[..., C] -> [..., H, D]`, each head normed alone."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        rows = heads.reshape(1, -1, self.head_dim)
        return sequence.ops.norm_rope(rows, norm.weight, norm.eps, self.head_dim, None).view(heads.shape)


class Animate(Adapter):
    """Latent frame 0 is the reference; poses and face belong to those that follow it.

    Its inputs:
        pose_latents: `[B, 16, F - 1, H, W]`, added to frames 1...F - 1 of the latent
        face_pixel_values: `[B, 3, T, S, S]`, S = `face_px`, in [-1, 1], T = 4 (F - 2) + 1, or a `Face`,
            encoded once for a run
    """

    inputs = ("pose_latents", "face_pixel_values")

    def __init__(
        self,
        motion_encoder_dim: int,
        num_layers: int,
        patch_size: tuple[int, ...],
        block: dict[str, Any],
        *,
        face_px: int,
        face_dim: int,
        motion_channels: int,
    ):
        """block: the arguments of a `Block`, but for its images; face_dim: of each head of the face encoder."""
        self.face_px, dim, heads = face_px, block["dim"], block["num_heads"]
        self.pose_patch_embedding = Conv3d(POSE_DIM, dim, patch_size, patch_size)
        self.motion_encoder = MotionEncoder(face_px, motion_encoder_dim, channels=motion_channels)
        self.face_encoder = FaceEncoder(motion_encoder_dim, dim, head_dim=face_dim)
        self.fuser_blocks = nn.ModuleList(FaceBlock(dim, heads) for _ in range(num_layers // FACE_EVERY))
        self.names = {
            "pose_patch_embedding": self.pose_patch_embedding,
            "motion_encoder": self.motion_encoder,
            "face_encoder": self.face_encoder,
            "face_adapter": nn.ModuleDict({"fuser_blocks": self.fuser_blocks}),
        }

    def empty_inputs(self, latent: Tensor) -> dict[str, Any]:
        batch, _, frames, *sides = latent.shape
        face = latent.new_empty(batch, 3, 4 * (frames - 2) + 1, self.face_px, self.face_px)
        return {"pose_latents": latent.new_empty(batch, POSE_DIM, frames - 1, *sides), "face_pixel_values": face}

    def modules(self, block: int) -> dict[str, nn.Module]:
        n, rest = divmod(block, FACE_EVERY)
        if rest or not 0 <= n < len(self.fuser_blocks):
            return {}
        return {f"face_adapter.fuser_blocks.{n}": self.fuser_blocks[n]}

    def embed(self, inputs: dict[str, Any], x_BLC: Tensor, groups: list[Group]) -> tuple[Tensor, list[Group]]:
        pose, patch = inputs["pose_latents"], self.pose_patch_embedding.stride
        frames, rows, columns = groups[0].grid
        sides = [n * p for n, p in zip((frames - 1, rows, columns), patch, strict=True)]
        if list(pose.shape) != (wanted := [len(x_BLC), POSE_DIM, *sides]):
            raise ValueError(f"pose_latents is {list(pose.shape)}; these latents need {wanted}")
        first, video = x_BLC.split([rows * columns, x_BLC.shape[1] - rows * columns], dim=1)
        pose_BLC = self.pose_patch_embedding(pose.to(x_BLC.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([first, video + pose_BLC], dim=1), groups

    def begin(self, inputs: dict[str, Any], x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold) -> After:
        face = inputs["face_pixel_values"]
        face = face if isinstance(face, Face) else Face(face)
        if face.tokens is None:
            face.tokens, face.pixels = self._encode(face, sequence.groups[0].grid[0], x_BLC), None
        face_BFNC = face.tokens

        def after(block: int, y_BLC: Tensor) -> Tensor:
            for module in self.modules(block).values():
                with hold(module):
                    y_BLC = y_BLC + module(y_BLC, face_BFNC, sequence, hold)
            return y_BLC

        return after

    def _encode(self, face: Face, latent_frames: int, x_BLC: Tensor) -> Tensor:
        """`[B, F, 5, C]`; what the reference's frame looks at are zeros."""
        wanted = [len(x_BLC), 3, 4 * (latent_frames - 2) + 1, self.face_px, self.face_px]
        shape = list(face.pixels.shape)
        if [*shape[:2], face.frames, *shape[3:]] != wanted:
            raise ValueError(f"face_pixel_values is {shape}; these latents need {wanted}")
        pictures = face.pixels.transpose(1, 2).flatten(0, 1).split(1)  # one at a time: each takes much memory
        motion = torch.cat([self.motion_encoder(one.to(x_BLC.device, x_BLC.dtype)) for one in pictures])
        motion_BTC = motion.to(x_BLC.dtype).unflatten(0, (len(x_BLC), -1)).expand(-1, face.frames, -1)
        return F.pad(self.face_encoder(motion_BTC), (0, 0, 0, 0, 1, 0))
