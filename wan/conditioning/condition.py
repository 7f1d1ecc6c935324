"""What a run is conditioned on besides its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, as_tensor

from wan.cache import StepContext

Encode = Callable[[Tensor], Tensor]  # video [1, 3, T, H, W] in [-1, 1] -> latent [1, z, T', h, w]


class Condition:
    """The one of text-to-video: nothing. Each kind of task has its own; who samples asks it, and never which it is.

    clip_images: pictures [3, 1, H, W] in [-1, 1] for the CLIP encoder, each at its own size; what it makes of them is
        put in by `dataclasses.replace(condition, clip_fea=...)`
    extra_frames: latent frames that are sampled in front of those of the video, and cut off before they are decoded
    """

    clip_images: tuple[Tensor, ...] = ()
    extra_frames: int = 0

    def inputs(self, ctx: StepContext) -> dict[str, Any]:
        """What a prediction gets besides latent, time and text, by the names of `WanModel.forward`."""
        return {}

    def restore(self, latent: Tensor) -> Tensor:
        """`latent` [..., z, T', h, w] with what is given put back; to be applied before and after every step."""
        return latent

    def timesteps(self, t: Tensor | float) -> Tensor:
        """What the network is told at step `t`: [1], or [1, tokens]."""
        return as_tensor(t).reshape(1)

    def tensors(self) -> list[Tensor]:
        """What the VAE made."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]
