"""What the pipeline holds of an input image while it samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Condition:
    """Conditioning of one run. The default, nothing, is text-to-video.

    y:           [B, 4 + z, T', h, w] mask and latent channels that follow the noisy ones into the network, or None
    clip_images: [3, 1, H, W] in [-1, 1] each, for the CLIP encoder of Wan2.1; at their own size
    frame:       [..., z, 1, h, w] clean latent that stands as latent frame 0 throughout (ti2v), or None
    """

    y: torch.Tensor | None = None
    clip_images: tuple[torch.Tensor, ...] = ()
    frame: torch.Tensor | None = None
    num_latent_frames: int = 1
    patch_size: int = 2

    def restore(self, latent: torch.Tensor) -> torch.Tensor:
        """``latent`` [..., z, T', h, w] with the clean frame put back; to be applied before and after every step."""
        if self.frame is None:
            return latent
        frame = self.frame.to(latent).reshape(latent[..., :1, :, :].shape)
        return torch.cat([frame, latent[..., 1:, :, :]], dim=-3)

    def timesteps(self, t: torch.Tensor | float) -> torch.Tensor:
        """What the network is told at step ``t``: [1], or [1, tokens] fp32 with 0 on the tokens of the clean frame."""
        t = torch.as_tensor(t).reshape(1)
        if self.frame is None:
            return t
        height, width = self.frame.shape[-2:]
        frame_tokens = (height // self.patch_size) * (width // self.patch_size)
        tokens = t.float().repeat(1, frame_tokens * self.num_latent_frames)
        tokens[:, :frame_tokens] = 0
        return tokens
