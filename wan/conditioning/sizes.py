"""Frame counts and picture sizes. Needs no torch: a request is checked before anything heavy is imported.

Sizes are (height, width) in pixels. The arithmetic is the reference's, floor for floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wan.errors import UsageError

TEMPORAL_STRIDE = 4  # frames per latent frame, after the first, which stands alone
LOST_FRAMES = 3  # of the first clip of s2v, which comes behind a latent of one frame
_FACE_AREA = 1.3  # of what is cut out, over that of the face
MAX_COVERING = 16  # so many times the area that is seen may be scaled to cover it


def latent_frames(num_frames: int) -> int:
    """Latent frames of a video of 4n + 1 frames: n + 1."""
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
        below = max(1, (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        raise UsageError(f"the number of frames must be 4n + 1 (such as {below} or {below + 4}), got {num_frames}")
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def latent_shape(channels: int, num_frames: int, height: int, width: int, stride: int) -> tuple[int, int, int, int]:
    """[z, T', h, w] of a video; ``stride`` is the VAE's pixels per latent cell (8, or 16 for ti2v)."""
    return channels, latent_frames(num_frames), height // stride, width // stride


def i2v_size(max_area: int, img_h: int, img_w: int, *, stride: int = 8, patch: int = 2) -> tuple[int, int]:
    """The image's aspect ratio at about ``max_area`` pixels, each side floored to whole patches (i2v, flf2v)."""
    aspect = img_h / img_w
    height = int(math.sqrt(max_area * aspect) // stride // patch) * patch * stride
    width = int(math.sqrt(max_area / aspect) // stride // patch) * patch * stride
    return _checked(height, width, max_area, img_h, img_w)


def ti2v_size(max_area: int, img_h: int, img_w: int, *, multiple: int = 32) -> tuple[int, int]:
    """Of the two grids under ``max_area``, width floored first or height floored first, the truer aspect ratio."""
    ratio = img_w / img_h
    ideal_width = (max_area * ratio) ** 0.5
    ideal_height = max_area / ideal_width

    def floor(length: float) -> int:
        return int(length // multiple) * multiple

    width_first, height_first = floor(ideal_width), floor(ideal_height)
    if not width_first or not height_first:
        _checked(height_first, width_first, max_area, img_h, img_w)
    candidates = [(floor(max_area / width_first), width_first), (height_first, floor(max_area / height_first))]

    def mismatch(size: tuple[int, int]) -> float:
        its = size[1] / size[0]
        return max(ratio / its, its / ratio)

    first, second = (_checked(*size, max_area, img_h, img_w) for size in candidates)
    return first if mismatch(first) < mismatch(second) else second


def vace_size(
    area: int, max_tokens: int, num_frames: int, img_h: int, img_w: int, *, multiple: int = 16
) -> tuple[int, int, int]:
    """(height, width, frames) of a VACE run on a source video: its aspect ratio, at most `area` and its own size, and
    at most `max_tokens` tokens of multiple x multiple pixels and four frames, which shorten the video.

    Source: behaviour of the official `VaceVideoProcessor`.
    """
    cells = min(max_tokens, area / multiple**2, (img_h // multiple) * (img_w // multiple))
    if cells < 1:
        raise UsageError(f"a source of {img_w}x{img_h} is too small: each side needs {multiple} pixels")
    latents = min((num_frames - 1) // TEMPORAL_STRIDE + 1, int(max_tokens / cells))
    cells = min(cells, max_tokens // latents)
    rows = max(1, round(math.sqrt(cells * img_h / img_w)))
    columns = int(cells / rows)
    _checked(rows, columns, area, img_h, img_w)
    return rows * multiple, columns * multiple, (latents - 1) * TEMPORAL_STRIDE + 1


def s2v_size(max_area: int, img_h: int, img_w: int, *, multiple: int = 64) -> tuple[int, int]:
    """(height, width) of a speech video: the picture's, padded up to whole multiples, where that is at most `max_area`;
    else it is made smaller, in steps of a hundredth of the way to where it surely is.

    Source: behaviour of the official `WanS2V.get_size_less_than_area`.
    """
    pixels, most, least = img_h * img_w, 1.0, 0.1
    if pixels > max_area:
        b, c = (multiple - 1) * (img_h + img_w), (multiple - 1) ** 2 - max_area
        if (root := b**2 - 2 * pixels * c) < 0:
            raise UsageError(f"{max_area:,} pixels are too few for an image of {img_w}x{img_h}")
        most, least = math.sqrt(max_area / pixels), (-b + math.sqrt(root)) / (2 * pixels)
    for step in range(100):
        scale = most - (most - least) * step / 100
        height, width = (-(-int(side * scale) // multiple) * multiple for side in (img_h, img_w))
        if height * width <= max_area:
            return _checked(height, width, max_area, img_h, img_w)
    width = int((max_area * img_w / img_h) ** 0.5 // multiple * multiple)
    height = int((max_area / (img_w / img_h)) ** 0.5 // multiple * multiple)
    if width >= img_w or height >= img_h:
        height, width = img_h // multiple * multiple, img_w // multiple * multiple
    return _checked(height, width, max_area, img_h, img_w)


def frame_ids(times: Sequence[float], end: float, count: int) -> list[int]:
    """Which frames a video of `count` frames takes, evenly from the first one to the middle of the last one.

    times: when each frame begins; end: when the last one ends, in the same unit. A time between two frames is that of
    the earlier one. Begins are compared in fp32, as officially: on the border of two frames the rounding decides.
    """
    import numpy as np

    begins = np.array(times, np.float32)
    wanted = np.linspace(0, np.array([times[-1], end], np.float32).mean(), count)
    return np.maximum(np.searchsorted(begins.astype(np.float64), wanted) - 1, 0).tolist()


def padded_length(count: int, clip: int, overlap: int) -> int:
    """Frames of the clips of `clip` frames, each of which shares `overlap` with the one before, that hold `count`.

    Source: behaviour of the official `WanAnimate.get_valid_len`.
    """
    return count + -(count - overlap) % (clip - overlap)


def clip_count(count: int, clip: int, overlap: int) -> int:
    """How many these are."""
    return (padded_length(count, clip, overlap) - overlap) // (clip - overlap)


def resampled_ids(count: int, seconds: float, fps: float) -> list[int]:
    """Which of `count` frames, shown evenly for `seconds`, a video of another frame rate takes.

    Source: behaviour of the official preprocessing of `WanAnimate`: the nearest frame, half-way the even one.
    """
    rate = count / seconds
    length = max(1, int(seconds * fps + 1e-3))  # a second of 30 frames has 30, however its end was rounded
    return [min(round(at / fps * rate), count - 1) for at in range(length)]


def face_box(box: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a face (x, y, w, h) with some of what is around it: 1.3 times the area, in height
    three quarters of it above; within a picture of height x width.

    Source: behaviour of the official preprocessing of `WanAnimate`.
    """
    x, y, w, h = box
    more_w, more_h = w * (math.sqrt(_FACE_AREA) - 1) / 2, h * (math.sqrt(_FACE_AREA) - 1) / 4
    left, top = int(max(x - more_w, 0)), int(max(y - 3 * more_h, 0))
    return left, top, int(min(x + w + more_w, width)), int(min(y + h + more_h, height))


def ping_pong(index: int, count: int) -> int:
    """Frame `index` of a video of `count` frames that runs to its end, back, and so on; its ends are not doubled."""
    place = index % max(2 * (count - 1), 1)
    return min(place, 2 * (count - 1) - place)


def letterbox_size(height: int, width: int, img_h: int, img_w: int) -> tuple[int, int]:
    """The (height, width) of a picture scaled, in its aspect ratio, so that it just fits into height x width."""
    if img_h / img_w > height / width:
        return height, max(1, int(height / img_h * img_w))
    return max(1, int(width / img_w * img_h)), width


class Margins(NamedTuple):
    """Pixels of the source that are added around it."""

    left: int
    top: int
    right: int
    bottom: int


def cover_size(height: int, width: int, img_h: int, img_w: int) -> tuple[int, int]:
    """The (height, width) of a picture scaled, in its aspect ratio, so that it just covers height x width."""
    scale = max(width / img_w, height / img_h)
    covering = round(img_h * scale), round(img_w * scale)
    if math.prod(covering) > MAX_COVERING * height * width:
        raise UsageError(f"{img_w}x{img_h} is too unlike {width}x{height} in shape to cover it: crop it first")
    return covering


def _checked(height: int, width: int, max_area: int, img_h: int, img_w: int) -> tuple[int, int]:
    if height < 1 or width < 1:
        raise UsageError(f"an image of {img_w}x{img_h} has no size of at most {max_area} pixels: give a larger area")
    return height, width
