"""Image conditioning by latent: ti2v keeps the clean first latent frame in place and tells the network t = 0 there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from wan.conditioning.condition import Condition, Encode
from wan.conditioning.image import to_pixels
from wan.conditioning.sizes import cover_size, latent_frames


@dataclass(frozen=True)
class FrameCondition(Condition):
    """frame: [..., z, n, h, w] clean latents that stand as the first latent frames throughout; most often one"""

    frame: torch.Tensor
    num_latent_frames: int = 1
    patch_size: int = 2

    def restore(self, latent: torch.Tensor) -> torch.Tensor:
        count = self.frame.shape[-3]
        frame = self.frame.to(latent).reshape(latent[..., :count, :, :].shape)
        return torch.cat([frame, latent[..., count:, :, :]], dim=-3)

    def timesteps(self, t: torch.Tensor | float) -> torch.Tensor:
        """[1, tokens], fp32, with 0 on the tokens of the clean frames."""
        count, height, width = self.frame.shape[-3:]
        frame_tokens = (height // self.patch_size) * (width // self.patch_size)
        tokens = super().timesteps(t).float().repeat(1, frame_tokens * self.num_latent_frames)
        tokens[:, : count * frame_tokens] = 0
        return tokens


def first_frame_condition(
    encode: Encode, image: np.ndarray, *, num_frames: int, height: int, width: int, patch_size: int = 2
) -> FrameCondition:
    """Condition of a ti2v run from a uint8 [H, W, 3] image; the size comes from ``sizes.ti2v_size``."""
    frame = encode(cover(image, height, width)[None])
    return FrameCondition(frame, latent_frames(num_frames), patch_size)


def cover(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> [3, 1, height, width] in [-1, 1]: Lanczos until it covers the size, then the middle of it."""
    picture = Image.fromarray(np.asarray(image))
    covering_h, covering_w = cover_size(height, width, picture.height, picture.width)
    picture = picture.resize((covering_w, covering_h), Image.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    return to_pixels(np.asarray(picture))[:, None]
