"""Image conditioning by latent: ti2v keeps the clean first latent frame in place and tells the network t = 0 there."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from wan.conditioning.condition import Condition
from wan.conditioning.image import Encode, to_pixels
from wan.conditioning.sizes import cover_size, latent_frames


def first_frame_condition(
    encode: Encode, image: np.ndarray, *, num_frames: int, height: int, width: int, patch_size: int = 2
) -> Condition:
    """Condition of a ti2v run from a uint8 [H, W, 3] image; the size comes from ``sizes.ti2v_size``."""
    frame = encode(cover(image, height, width)[None])
    return Condition(frame=frame, num_latent_frames=latent_frames(num_frames), patch_size=patch_size)


def cover(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> [3, 1, height, width] in [-1, 1]: Lanczos until it covers the size, then the middle of it."""
    picture = Image.fromarray(np.asarray(image))
    covering_h, covering_w = cover_size(height, width, picture.height, picture.width)
    picture = picture.resize((covering_w, covering_h), Image.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    return to_pixels(np.asarray(picture))[:, None]
