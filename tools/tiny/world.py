"""Tiny World: one coloured shape that moves over a plain background, and the sentence that says so. What no sentence
says, and only a LoRA brings: the background may have vertical stripes.

A clip is rendered from its description alone (`Clip`), anti-aliased, so that training, the benchmark's judge and the
judge's own test share one definition of what each word means.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y downwards
BACKGROUNDS = {"black": (12, 12, 12), "gray": (128, 128, 128), "white": (243, 243, 243)}
STRIPES = {"black": "white", "gray": "white", "white": "gray"}  # the background's other tone
STRIPE_PERIOD_PX = 16  # half of it in the other tone; that of the DiT's tokens, which so all show the same
STRIPE_GAP_PX = 8  # around the shape, where the background stays plain: the small VAE blurs what touches

NUM_FRAMES = 17
SIZES = ((64, 64), (96, 64), (64, 96), (80, 80), (96, 96))  # (width, height) in pixels


@dataclass(frozen=True)
class Clip:
    """What a clip shows. `radius`, `x`, `y`, `travel` are fractions of the frame's smaller side, width, height, and of
    the side along the motion; `x` and `y` are the centre of the path. Stripes begin with frame `stripes_from`."""

    color: str
    shape: str
    direction: str
    background: str
    radius: float = 0.19
    x: float = 0.5
    y: float = 0.5
    travel: float = 0.4
    stripes_from: int | None = None

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction} on a {self.background} background"


def combinations() -> list[tuple[str, str, str]]:
    """All (color, shape, direction), in a fixed order."""
    return list(itertools.product(COLORS, SHAPES, DIRECTIONS))


def held_out() -> set[tuple[str, str, str]]:
    """A fifth of the combinations: never trained on. Each color, shape and direction keeps most of its partners."""
    colors, shapes, directions = list(COLORS), list(SHAPES), list(DIRECTIONS)
    index = itertools.product(range(len(colors)), range(len(shapes)), range(len(directions)))
    return {(colors[c], shapes[s], directions[d]) for c, s, d in index if (c + 2 * s + 3 * d) % 5 == 0}


def still_words() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All (color, shape), for clips of shapes that go nowhere by a word: those to train on, and a fifth that are held
    out."""
    pairs, unseen = list(itertools.product(COLORS, SHAPES)), held_out()
    trained = [pair for pair in pairs if (*pair, "right") not in unseen]
    return trained, [pair for pair in pairs if pair not in trained]


def sample(rng: random.Random, combos: list[tuple[str, str, str]]) -> Clip:
    """A random clip of one of the combinations, wholly inside the frame."""
    color, shape, direction = rng.choice(combos)
    radius, travel = rng.uniform(0.16, 0.22), rng.uniform(0.34, 0.46)
    room = {"along": (radius + travel / 2), "across": radius}
    horizontal = direction in ("left", "right")
    x = rng.uniform(room["along" if horizontal else "across"], 1 - room["along" if horizontal else "across"])
    y = rng.uniform(room["across" if horizontal else "along"], 1 - room["across" if horizontal else "along"])
    return Clip(color, shape, direction, rng.choice(list(BACKGROUNDS)), radius, x, y, travel)


def from_start(clip: Clip, start_x: float, start_y: float, travel: float) -> Clip:
    """The same clip with its shape first at (start_x, start_y), on a path no longer than stays wholly in the frame."""
    dx, dy = DIRECTIONS[clip.direction]
    ahead = start_x if dx < 0 else 1 - start_x if dx > 0 else start_y if dy < 0 else 1 - start_y
    travel = min(travel, ahead - clip.radius)
    return replace(clip, x=start_x + dx * travel / 2, y=start_y + dy * travel / 2, travel=travel)


def sample_starts(rng: random.Random, color: str, shape: str, background: str) -> dict[str, Clip]:
    """By direction, clips with one first frame: the shape is near the middle, so every direction has room, and where it
    is does not tell where it goes."""
    radius, travel = rng.uniform(0.15, 0.19), rng.uniform(0.26, 0.34)
    x, y = (0.5 + rng.uniform(-0.1, 0.1) for _ in range(2))
    return {
        direction: from_start(Clip(color, shape, direction, background, radius), x, y, travel)
        for direction in DIRECTIONS
    }


def render(clip: Clip, width: int, height: int, frames: range | list[int] = range(NUM_FRAMES)) -> Tensor:
    """Frames of the clip as float `[3, T, H, W]` in [-1, 1]."""
    dx, dy = DIRECTIONS[clip.direction]
    time = torch.tensor([f / (NUM_FRAMES - 1) - 0.5 for f in frames])[:, None]
    centers = torch.cat([clip.x + dx * clip.travel * time, clip.y + dy * clip.travel * time], 1)
    return _render(clip, width, height, centers, clip.radius * min(width, height), frames)


def render_moved(clip: Clip, width: int, height: int, centers: Tensor, radii: Tensor) -> Tensor:
    """The clip's shape along another path and of other sizes, as float `[3, T, H, W]` in [-1, 1].

    centers: [T, 2] (x, y), as fractions of width and height; radii: [T], or one of [] for all frames
    """
    return _render(clip, width, height, centers, radii.view(-1, 1, 1) * min(width, height), range(len(centers)))


def _render(clip: Clip, width: int, height: int, centers: Tensor, radius_px: float | Tensor, frames) -> Tensor:
    center_x, center_y = centers[:, 0, None, None] * width, centers[:, 1, None, None] * height
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    distance = _distance(clip.shape, x - center_x, y - center_y, radius_px)
    coverage = (0.5 - distance).clamp(0, 1)
    color = torch.tensor(COLORS[clip.color])[:, None, None, None] / 127.5 - 1
    background = _backdrop(clip, width, frames, distance)
    return background + (color - background) * coverage


def picture(clip: Clip, width: int, height: int) -> np.ndarray:
    """The first frame as an image file has it: uint8 [H, W, 3]."""
    return ((render(clip, width, height, [0])[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def _backdrop(clip: Clip, width: int, frames: range | list[int], distance: Tensor) -> Tensor:
    """What is behind the shape, in [-1, 1]: `[3, 1, 1, 1]`, with stripes `[3, T, H, W]`. `distance` is the shape's."""
    plain = torch.tensor(BACKGROUNDS[clip.background])[:, None, None, None] / 127.5 - 1
    if clip.stripes_from is None:
        return plain
    other = torch.tensor(BACKGROUNDS[STRIPES[clip.background]])[:, None, None, None] / 127.5 - 1
    phase = (torch.arange(width) + 0.5) % STRIPE_PERIOD_PX
    stripe = (phase - STRIPE_PERIOD_PX / 2).abs() < STRIPE_PERIOD_PX / 4
    shown = torch.tensor([f >= clip.stripes_from for f in frames])[:, None, None]
    return plain + (other - plain) * (distance - STRIPE_GAP_PX + 0.5).clamp(0, 1) * stripe * shown


def _distance(shape: str, x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """Signed distance in pixels to the outline (negative inside); all shapes have about the same area."""
    if shape == "circle":
        return (x**2 + y**2).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    inradius = 0.62 * radius  # an equilateral triangle that stands on its base
    return torch.maximum(y, x.abs() * 0.75**0.5 - 0.5 * y) - inradius
