"""What a Tiny World clip shows, by plain image analysis: nothing here is learned, and the prompt is not seen.

A frame is split into background (the colour of its border) and one object (what differs from it). Colours are the
nearest words of the palette, the shape is the one whose ideal outline of the same area and place overlaps the object
best, the direction is the straight line through the object's centres. Words are decided by a majority of the frames.
A background with stripes, which no word asks for, is known by its rows, see `has_stripes`.
Shape legend: T frames, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np

from tools.tiny.world import BACKGROUNDS, COLORS, SHAPES, STRIPE_PERIOD_PX

BORDER_PX = 2
MAX_COLOR_ERROR = 80.0  # RGB distance (0..441) beyond which a colour has no word
MIN_CONTRAST = 45.0  # RGB distance from the background at which a pixel may belong to the object
MIN_AREA, MAX_AREA = 0.01, 0.6  # of the frame
MIN_OVERLAP = 0.8  # intersection over union with the ideal outline
MIN_TRAVEL = 0.1  # of the side along the motion
MIN_STRAIGHTNESS = 2.0  # travel along the axis over travel across it
MIN_SWING = 90.0  # RGB distance from the darkest to the lightest of the wave that stripes are
MIN_REGULARITY = 0.5  # share of that wave in how the pixels of a row differ
MIN_STRIPED_ROWS = 1 / 3  # where it is so; around the object there are none


class Verdict(NamedTuple):
    """The words a clip deserves; None where nothing is found or no word fits."""

    color: str | None
    shape: str | None
    direction: str | None
    background: str | None


class Object(NamedTuple):
    """x, y: of its centre, in pixels; area: in pixels"""

    color: str | None
    shape: str | None
    x: float
    y: float
    area: float


def judge(frames: np.ndarray, min_overlap: float = MIN_OVERLAP) -> Verdict:
    """The words for a clip, uint8 [T, H, W, 3] RGB. A shape must overlap its ideal outline by `min_overlap`."""
    found = objects(frames, min_overlap)
    return Verdict(
        color=_majority([one.color for one in found.values()], len(frames)),
        shape=_majority([one.shape for one in found.values()], len(frames)),
        direction=_direction(found, *frames.shape[:3]),
        background=_nearest(_background(frames.astype(np.float32)), BACKGROUNDS),
    )


def objects(frames: np.ndarray, min_overlap: float = MIN_OVERLAP) -> dict[int, Object]:
    """The object of each frame of a clip that has one, with its place in pixels."""
    pixels = frames.astype(np.float32)
    background = _background(pixels)
    rows = _striped_rows(pixels)
    stripe = _stripe(pixels[rows], background) if _is_striped(rows) else background
    found = ((time, _find_object(frame, background, stripe, min_overlap)) for time, frame in enumerate(pixels))
    return {time: one for time, one in found if one}


def _background(pixels: np.ndarray) -> np.ndarray:
    edge = np.ones(pixels.shape[1:3], bool)
    edge[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    return np.median(pixels[:, edge].reshape(-1, 3), axis=0)


def has_stripes(frames: np.ndarray) -> bool:
    """Whether the background of a clip, uint8 [T, H, W, 3] RGB, has the vertical stripes of Tiny World.

    The first frame does not count: where it was given, it is as it was given.
    """
    return _is_striped(_striped_rows(frames.astype(np.float32)))


def _striped_rows(pixels: np.ndarray) -> np.ndarray:
    """Which rows of pixels [..., W, 3] are a wave of the stripes' width; bool [...]."""
    width = pixels.shape[-2]
    waves = np.abs(np.fft.rfft(pixels - pixels.mean(-2, keepdims=True), axis=-2)) ** 2
    wave, every = waves[..., width // STRIPE_PERIOD_PX, :].sum(-1), waves.sum((-2, -1))
    return (4 * np.sqrt(wave) / width >= MIN_SWING) & (wave >= MIN_REGULARITY * every)


def _is_striped(rows: np.ndarray) -> bool:
    """By the striped rows [T, H]."""
    return len(rows) > 1 and bool(rows[1:].mean() >= MIN_STRIPED_ROWS)


def _stripe(rows: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The other tone of striped rows [N, W, 3]: that of the quarter of the columns least like the background."""
    columns = np.median(rows, axis=0)
    unlike = np.argsort(np.linalg.norm(columns - background, axis=1))
    return np.median(columns[unlike[-len(columns) // 4 :]], axis=0)


def _find_object(frame: np.ndarray, background: np.ndarray, stripe: np.ndarray, min_overlap: float) -> Object | None:
    """The largest thing in a frame, float32 [H, W, 3], that is neither background nor stripe nor a mixture of them.

    `stripe` is `background` where there is none.
    """
    apart = stripe - background
    share = np.clip((frame - background) @ apart / max(apart @ apart, 1), 0, 1)
    contrast = np.linalg.norm(frame - background - share[..., None] * apart, axis=-1)
    count, labels, stats, _ = cv2.connectedComponentsWithStats((contrast > MIN_CONTRAST).astype(np.uint8))
    if count < 2:
        return None
    label = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if not MIN_AREA * labels.size <= stats[label, cv2.CC_STAT_AREA] <= MAX_AREA * labels.size:
        return None
    region = (labels == label).astype(np.uint8)
    depth = cv2.distanceTransform(region, cv2.DIST_L2, 3)
    color = np.median(frame[depth >= 0.5 * depth.max()], axis=0)  # of the core: edges are mixed with the background
    # How far each pixel is on the way from the background to that colour: soft edges keep their true place.
    way = color - background
    coverage = np.clip((frame - background) @ way / (way @ way), 0, 1) * cv2.dilate(region, np.ones((3, 3), np.uint8))
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
    area = coverage.sum()
    center_x, center_y = float((coverage * x).sum() / area), float((coverage * y).sum() / area)
    shape = _shape(coverage, x - center_x, y - center_y, min_overlap)
    return Object(_nearest(color, COLORS), shape, center_x, center_y, float(area))


def _shape(coverage: np.ndarray, x: np.ndarray, y: np.ndarray, min_overlap: float) -> str | None:
    """The shape whose outline fits best; `x` and `y` are pixels from the object's centre."""
    root = np.sqrt(coverage.sum())
    distances = {  # to the outline of each shape of this area, negative inside
        "circle": np.hypot(x, y) - root / np.sqrt(np.pi),
        "square": np.maximum(abs(x), abs(y)) - root / 2,
        "triangle": np.maximum(y, abs(x) * np.sqrt(0.75) - y / 2) - root / 27**0.25,  # equilateral, on its base
    }
    overlaps = {}
    for name in SHAPES:
        ideal = np.clip(0.5 - distances[name], 0, 1)
        overlaps[name] = np.minimum(ideal, coverage).sum() / np.maximum(ideal, coverage).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= min_overlap else None


def _direction(objects: Mapping[int, Object], num_frames: int, height: int, width: int) -> str | None:
    """Sign and axis of the displacement over the clip, by a straight line through the centres."""
    if len(objects) < 2 or 2 * len(objects) <= num_frames:
        return None
    slopes = (np.polyfit(list(objects), [getattr(one, axis) for one in objects.values()], 1)[0] for axis in "xy")
    dx, dy = (slope * (num_frames - 1) for slope in slopes)
    if abs(dx) >= max(MIN_TRAVEL * width, MIN_STRAIGHTNESS * abs(dy)):
        return "right" if dx > 0 else "left"
    if abs(dy) >= max(MIN_TRAVEL * height, MIN_STRAIGHTNESS * abs(dx)):
        return "down" if dy > 0 else "up"
    return None


def _nearest(color: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str | None:
    errors = {word: float(np.linalg.norm(color - np.array(rgb))) for word, rgb in palette.items()}
    word = min(errors, key=errors.__getitem__)
    return word if errors[word] <= MAX_COLOR_ERROR else None


def _majority(words: list[str | None], num_frames: int) -> str | None:
    """The word of more than half of all frames."""
    if not words:
        return None
    word, votes = Counter(words).most_common(1)[0]
    return word if 2 * votes > num_frames else None
