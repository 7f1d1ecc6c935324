"""Films that go on: each clip begins with the last frames of the one before, given to it as its task has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.condition import Condition, Encode
from wan.conditioning.film import Film
from wan.conditioning.vace_inputs import as_frames, read_frames
from wan.video import VideoFile

GoOn = Callable[[Encode, Tensor], Condition]  # (the VAE, frames [3, n, H, W] in [-1, 1] that a clip begins with)


class ContinuedFilm(Film):
    """state: "last", [3, overlap, H, W], the last frames of the film so far; none before a first clip that begins one.

    The frames that a clip was given are left out of it. Colours stay as the VAE gives them: moving mean and spread of
    each clip to those of the given frames made them drift more, not less (`benchmarks.film_drift`).
    """

    def __init__(
        self,
        sample: Any,
        make_condition: Callable[[Encode], Condition],
        clips: int,
        go_on: GoOn,
        last: Tensor | None = None,
    ):
        """sample: also overlap; last: see `state`."""
        super().__init__(sample, make_condition, clips)
        self.go_on, self.state = go_on, {} if last is None else {"last": last}

    def condition(self, clip: int, encode: Encode) -> Condition:
        return self.go_on(encode, self.state["last"]) if self.state else self.make_condition(encode)

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """Each clip has a seed of its own."""
        generator = torch.Generator().manual_seed((self.sample.seed + clip) % 2**63)
        return torch.randn(shape, generator=generator)

    def frames(self, clip: int, video: Tensor) -> Tensor:
        if self.state:
            given = self.state["last"].to(video)
            video = video[:, given.shape[1] :]
            so_far = torch.cat([given, video], dim=1)
        else:
            so_far = video = super().frames(clip, video)
        self.state = {"last": so_far[:, -self.sample.overlap :].cpu().clone()}
        return video


def last_frames(video: VideoFile, count: int, height: int, width: int) -> Tensor:
    """[3, count, height, width] in [-1, 1], scaled to cover that size; the middle of each."""
    ids = range(len(video) - count, len(video))
    return as_frames(read_frames(video, ids, height, width))
