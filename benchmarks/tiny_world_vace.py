"""Does vace-tiny make anew what the mask says, and keep the rest? `python -m benchmarks.tiny_world --task vace-tiny`.

32 cases of colour-shape-direction combinations that were kept out of training, by turns:

    inpaint    another shape's clip, with a hole around its path: the prompt's shape takes its place
    outpaint   the half of a clip in which the shape begins; it moves into the margin
    extend     the first five frames of a clip
    reference  a picture of the shape, on white, and a prompt that says only where it goes

A shape appears if, in a quarter of the frames at least, an object of its colour and outline has its centre in what is
made anew. `kept_psnr_db` compares what is kept with what was given, which the small VAE alone returns with about 32 dB
where a shape is in it.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.common import machine
from benchmarks.judge import judge, objects
from benchmarks.tiny_world import WORDS, Outcome, cases, make_request, put_report
from tools.tiny.world import COLORS, SHAPES, Clip, held_out, picture, render
from wan.engine import Engine
from wan.media import write_video
from wan.options import Request
from wan.tasks import load_task
from wan.video import open_video

TASK = "vace-tiny"
SIDE, FPS = 64, 8  # px of a clip
EDGE, GIVEN = 10, 5  # px kept beside a path; frames that are given to extend
KINDS = ("inpaint", "outpaint", "extend", "reference")
COUNT = 32
APPEARS_IN = 1 / 4  # of the frames


class Case(NamedTuple):
    """given: uint8 [T, H, W, 3], of which the result keeps what `kept` says, bool [T, H, W]"""

    clip: Clip
    prompt: str
    options: dict[str, Any]
    given: np.ndarray
    kept: np.ndarray


class Result(NamedTuple):
    """kept_psnr_db: None where nothing is kept"""

    kind: str
    outcome: Outcome
    shape_appears: bool
    kept_psnr_db: float | None


def all_cases() -> list[tuple[str, Clip, int]]:
    """(kind, clip, seed)"""
    unseen = [(clip, seed) for clip, seed in cases() if (clip.color, clip.shape, clip.direction) in held_out()]
    return [(KINDS[at % len(KINDS)], clip, seed) for at, (clip, seed) in enumerate(unseen[:COUNT])]


def make_case(kind: str, clip: Clip, folder: Path) -> Case:
    """What is given is written to files in `folder`."""
    video, still = str(folder / "a.mp4"), str(folder / "a.png")
    shown = (
        replace(clip, color=_next(COLORS, clip.color), shape=_next(SHAPES, clip.shape)) if kind == "inpaint" else clip
    )
    frames = _frames(shown)
    kept, all_of_it = np.zeros(frames.shape[:3], bool), slice(None)
    along_x = clip.direction in ("left", "right")
    if kind == "reference":
        Image.fromarray(picture(replace(clip, background="white", radius=0.3, travel=0), SIDE, SIDE)).save(still)
        prompt = f"it moves {clip.direction} on a {clip.background} background"
        return Case(clip, prompt, {"src_ref_images": [still]}, frames, kept)
    if kind == "inpaint":
        kept[:] = True
        across, along = slice(EDGE, -EDGE), slice(2, -2)
        rows, columns = (across, along) if along_x else (along, across)
        kept[:, rows, columns] = False
        Image.fromarray(~kept[0]).save(still)
        part, options = (all_of_it, all_of_it, all_of_it), {"src_video": video, "inpaint": still}
    elif kind == "outpaint":
        half = slice(0, SIDE // 2) if clip.direction in ("right", "down") else slice(SIDE // 2, SIDE)
        part = (all_of_it, all_of_it, half) if along_x else (all_of_it, half, all_of_it)
        side = ("left", "up", "right", "down").index(clip.direction)
        options = {"src_video": video, "outpaint": [SIDE // 2 * (at == side) for at in range(4)]}
    else:
        part, options = (slice(GIVEN), all_of_it, all_of_it), {"extend": video}
    if kind != "inpaint":
        kept[part] = True
    write_video(video, np.ascontiguousarray(frames[part]), FPS, {})
    stored = open_video(video)
    frames[part] = np.stack(list(stored.frames(range(len(stored)))))
    return Case(clip, clip.prompt, options, frames, kept)


def _frames(clip: Clip) -> np.ndarray:
    return ((render(clip, SIDE, SIDE) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def _next(words: Iterable[str], word: str) -> str:
    words = list(words)
    return words[(words.index(word) + 1) % len(words)]


def appears(case: Case, frames: np.ndarray) -> bool:
    """Whether the shape asked for is in what is made anew."""
    found = objects(frames).items()
    asked = (case.clip.color, case.clip.shape)
    right = [(one.color, one.shape) == asked and not case.kept[at, int(one.y), int(one.x)] for at, one in found]
    return sum(right) >= APPEARS_IN * len(frames)


def kept_psnr(case: Case, frames: np.ndarray) -> float | None:
    """In dB; None where nothing is kept."""
    if not case.kept.any():
        return None
    error = np.square(case.given[case.kept].astype(float) - frames[case.kept]).mean()
    return 10 * math.log10(255**2 / max(error, 1e-3))


@torch.inference_mode()
def run(count: int, steps: int | None, ckpt_dir: str | None) -> tuple[list[Result], Request]:
    """Of the first `count` cases; and the last request."""
    engine, results = None, []
    for kind, clip, seed in all_cases()[:count]:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(kind, clip, Path(folder))
            request = make_request(case.prompt, seed, steps, ckpt_dir, task=TASK, **case.options)
            engine = engine or Engine.of(request.load, load_task(TASK))
            started = time.perf_counter()
            frames = engine.make(request).frames
            seconds = time.perf_counter() - started
        outcome = Outcome(clip, judge(frames), seconds, frames)
        results.append(Result(kind, outcome, appears(case, frames), kept_psnr(case, frames)))
        missed = "".join(f", {word} {getattr(outcome.verdict, word)}" for word in WORDS if not outcome.right(word))
        kept = "" if results[-1].kept_psnr_db is None else f", kept {results[-1].kept_psnr_db:.1f} dB"
        print(f"{len(results)}/{count} {seconds:.1f} s {kind}: {clip.prompt}{kept}{missed}", file=sys.stderr)
    return results, request


def summary(results: list[Result]) -> dict[str, Any]:
    """Rates from 0 to 1, and dB."""
    found = {"clips": len(results), "shape_appears": _rate(one.shape_appears for one in results)}
    found |= {word: _rate(one.outcome.right(word) for one in results) for word in (*WORDS, "background")}
    if psnr := [one.kept_psnr_db for one in results if one.kept_psnr_db is not None]:
        found |= {"kept_psnr_db": round(statistics.mean(psnr), 2), "kept_psnr_db_least": round(min(psnr), 2)}
    return found


def _rate(hits: Iterable[bool]) -> float:
    return round(statistics.mean(hits), 4)


def main(args: Namespace) -> int:
    """With the options of benchmarks.tiny_world."""
    results, request = run(min(args.clips, COUNT), args.steps, args.ckpt_dir)
    kinds = {kind: [one for one in results if one.kind == kind] for kind in KINDS}
    report = {
        "task": TASK,
        "steps": request.sample.steps,
        "guide_scale": request.sample.guide_scale[0],
        **summary(results),
        **{kind: summary(some) for kind, some in kinds.items() if some},
        "seconds_per_clip": {"median": round(statistics.median(one.outcome.seconds for one in results), 2)},
        "device": request.load.device,
        "dtype": request.load.dtype,
        "machine": machine(),
    }
    put_report(report, [one.outcome for one in results], args)
    return 0
