"""Speech to video: a film of clips, each of which sees the reference picture, its part of the audio and of the pose,
and the last frames of the film so far (motion).

Source: behaviour of the official Wan2.2 `WanS2V.generate`. Pixels are rounded to no 16 bits on their way to the VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wan.audio import AudioFile
from wan.cache import StepContext
from wan.conditioning.condition import Condition, Encode
from wan.conditioning.film import Film
from wan.conditioning.image import to_pixels
from wan.conditioning.sizes import LOST_FRAMES
from wan.models.audio import by_window, steps_of_frames

_GIVEN_FRAMES = 6  # of motion, that stand for a film which begins with the reference
Pose = Callable[[int, int], Iterable[np.ndarray]]  # (from which frame on, how many) -> those that there are, uint8


@dataclass(frozen=True)
class S2VCondition(Condition):
    """reference: [1, z, 1, h, w]
    motion: [1, z, T_m, h, w] of the frames before; None: there are none
    pose: [1, z, T', h, w]; zeros without one
    audio: [1, layers, D, 4T'], features of each frame
    motion_frames: frames of motion, and the latents they make"""

    reference: Tensor
    motion: Tensor | None
    pose: Tensor
    audio: Tensor
    motion_frames: tuple[int, int]

    def inputs(self, ctx: StepContext) -> dict[str, Any]:
        """Without guidance's text there is no audio either."""
        return {
            "ref_latents": self.reference,
            "motion_latents": self.motion,
            "cond_states": self.pose,
            "audio_input": self.audio if ctx.branch == "cond" else torch.zeros_like(self.audio),
            "motion_frames": self.motion_frames,
        }


class S2VFilm(Film):
    """state: "motion", [3, motion_frames, H, W], the last frames of the film so far; what is not there yet is grey.

    A clip of n frames is sampled as n / 4 latents. Decoded behind the one of the reference, these are n - 3 frames more
    and behind those of the motion n.
    """

    def __init__(
        self,
        sample: Any,
        reference: Tensor,
        audio: AudioFile | None = None,
        pose: Pose | None = None,
        *,
        fps: int = 16,
        motion_frames: int = 73,
    ):
        """sample: seed, num_clip, infer_frames, start_from_ref, trim_first_frames; reference: [3, H, W] in [-1, 1]."""
        self.sample, self.clips = sample, sample.num_clip
        self.reference, self.audio, self.pose = reference, audio, pose
        frames = self.clips * sample.infer_frames
        self._windows = by_window(steps_of_frames(audio.samples, fps)[:frames] if audio else torch.zeros(frames))
        self.heard = {}
        self.motion_frames = motion_frames, (motion_frames + 3) // 4
        motion = reference.new_zeros(3, motion_frames, *reference.shape[1:])
        if sample.start_from_ref:
            motion[:, -_GIVEN_FRAMES:] = reference[:, None]
        self.state = {"motion": motion}
        self._given: dict[str, Tensor] = {}  # latents of what this process has encoded

    def unheard(self, clip: int) -> list[int]:
        windows = self._windows_of(clip)
        self.heard = {window: features for window, features in self.heard.items() if window in windows}
        return [window for window in windows if window not in self.heard]

    def hear(self, encoder: Callable[..., Tensor], window: int, dtype: torch.dtype) -> Tensor:
        return encoder(self.audio, self._windows[window], dtype)

    def condition(self, clip: int, encode: Encode) -> S2VCondition:
        given = self._given
        if "reference" not in given:
            given["reference"] = encode(self.reference[None, :, None])
        motion = None
        if not self._begins(clip):
            motion = given["motion"] = encode(self.state["motion"][None])
        pose = self._pose(clip, encode)
        return S2VCondition(given["reference"], motion, pose, self._audio(clip).to(pose.device), self.motion_frames)

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """Of bfloat16's values; each clip has a seed of its own."""
        generator = torch.Generator().manual_seed(self.sample.seed + clip)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).float()

    def latents(self, clip: int, latents: Tensor) -> Tensor:
        before = self._given["reference" if self._begins(clip) else "motion"]
        return torch.cat([before.to(latents), latents], dim=2)

    def frames(self, clip: int, video: Tensor) -> Tensor:
        video = video[:, -self.sample.infer_frames :]
        if self._begins(clip):
            video = video[:, LOST_FRAMES:]
        count = self.motion_frames[0]
        last = video[:, -count:].to("cpu", copy=True)  # the caller changes it, and the device has better to keep
        self.state["motion"] = torch.cat([self.state["motion"], last], dim=1)[:, -count:].clone()
        return video[:, self.sample.trim_first_frames if clip == 0 else 0 :]

    def _begins(self, clip: int) -> bool:
        """Whether there is nothing before the clip."""
        return clip == 0 and not self.sample.start_from_ref

    def _windows_of(self, clip: int) -> range:
        """Of the audio, those that frames of a clip lie in; of one that begins behind the end, the last one."""
        ends, count = np.cumsum([len(window) for window in self._windows]), self.sample.infer_frames
        first, last = np.searchsorted(ends, [clip * count, (clip + 1) * count - 1], side="right")
        return range(min(first, len(ends) - 1), min(last, len(ends) - 1) + 1)

    def _audio(self, clip: int) -> Tensor:
        """[1, layers, D, infer_frames]; past its end there are zeros."""
        windows, count = self._windows_of(clip), self.sample.infer_frames
        before = sum(len(window) for window in self._windows[: windows.start])
        heard = torch.cat([self.heard[window] for window in windows], dim=-1)[..., clip * count - before :][..., :count]
        return F.pad(heard, (0, count - heard.shape[-1]))[None]

    def _pose(self, clip: int, encode: Encode) -> Tensor:
        """Its first frame is there twice, and the latent of that alone is left out. Past its end there is black."""
        count, (height, width) = self.sample.infer_frames, self.reference.shape[1:]
        reference = self._given["reference"]
        if self.pose is None:
            return reference.new_zeros(*reference.shape[:2], count // 4, *reference.shape[3:])
        frames = torch.full((3, count + 1, height, width), -1.0)
        for at, frame in enumerate(self.pose(clip * count, count), 1):
            frames[:, at] = pose_pixels(frame, height, width)
        frames[:, 0] = frames[:, 1]
        return encode(frames[None])[:, :, 1:]


def pose_step(pose_fps: float, fps: int) -> int:
    """Every how many frames of the pose's video one is taken; where its rate is no multiple, it becomes slower."""
    return max(1, round(pose_fps / fps))


def reference_pixels(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, height, width] in [-1, 1]: its shorter side as long as that of the video, and the middle
    of it; what is missing of the longer side is black."""
    size = _shorter_side(min(height, width), *image.shape[:2])
    picture = Image.fromarray(np.asarray(image))
    if size != image.shape[:2]:
        picture = picture.resize(size[::-1], Image.BILINEAR)
    return _middle(to_pixels(np.asarray(picture)), height, width, fill=-1.0)


def pose_pixels(frame: np.ndarray, height: int, width: int) -> Tensor:
    """As `reference_pixels`, but resized as numbers, not as grey levels, and what is missing is grey."""
    pixels = to_pixels(frame)
    size = _shorter_side(min(height, width), *pixels.shape[1:])
    if size != pixels.shape[1:]:
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
    return _middle(pixels, height, width, fill=0.0)


def _shorter_side(length: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side becomes so long."""
    return (int(length * height / width), length) if width <= height else (length, int(length * width / height))


def _middle(pixels: Tensor, height: int, width: int, fill: float) -> Tensor:
    """[3, H, W] -> [3, height, width], cut off or filled up on both sides."""
    for axis, wanted in ((1, height), (2, width)):
        extra = pixels.shape[axis] - wanted
        if extra >= 0:
            pixels = pixels.narrow(axis, round(extra / 2), wanted)
        else:
            before, behind = -extra // 2, (1 - extra) // 2
            sides = (0, 0, before, behind) if axis == 1 else (before, behind)
            pixels = F.pad(pixels, sides, value=fill)
    return pixels.contiguous()
