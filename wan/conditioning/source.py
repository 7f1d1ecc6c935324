"""A video that another one is made of: sampling begins with its latents and noise, at a step in the middle.

Source: SDEdit (arXiv 2108.01073). With flow matching a latent at noise level sigma is (1 - sigma) x + sigma noise.
"""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor

from wan.conditioning.condition import Encode
from wan.conditioning.vace_inputs import as_frames, read_frames
from wan.video import VideoFile

_EARLY = 1e-6  # s; what begins as early as this too late has begun


def source_latent(encode: Encode, video: VideoFile, num_frames: int, fps: int, height: int, width: int) -> Tensor:
    """[1, z, T', h, w] of its first frames at so many a second, scaled to cover the size; the middle of each."""
    ids = [bisect_right(video.times, at / fps + _EARLY) - 1 for at in range(num_frames)]
    return encode(as_frames(read_frames(video, ids, height, width))[None])


def noised(source: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return (1 - sigma) * source.to(noise) + sigma * noise
