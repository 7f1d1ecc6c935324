"""A run of several clips: what each is conditioned on, where it begins, and which of its frames are the film's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.condition import Condition, Encode


class Film:
    """Clips that are sampled one after another. This one is a single clip; kinds of tasks that make more have their
    own.

    Who samples asks for each clip in turn: `condition`, `noise`, `latents`, `frames`. What a clip needs of those before
    is kept here, as `state`.

    has_audio: whether the audio encoder is asked, by `hear`, before the first clip; `features`: what that gave
    """

    has_audio = False
    features: Tensor

    def __init__(self, sample: Any, make_condition: Callable[[Encode], Condition], clips: int = 1):
        self.sample, self.make_condition, self.clips = sample, make_condition, clips
        self.state: dict[str, Tensor] = {}  # enough to go on with the next clip in another process

    def hear(self, encoder: Callable[..., Tensor]) -> Tensor:
        """What the audio encoder makes of the audio, [layers, D, frames]. encoder: see `wan.models.audio`."""
        raise NotImplementedError

    def condition(self, clip: int, encode: Encode) -> Condition:
        return self.make_condition(encode)

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """What denoising begins with, fp32, on the CPU, so that one seed gives one video on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.sample.seed))

    def latents(self, clip: int, latents: Tensor) -> Tensor:
        """What is decoded: `[1, z, T', h, w]` of what was sampled, without the condition's extra frames."""
        return latents

    def frames(self, clip: int, video: Tensor) -> Tensor:
        """The film's frames [3, t, H, W] of a clip that was decoded, [3, T, H, W] in [-1, 1]. Whoever gets
        them changes them."""
        return video[:, self.sample.trim_first_frames :]
