"""Conditioning of Animate: a character from a picture moves as a pose video and a face video say, clip by clip.

The network gets y = 4 mask channels + 16 latent channels: in front, in a latent frame of its own, the reference, then
what is given of the clip, its first frames (from the clip before) or, where a character is replaced, the background.

Source: behaviour of the official Wan2.2 `WanAnimate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan.cache import StepContext
from wan.conditioning.condition import Condition, Encode
from wan.conditioning.film import Film
from wan.conditioning.image import fold_frames
from wan.conditioning.letterbox import letterbox, resized
from wan.conditioning.sizes import clip_count, ping_pong
from wan.models.dit.adapters.animate import Face
from wan.video import VideoFile


@dataclass(frozen=True)
class AnimateCondition(Condition):
    """y: [1, 4 + z, 1 + T', h, w] mask and latent channels that follow the noisy ones into the network
    pose: [1, z, T', h, w]
    face, no_face: what the cond and the uncond branch see of it
    clip_fea: [1, 257, 1280] what CLIP makes of the reference"""

    y: Tensor
    pose: Tensor
    face: Face
    no_face: Face
    clip_images: tuple[Tensor, ...] = ()
    clip_fea: Tensor | None = None
    extra_frames: int = 1

    def inputs(self, ctx: StepContext) -> dict[str, Any]:
        face = self.face if ctx.branch == "cond" else self.no_face
        return {"y": self.y, "clip_fea": self.clip_fea, "pose_latents": self.pose, "face_pixel_values": face}


@dataclass(frozen=True)
class AnimateInputs:
    """What a film is made from; each video has its own number of frames.

    reference: uint8 [H, W, 3], any size; pose: a video of the film's size; face: a square one
    background, mask: of the pose's size, where a character is replaced; the mask is white where it is
    """

    reference: np.ndarray
    pose: VideoFile
    face: VideoFile
    background: VideoFile | None = None
    mask: VideoFile | None = None


class AnimateFilm(Film):
    """Clips of `frame_num` frames, each of which begins with the last `overlap` of the one before.

    state: "overlap" [3, overlap, H, W] in [-1, 1], fp32: the last frames of the film so far
    """

    def __init__(self, sample: Any, inputs: AnimateInputs, overlap: int, face_px: int = 512, clip: bool = True):
        """face_px: side of the face as the network sees it; clip: whether the reference is shown to CLIP"""
        self.inputs, self.overlap, self.face_px, self.has_clip = inputs, overlap, face_px, clip
        self.length, self.stride = sample.frame_num, sample.frame_num - overlap
        clips = clip_count(len(inputs.pose), self.length, overlap)
        super().__init__(sample, lambda encode: self.condition(0, encode), clips)

    def condition(self, clip: int, encode: Encode) -> AnimateCondition:
        inputs, size = self.inputs, (self.sample.height, self.sample.width)
        known = self.state["overlap"] if clip else None
        reference = to_pixels(letterbox(inputs.reference, *size)[None])
        pose = encode(to_pixels(self._read(inputs.pose, clip, size))[None])
        if inputs.background is None:
            video, given = torch.zeros(3, self.length, *size), None
        else:
            video = to_pixels(self._read(inputs.background, clip, size))
            given = outside(self._read(inputs.mask, clip, size), *pose.shape[-2:])
        y = torch.cat([reference_y(encode, reference), video_y(encode, video, given, known)], dim=2)
        face = to_pixels(self._read(inputs.face, clip, (self.face_px, self.face_px)))[None]
        none = torch.full_like(face[:, :, :1], -1)
        return AnimateCondition(y, pose, Face(face), Face(none, self.length), (reference,) if self.has_clip else ())

    def _read(self, video: VideoFile, clip: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 [T, H, W, 3]: the frames that a clip has of a video, which runs to its end, back, and so on."""
        start = clip * self.stride
        wanted = np.array([ping_pong(index, len(video)) for index in range(start, start + self.length)])
        ids = sorted(set(wanted.tolist()))  # each is decoded once
        frames = np.empty((self.length, *size, 3), np.uint8)
        for at, frame in zip(ids, video.frames(ids), strict=True):
            frames[wanted == at] = resized(frame, *size)
        return frames

    def noise(self, clip: int, shape: tuple[int, ...]) -> Tensor:
        """The draw of one generator that this clip has: those before are drawn as well, so that a run can go on at any
        clip."""
        generator = torch.Generator().manual_seed(self.sample.seed)
        for _ in range(clip):
            torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def frames(self, clip: int, video: Tensor) -> Tensor:
        kept = video[:, self.overlap :] if clip else video
        self.state["overlap"] = kept[:, -self.overlap :].float().clamp(-1, 1).cpu()
        first = clip * self.stride + (self.overlap if clip else 0)  # of the film
        end = len(self.inputs.pose) - first
        return kept[:, max(self.sample.trim_first_frames - first, 0) : end]


def reference_y(encode: Encode, pixels: Tensor) -> Tensor:
    """[1, 4 + z, 1, h, w] of a reference [3, 1, H, W], all of which is given."""
    latent = encode(pixels[None])
    return torch.cat([torch.ones_like(latent[:, :4]), latent], dim=1)


def video_y(encode: Encode, video: Tensor, given: Tensor | None, known: Tensor | None) -> Tensor:
    """[1, 4 + z, T', h, w] of a clip.

    video: [3, T, H, W] in [-1, 1], whose first frames become those of `known` [3, n, H, W]
    given: [T, h, w] in 0..1: what of the video stays; None: nothing but `known`
    """
    count = 0 if known is None else known.shape[1]
    if known is not None:
        video[:, :count] = known
    latent = encode(video[None])
    mask = clip_mask(video.shape[1], *latent.shape[-2:], known=count, given=given)
    return torch.cat([mask.to(latent)[None], latent], dim=1)


def clip_mask(frames: int, height: int, width: int, *, known: int, given: Tensor | None = None) -> Tensor:
    """[4, T', height, width]: 1 in the first `known` frames, else what is given [T, height, width], or 0."""
    mask = torch.zeros(frames, height, width) if given is None else given.clone()
    mask[:known] = 1
    return fold_frames(mask)


def outside(mask: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [T, H, W, 3] of a mask -> [T, height, width] in 0..1, of the nearest pixels: 1 where it is black."""
    nearest = F.interpolate(torch.from_numpy(mask[..., 0])[:, None], size=(height, width), mode="nearest")
    return 1 - nearest[:, 0].float() / 255


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)
