"""Draws docs/clips.png, frames of clips that the embedded models make: `python -m tools.clips [FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tools.tiny.world import Clip, from_start, picture
from wan import Engine

CLIPS = [
    ("red", "circle", "right", "black"),
    ("blue", "square", "up", "white"),
    ("yellow", "triangle", "left", "black"),
]
FROM_PICTURE = Clip("purple", "square", "down", "gray", radius=0.17)  # i2v-tiny is given its first frame
FRAMES = (0, 3, 6, 9, 12, 16)
SIDE_PX, CAPTION_PX, GAP_PX = 96, 16, 4


def main() -> None:
    with Engine(task="t2v-tiny") as engine:
        prompts = [Clip(*words).prompt for words in CLIPS]
        rows = [(f"t2v-tiny: {prompt}", engine.generate(prompt=prompt, seed=5).frames) for prompt in prompts]
    with Engine(task="i2v-tiny") as engine:
        clip = from_start(FROM_PICTURE, 0.4, 0.3, 0.3)
        video = engine.generate(prompt=clip.prompt, image=picture(clip, 64, 64), seed=5)
        rows.append((f"i2v-tiny, from the first frame: {clip.prompt}", video.frames))
    sheet(rows).save(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs/clips.png", optimize=True)


def sheet(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """rows: caption and uint8 [T, H, W, 3] each."""
    row_px = CAPTION_PX + SIDE_PX + GAP_PX
    made = Image.new("RGB", (len(FRAMES) * (SIDE_PX + GAP_PX) + GAP_PX, len(rows) * row_px), "white")
    draw = ImageDraw.Draw(made)
    for row, (caption, frames) in enumerate(rows):
        top = row * row_px + CAPTION_PX
        draw.text((GAP_PX, top - CAPTION_PX + 2), caption, fill="black")
        for column, index in enumerate(FRAMES):
            left = GAP_PX + column * (SIDE_PX + GAP_PX)
            draw.rectangle((left - 1, top - 1, left + SIDE_PX, top + SIDE_PX), outline="gray")
            made.paste(Image.fromarray(frames[index]).resize((SIDE_PX, SIDE_PX)), (left, top))
    return made.quantize(96)


if __name__ == "__main__":
    main()
