"""Smaller videos than the one asked for, as flags that this request may have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from easydict import EasyDict

from wan.conditioning.sizes import i2v_size
from wan.errors import UsageError
from wan.options import Request
from wan.tasks import grid_px
from wan.tasks.kinds import kind_of

_SMALL = "416*240"  # a quarter of the smallest official area, below which little can be seen


@dataclass(frozen=True)
class Size:
    """flag: of --size; width, height: of the video, px, which has the aspect ratio of its image if there is one."""

    flag: str
    width: int
    height: int


def smaller_sizes(request: Request, spec: EasyDict) -> Iterator[Size]:
    """Official sizes of the task below the one asked for, the largest first, then one of a quarter of the smallest."""
    sample = request.sample
    if not kind_of(spec).asks_size:
        return
    is_tall = sample.height > sample.width
    official = [_sides(one) for one in spec.sampling.sizes]
    areas = {width * height: (width, height) for width, height in official if (height > width) == is_tall}
    small = _sides(_SMALL)[::-1] if is_tall else _sides(_SMALL)
    for width, height in [*(areas[area] for area in sorted(areas, reverse=True)), small]:
        if any(side % grid_px(spec) for side in (width, height)):
            width, height = (side // grid_px(spec) * grid_px(spec) for side in (width, height))
        found = _with_image(request, spec, width, height)
        if found is not None and found.width * found.height < sample.width * sample.height:
            yield found


def smaller_frames(request: Request) -> list[int]:
    """About half of the frames and a quarter, 4n+1 each; none where --frame_num does not say how many there are."""
    sample = request.sample
    if sample.infer_frames is not None:
        return []
    counts = dict.fromkeys((sample.frame_num - 1) // part // 4 * 4 + 1 for part in (2, 4))
    return [count for count in counts if max(4, sample.trim_first_frames) < count < sample.frame_num]


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("*")
    return int(width), int(height)


def _with_image(request: Request, spec: EasyDict, width: int, height: int) -> Size | None:
    flag, sample = f"{width}*{height}", request.sample
    if sample.size == f"{sample.width}*{sample.height}":  # what it is made from does not say otherwise
        return Size(flag, width, height)
    stride = spec.vae_stride[1]
    try:  # near enough for ti2v, which rounds by a rule of its own
        sides = i2v_size(width * height, sample.height, sample.width, stride=stride, patch=grid_px(spec) // stride)
    except UsageError:
        return None
    return Size(flag, sides[1], sides[0])
