"""Do films that go on keep their colours? Tiny World, a picture and five continuations of it, i2v-tiny.

A shape moves to and fro on a still background. Of each clip: how far the mean colour of the background is from that of
the picture (grey levels, the channel that is furthest), and the PSNR of its pixels.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.common import machine, report
from tools.tiny.world import BACKGROUNDS, COLORS, SHAPES, picture, sample_starts
from wan.command import Parser, run_command
from wan.engine import Engine

TASK, SIDE, CONTINUATIONS = "i2v-tiny", 64, 5
NEAR = 60  # grey levels from the background: no part of the shape


def film(engine: Engine, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The colour of the background, and the frames of each clip."""
    color, shape, background = (list(one)[seed % len(one)] for one in (COLORS, SHAPES, BACKGROUNDS))
    starts = sample_starts(random.Random(seed), color, shape, background)
    words = f"a {color} {shape} moving {{}} on a {background} background"
    prompts = [words.format(("right", "left")[clip % 2]) for clip in range(CONTINUATIONS + 1)]
    clips: list[np.ndarray] = []
    image = picture(starts["right"], SIDE, SIDE)
    engine.generate(image=image, prompts=prompts, seed=seed, on_clip=lambda clip: clips.append(clip.frames))
    return np.array(BACKGROUNDS[background], float), clips


def drift(colour: np.ndarray, frames: np.ndarray) -> tuple[float, float]:
    """(grey levels, dB) of the last frame of a clip."""
    pixels = frames[-1].astype(float)
    still = pixels[np.abs(pixels - colour).max(-1) < NEAR]
    error = np.square(still - colour).mean()
    return float(np.abs(still.mean(0) - colour).max()), 10 * math.log10(255**2 / max(error, 1e-3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=int, default=12)
    parser.add_argument("--out", help="write the JSON here as well")
    args = parser.parse_args(argv)
    with Engine(task=TASK) as engine:
        found = []
        for seed in range(args.films):
            found.append([drift(colour, clip) for colour, clips in [film(engine, seed)] for clip in clips])
            print(f"{seed + 1}/{args.films}", file=sys.stderr)
    levels, psnr = np.array(found).mean(0).T
    rows = [
        {"clip": at, "grey_levels": round(levels[at], 2), "psnr_db": round(psnr[at], 1)} for at in range(len(levels))
    ]
    worst = round(float(np.array(found)[:, -1, 0].max()), 2)
    report({"machine": machine(), "films": args.films, "clips": rows, "worst_levels": worst}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
