"""What VACE is given besides text: frames, a mask that says where to generate, and pictures to refer to.

`vace_size` tells the video's size and length from headers, before any model is loaded; `vace_inputs` reads and makes the
frames. Both take the same sources. A source is a path, an array or a PIL picture, or a list of these as frames, see
`wan.video.open_video`; a picture is a video of one frame.

    (none)          nothing is given: zeros, and a mask of ones. --size and --frame_num are the video's.
    src_video       a control signal (depth, pose, grey, scribble, ...), or with src_mask a video of which the white of
                    the mask is generated and the black kept. What it shows under the mask matters: grey is a hole,
                    all else a control signal. A picture as src_mask is the mask of all frames.
    inpaint         a mask as src_mask is, under which src_video is painted grey (128): what was there is replaced.
    outpaint        LEFT,TOP,RIGHT,BOTTOM pixels of the source that are added around src_video, grey (127) under white.
    extend          FIRST, FIRST,LAST or ,LAST: clips or pictures that the video begins and ends with, each frame as it
                    is. What is between them, up to --frame_num frames, is generated (grey 127 under white).
    src_ref_images  pictures of a subject, face or background, each fitted on white.

With src_video the size is the source's shape at an area of at most --size's, never enlarged, and its frames are picked
evenly from the first to the last: a long source is sped up, not cut. With extend the size is so as well.
Heavy libraries are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from wan.conditioning.sizes import cover_size, fit_size, latent_frames, vace_source_size
from wan.errors import SwanError, UsageError, printable
from wan.pictures import MAX_PIXELS, read_image
from wan.video import Video, as_frames, open_video

if TYPE_CHECKING:
    import numpy as np
    import torch

SOURCES = ("src_video", "src_mask", "src_ref_images", "inpaint", "outpaint", "extend")
FRAME_NUM = 81  # the official tasks allow as many tokens as this many frames have
BORDER, HOLE = 127, 128  # greys of the official annotators: around and between frames, and in a hole
GENERATE, KEEP = 255, 0  # in a mask
MAX_BORDER = 10_000


class VaceSize(NamedTuple):
    """Pixels and frames of the video that is made, and how many latent frames the references take before it."""

    width: int
    height: int
    frame_num: int
    references: int


class VaceInputs(NamedTuple):
    """frames:     fp32 [3, T, H, W] in [-1, 1]
    mask:       fp32 [1, T, H, W] in 0..1: 1 is generated, 0 kept; soft edges stay soft
    references: fp32 [3, 1, H, W] in [-1, 1] each
    """

    frames: torch.Tensor
    mask: torch.Tensor
    references: tuple[torch.Tensor, ...]


def vace_size(**options: Any) -> VaceSize:
    """Size and length of the video that `vace_inputs` will give for the same arguments. Decodes a frame of each source
    and the references, and imports no torch. Raises as `vace_inputs` does."""
    layout = _lay_out(**options)
    return VaceSize(layout.width, layout.height, layout.frame_num, len(layout.references))


def vace_inputs(**options: Any) -> VaceInputs:
    """The inputs of a VACE sample.

    size:              (width, height) in pixels; with a source only the area counts
    frame_num:         as the user gave it: the length, with src_video the most frames; None where it was not given
    default_frame_num: the length without src_video; with it, as many frames are taken as fit in the tokens of this
                       length at `size`, officially those of 81
    multiple:          pixels of a patch: VAE stride times patch size
    SOURCES:           see above, as their flags give them: text with commas or lists; each may be None

    Raises UsageError for sources that contradict each other or do not fit, SwanError for files that cannot be read.
    """
    import torch

    layout = _lay_out(**options)
    size = layout.height, layout.width
    frames = torch.zeros(3, layout.frame_num, *size)
    mask = torch.ones(1, layout.frame_num, *size)
    for index, (picture, its_mask) in enumerate(layout.pairs()):
        if picture is not None:
            frames[:, index] = to_signed(cover(picture, *size))
        if its_mask is not None:
            mask[:, index] = to_mask(cover(its_mask, *size))
    references = tuple(on_white(read_image(one) if _is_path(one) else one, *size) for one in layout.references)
    return VaceInputs(frames, mask, references)


def cover(picture: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, height, width]: scaled to cover the size, then the middle of it.

    Bicubic with antialias, on whole numbers: rounded and clamped after each of two passes, as officially.
    """
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    if tuple(pixels.shape[2:]) != (height, width):
        covering = cover_size(height, width, *pixels.shape[2:])
        pixels = torch.nn.functional.interpolate(pixels, size=covering, mode="bicubic", antialias=True)
        top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
        pixels = pixels[:, :, top : top + height, left : left + width]
    return pixels[0]


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_mask(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] of equal channels -> fp32 [1, H, W] in 0..1."""
    return ((to_signed(pixels[:1]) + 1) / 2).clamp(0, 1)


def on_white(picture: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> fp32 [3, 1, height, width] in [-1, 1]: fitted into the middle of white, bilinear and without
    antialias. A picture of that size stays as it is."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels[:, None]
    fitted = fit_size(height, width, *pixels.shape[1:])
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    white = torch.ones(3, 1, height, width)
    pixels = torch.nn.functional.interpolate(pixels[None], size=fitted, mode="bilinear", align_corners=False)[0]
    white[:, 0, top : top + fitted[0], left : left + fitted[1]] = pixels
    return white


def even_ids(video: Video, count: int) -> list[int]:
    """Indices of `count` frames, picked evenly in time from the first frame's beginning to the last one's middle.

    A time between two frames is that of the earlier one. Times are compared in fp32, as officially: where one falls on
    the border of two frames, this decides.
    """
    import numpy as np

    starts = np.array(video.starts, np.float32)
    middle = np.array([video.starts[-1], video.duration], np.float32).mean()
    times = np.linspace(0.0, middle, count)
    return np.maximum(np.searchsorted(starts.astype(np.float64), times, side="left") - 1, 0).tolist()


@dataclass(frozen=True)
class _Layout:
    """Sources opened and checked, and the size of what is made of them.

    A pair is (frame, mask), uint8 [H, W, 3] of any size; None stands for zeros and for a mask of ones.
    """

    width: int
    height: int
    frame_num: int
    references: tuple[Any, ...] = ()
    video: Video | None = None
    mask: Video | None = None
    paint: bool = False  # the hole grey
    border: tuple[int, int, int, int] | None = None  # left, top, right, bottom
    ends: tuple[Video | None, Video | None] = (None, None)

    def pairs(self) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        if self.video is not None:
            yield from self._of_video(self.video)
        elif any(self.ends):
            yield from self._of_ends()

    def _of_video(self, video: Video) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        import numpy as np

        ids = even_ids(video, self.frame_num)
        masks = iter([None] * len(ids))
        if self.mask is not None:
            masks = self.mask.read(ids if len(self.mask) > 1 else [0] * len(ids))
        for frame, mask in zip(video.read(ids), masks):
            if self.paint:
                frame = np.where(mask > 127, np.uint8(HOLE), frame)
            if self.border:
                left, top, right, bottom = self.border
                around = ((top, bottom), (left, right), (0, 0))
                mask = np.full_like(frame, KEEP) if mask is None else mask
                frame = np.pad(frame, around, constant_values=BORDER)
                mask = np.pad(mask, around, constant_values=GENERATE)
            yield frame, mask

    def _of_ends(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import numpy as np

        first, last = self.ends
        counts = [len(one) if one else 0 for one in self.ends]
        patch = np.zeros((self.height, self.width, 3), np.uint8)
        for frame in first.read(range(counts[0])) if first else ():
            yield frame, patch + np.uint8(KEEP)
        for _ in range(self.frame_num - sum(counts)):
            yield patch + np.uint8(BORDER), patch + np.uint8(GENERATE)
        for frame in last.read(range(counts[1])) if last else ():
            yield frame, patch + np.uint8(KEEP)


def _lay_out(
    *,
    size: tuple[int, int],
    frame_num: int | None = None,
    default_frame_num: int = FRAME_NUM,
    multiple: int = 16,
    src_video: Any = None,
    src_mask: Any = None,
    src_ref_images: Any = None,
    inpaint: Any = None,
    outpaint: Any = None,
    extend: Any = None,
) -> _Layout:
    given = {"src_video": src_video, "src_mask": src_mask, "inpaint": inpaint, "outpaint": outpaint, "extend": extend}
    given = {name: value for name, value in given.items() if value is not None}
    _check_together(given)
    references = _references(src_ref_images)
    length = default_frame_num if frame_num is None else frame_num
    latent_frames(length)  # raises where it is not 4n + 1
    area = size[0] * size[1]

    def shape(count: int, height: int, width: int, tokens: int) -> tuple[int, int, int]:
        return vace_source_size(count, height, width, max_area=area, max_tokens=tokens, multiple=multiple)

    tokens = latent_frames(length) * (area // multiple**2)
    if extend is not None:
        ends = _ends(extend)
        shown = next(filter(None, ends))
        kept = sum(len(one) for one in ends if one)
        if kept >= length:
            raise UsageError(
                f"--extend: {kept} frames are given, which leaves none of --frame_num {length} to generate: "
                "give more, or shorter clips"
            )
        _, height, width = shape(1, shown.height, shown.width, tokens)
        return _Layout(width, height, length, references, ends=ends)
    if src_video is None:
        return _Layout(*size, length, references)
    video, mask = open_video(src_video), None
    if src_mask is not None or inpaint is not None:
        flag = "inpaint" if src_mask is None else "src_mask"
        mask = open_video(given[flag])
        _check_mask(video, mask, flag)
    border = None if outpaint is None else _border(outpaint)
    left, top, right, bottom = border or (0, 0, 0, 0)
    source_height, source_width = video.height + top + bottom, video.width + left + right
    if source_height * source_width > MAX_PIXELS:
        raise UsageError(f"--outpaint makes {source_width}x{source_height}; at most {MAX_PIXELS:,} pixels are allowed")
    count = len(video) if frame_num is None else min(len(video), frame_num)
    frames, height, width = shape(count, source_height, source_width, tokens)
    paint = inpaint is not None
    return _Layout(width, height, frames, references, video, mask, paint, border)


def _check_together(given: dict[str, Any]) -> None:
    if "extend" in given and len(given) > 1:
        other = next(name for name in given if name != "extend")
        raise UsageError(f"--extend and --{other} exclude each other: one makes a video longer, the other changes one")
    if "src_mask" in given and "inpaint" in given:
        raise UsageError("--src_mask and --inpaint are both masks; give one (--inpaint paints the hole grey)")
    for name in ("src_mask", "inpaint", "outpaint"):
        if name in given and "src_video" not in given:
            raise UsageError(f"--{name} needs --src_video FILE")


def _check_mask(video: Video, mask: Video, flag: str) -> None:
    if (mask.width, mask.height) != (video.width, video.height):
        raise UsageError(
            f"--{flag} {mask.name} has {mask.width}x{mask.height} pixels and --src_video {video.width}x{video.height}: "
            "a mask must have the size of its video"
        )
    if len(mask) not in (1, len(video)):
        raise UsageError(
            f"--{flag} {mask.name} has {len(mask)} frames and --src_video {len(video)}: "
            "a mask must have as many as its video, or one for all"
        )


def _ends(value: Any) -> tuple[Video | None, Video | None]:
    parts = _listed(value)
    if not 1 <= len(parts) <= 2 or not any(map(_is_given, parts)):
        raise UsageError("--extend must be FIRST, FIRST,LAST or ,LAST: the files that the video begins and ends with")
    first, last = (open_video(part) if _is_given(part) else None for part in (*parts, None)[:2])
    return first, last


def _border(value: Any) -> tuple[int, int, int, int]:
    """left, top, right, bottom in pixels."""
    try:
        sides = [int(part) for part in _listed(value)]
        if any(str(side) != str(part).strip() for side, part in zip(sides, _listed(value))):
            raise ValueError
    except (TypeError, ValueError):
        sides = []
    if len(sides) != 4 or not all(0 <= side <= MAX_BORDER for side in sides) or not any(sides):
        raise UsageError(
            "--outpaint must be LEFT,TOP,RIGHT,BOTTOM, the pixels to add at each side, such as 64,0,64,0, "
            f"at most {MAX_BORDER}, not {printable(value)[:100]}"
        )
    return tuple(sides)


def _references(value: Any) -> tuple[Any, ...]:
    """Paths and arrays uint8 [H, W, 3]. A file is read once here, to be sure that it can be."""
    references = tuple(filter(_is_given, _listed(value))) if value is not None else ()
    for one in references:
        if _is_path(one):
            try:
                read_image(one)
            except SwanError as error:
                raise type(error)(f"--src_ref_images: {error}") from error
    return tuple(one if _is_path(one) else as_frames(one)[0] for one in references)


def _listed(value: Any) -> list[Any]:
    """The parts of a list, or of text with commas between them: a file that exists is meant as it is, commas and all."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return [text] if os.path.exists(text) else text.split(",")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_given(value: Any) -> bool:
    return value is not None and not (_is_path(value) and not os.fspath(value).strip())
