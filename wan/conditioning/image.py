"""Image conditioning by channels: i2v (first frame) and flf2v (first and last frame).

The network gets y = 4 mask channels + the latent of a video that is grey except for the given frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from wan.cache import StepContext
from wan.conditioning.condition import Condition, Encode
from wan.conditioning.sizes import cover_size


@dataclass(frozen=True)
class ImageCondition(Condition):
    """y: [B, 4 + z, T', h, w] mask and latent channels that follow the noisy ones into the network
    clip_fea: [n, 257, 1280] what CLIP makes of the pictures (Wan2.1)"""

    y: torch.Tensor
    clip_images: tuple[torch.Tensor, ...] = ()
    clip_fea: torch.Tensor | None = None

    def inputs(self, ctx: StepContext) -> dict[str, Any]:
        return {"y": self.y, "clip_fea": self.clip_fea}


def image_condition(
    encode: Encode,
    first: np.ndarray,
    last: np.ndarray | None = None,
    *,
    num_frames: int,
    height: int,
    width: int,
    clip: bool = False,
) -> ImageCondition:
    """Condition of an i2v run, or of flf2v when ``last`` is given.

    first, last: uint8 [H, W, 3], any size; both are stretched to height x width (see ``sizes.i2v_size``)
    clip:        whether the model has a CLIP branch (Wan2.1); it sees the pictures before they are stretched
    """
    pictures = [to_pixels(first)]
    if last is not None:
        pictures.append(crop_last(to_pixels(last), *first.shape[:2]))
    frames = [resize(picture, height, width) for picture in pictures]
    latent = encode(conditioning_video(frames, num_frames)[None])
    mask = frame_mask(num_frames, *latent.shape[-2:], last=last is not None)
    y = torch.cat([mask.to(latent)[None], latent], dim=1)
    return ImageCondition(y, tuple(picture[:, None] for picture in pictures) if clip else ())


def begun_condition(encode: Encode, given: torch.Tensor, num_frames: int, *, clip: bool = False) -> ImageCondition:
    """Condition of an i2v run that begins with several frames, [3, n, H, W] in [-1, 1] at the size of the video."""
    grey = given.new_zeros(3, num_frames - given.shape[1], *given.shape[2:])
    latent = encode(torch.cat([given, grey], dim=1)[None])
    mask = frame_mask(num_frames, *latent.shape[-2:], first=given.shape[1])
    return ImageCondition(torch.cat([mask.to(latent)[None], latent], dim=1), (given[:, :1],) if clip else ())


def to_pixels(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> fp32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[3, H, W] stretched to [3, height, width]; bicubic, no antialias and no clamp, as the models were trained."""
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic")[0]


def crop_last(pixels: torch.Tensor, first_h: int, first_w: int) -> torch.Tensor:
    """The last frame [3, H, W] at the first one's size [3, first_h, first_w]: scaled to cover it, then cropped.

    The official code computes that scale, but crops the unscaled picture, and to a height and a width in each other's
    place. A frame of the first one's size stays as it is, here and there.
    """
    if tuple(pixels.shape[1:]) == (first_h, first_w):
        return pixels
    height, width = cover_size(first_h, first_w, *pixels.shape[1:])
    scaled = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (height - first_h) // 2, (width - first_w) // 2
    return scaled[:, top : top + first_h, left : left + first_w]


def conditioning_video(frames: list[torch.Tensor], num_frames: int) -> torch.Tensor:
    """[3, num_frames, H, W]: the first picture, zeros (mid grey, not black), and the last picture if there are two."""
    grey = frames[0].new_zeros(3, num_frames - len(frames), *frames[0].shape[1:])
    first, *last = (frame[:, None] for frame in frames)
    return torch.cat([first, grey, *last], dim=1)


def frame_mask(num_frames: int, height: int, width: int, *, first: int = 1, last: bool = False) -> torch.Tensor:
    """[4, T', height, width]: which frames are given, so many first ones and perhaps the last; folded so that channel c
    of latent frame k is one video frame.

    The first frame fills all four channels of latent frame 0. The reference writes the flf2v mask for 81 frames only;
    the same rule is used here for every length.
    """
    given = torch.zeros(num_frames)
    given[:first] = 1
    if last:
        given[-1] = 1
    return fold_frames(given)[:, :, None, None].expand(-1, -1, height, width).contiguous()


def fold_frames(values: torch.Tensor) -> torch.Tensor:
    """[T, ...] -> [4, T', ...]: the four frames that a latent frame stands for; the first one stands alone."""
    return torch.cat([values[:1].expand(4, *values.shape[1:]), values[1:]]).unflatten(0, (-1, 4)).transpose(0, 1)
