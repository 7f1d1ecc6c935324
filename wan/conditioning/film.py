"""A run of several clips: what each is conditioned on, where it begins, and which of its frames are the film's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.conditioning.condition import Condition, Encode
from wan.conditioning.source import noised
from wan.errors import SwanError


class Made(NamedTuple):
    """What there is of a film: clips, their frames together, the SHA-256 of each clip's frames; what the next needs."""

    clips: int = 0
    frames: int = 0
    sha256: tuple[str, ...] = ()
    state: Mapping[str, Tensor] = {}


class Film:
    """Clips that are sampled one after another. This one is a single clip; kinds of tasks that make more have their
    own.

    Who samples asks for each clip in turn: `condition`, `start`, `latents`, `frames`. What a clip needs of those before
    is kept here, as `state`.

    Before a clip the audio encoder is asked, by `hear`, for the windows of audio that are `unheard`.
    """

    source: Tensor | None = None  # latents that the clip at hand is made of, see `wan.conditioning.source`

    def __init__(
        self,
        sample: Any,
        make_condition: Callable[[Encode], Condition],
        clips: int = 1,
        make_source: Callable[[Encode], Tensor | None] = lambda encode: None,
    ):
        self.sample, self.make_condition, self.clips, self.make_source = sample, make_condition, clips, make_source
        self.heard: dict[int, Tensor] = {}  # features by window
        self.state: dict[str, Tensor] = {}  # on the CPU; enough to go on with the next clip in another process

    def resume(self, made: Made) -> None:
        """Begin behind the clips that there are. Raises SwanError for what is not of this film."""
        shapes, wanted = ({name: one.shape for name, one in state.items()} for state in (made.state, self.state))
        if made.clips > self.clips or (wanted and shapes != wanted):
            raise SwanError("what there is of the film does not fit it: its inputs have changed, or it is damaged")
        self.state = dict(made.state)

    def unheard(self, clip: int) -> Sequence[int]:
        """Windows of the audio that a clip needs and that are not in `heard`."""
        return ()

    def hear(self, encoder: Callable[..., Tensor], window: int, dtype: torch.dtype) -> Tensor:
        """What the encoder of `wan.models.audio` makes of a window, [layers, D, frames] on the CPU."""
        raise NotImplementedError

    def condition(self, clip: int, encode: Encode) -> Condition:
        self.source = self.make_source(encode)
        return self.make_condition(encode)

    def prompt(self, clip: int) -> str:
        """Of a clip: the last of several stays."""
        prompts = self.sample.prompts or (self.sample.prompt,)
        return prompts[min(clip, len(prompts) - 1)]

    def start(self, clip: int, shape: tuple[int, ...], sigma: float, noise_scale: float = 1.0) -> Tensor:
        """What denoising begins with, at a noise level: fp32, on the CPU. noise_scale: of noise alone."""
        noise = self.noise(clip, shape)
        return noise * noise_scale if self.source is None else noised(self.source, noise, sigma)

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """fp32, drawn on the CPU, so that one seed gives one video on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.sample.seed))

    def fresh_noise(self, clip: int) -> Callable[[tuple[int, ...]], Tensor]:
        """What gives the noise that some solvers add at each step: fp32, drawn on the CPU by a generator of the clip's
        own, which no noise of a beginning comes from. So a film that is gone on with has the same bits."""
        digest = hashlib.sha256(f"{self.sample.seed} {clip}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return lambda shape: torch.randn(shape, generator=generator)

    def latents(self, clip: int, latents: Tensor) -> Tensor:
        """What is decoded: `[1, z, T', h, w]` of what was sampled, without the condition's extra frames."""
        return latents

    def frames(self, clip: int, video: Tensor) -> Tensor:
        """The film's frames [3, t, H, W] of a clip that was decoded, [3, T, H, W] in [-1, 1]. Whoever gets
        them changes them."""
        return video[:, self.sample.trim_first_frames :]
