"""What VACE is given: source video, mask and references, as they are read, thinned out, resized, or made from plainer
inputs. Pixels only; what the VAE makes of them is in `vace.py`.

Source: behaviour of the official Wan2.1 `WanVace.prepare_source` and of its annotators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan.conditioning.sizes import Margins, cover_size, frame_ids
from wan.video import VideoFile

GREY = 128  # of what is to be made anew, in a source video that says nothing there


def blank(num_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frames and mask of a video that is all made anew."""
    return torch.zeros(3, num_frames, height, width), torch.ones(1, num_frames, height, width)


def read_frames(video: VideoFile, ids: Sequence[int], height: int, width: int) -> Tensor:
    """uint8 [T, 3, height, width]: frames of a video, resized to cover that size, the middle of each."""
    return stacked((cover(frame, height, width) for frame in video.frames(ids)), len(ids), height, width)


def stacked(frames: Iterable[Tensor], count: int, height: int, width: int) -> Tensor:
    """uint8 [count, 3, height, width], filled one by one."""
    out = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for at, frame in enumerate(frames):
        out[at] = frame
    return out


def cover(frame: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, height, width]: bicubic on whole grey levels, rounded after each of its two passes."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
    size = cover_size(height, width, *frame.shape[:2])
    if size != frame.shape[:2]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[0, :, top : top + height, left : left + width]


def as_frames(pixels: Tensor) -> Tensor:
    """uint8 [T, 3, H, W] -> fp32 [3, T, H, W] in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1).transpose(0, 1)


def as_mask(pixels: Tensor) -> Tensor:
    """uint8 [T, 3, H, W] of a mask, white where the video is made anew -> [1, T, H, W] in 0..1; soft edges stay."""
    return as_frames(pixels[:, :1]).add(1).div(2).clamp(0, 1)


def reference(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] -> [3, 1, height, width] in [-1, 1]: as large as it fits, in the middle of a white picture."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    if pixels.shape[1:] != (height, width):
        scale = min(height / pixels.shape[1], width / pixels.shape[2])
        size = max(1, int(pixels.shape[1] * scale)), max(1, int(pixels.shape[2] * scale))
        small = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        pixels = torch.ones(3, height, width)
        pixels[:, top : top + size[0], left : left + size[1]] = small
    return pixels[:, None]


def source(video: VideoFile, mask: VideoFile | None, num_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frames and mask of a source video. Without a mask all is made anew, after what the video shows (a control)."""
    ids = frame_ids(video.times, video.end, num_frames)
    frames = as_frames(read_frames(video, ids, height, width))
    if mask is None:
        return frames, torch.ones(1, num_frames, height, width)
    seen = [0] * num_frames if len(mask) == 1 else ids  # a picture is the mask of each frame
    return frames, as_mask(read_frames(mask, seen, height, width))


def inpainted(video: VideoFile, mask: VideoFile, num_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """As `source`, with grey where the mask is white, so that nothing there is taken as a control."""
    frames, where = source(video, mask, num_frames, height, width)
    return torch.where(where > 0.5, torch.full((), GREY / 127.5 - 1), frames), where


def outpainted(video: VideoFile, margins: Margins, num_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A video with grey margins around it, which are made anew; height and width are those of the result."""
    pixels_h, pixels_w = video.height + margins.top + margins.bottom, video.width + margins.left + margins.right
    top, left = round(margins.top * height / pixels_h), round(margins.left * width / pixels_w)
    inner_h, inner_w = round(video.height * height / pixels_h), round(video.width * width / pixels_w)
    inner_h, inner_w = min(inner_h, height - top), min(inner_w, width - left)
    ids = frame_ids(video.times, video.end, num_frames)
    pixels = torch.full((num_frames, 3, height, width), GREY, dtype=torch.uint8)
    pixels[:, :, top : top + inner_h, left : left + inner_w] = read_frames(video, ids, inner_h, inner_w)
    mask = torch.ones(1, num_frames, height, width)
    mask[:, :, top : top + inner_h, left : left + inner_w] = 0
    return as_frames(pixels), mask


def extended(
    first: VideoFile | None, last: VideoFile | None, num_frames: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """A video that begins with all frames of `first` and ends with all of `last`, and is made anew between them."""
    pixels = torch.full((num_frames, 3, height, width), GREY, dtype=torch.uint8)
    mask = torch.ones(1, num_frames, height, width)
    for clip, at in ((first, 0), (last, num_frames - len(last or ()))):
        if clip is not None:
            pixels[at : at + len(clip)] = read_frames(clip, range(len(clip)), height, width)
            mask[:, at : at + len(clip)] = 0
    return as_frames(pixels), mask


def begun(given: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """A video that begins with frames [3, n, H, W] in [-1, 1] and is made anew behind them."""
    count, (height, width) = given.shape[1], given.shape[2:]
    grey = torch.full((3, num_frames - count, height, width), GREY / 127.5 - 1)
    mask = torch.ones(1, num_frames, height, width)
    mask[:, :count] = 0
    return torch.cat([given, grey], dim=1), mask
