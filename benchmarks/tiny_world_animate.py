"""Does a shape of animate-tiny go where the pose shows it? `python -m benchmarks.tiny_world --task animate-tiny`.

32 paths that training never had, of colours with shapes that were kept out of it, half of them of two clips. By turns
the prompt names the shape, or the reference alone shows it. `path_error` is how far the shape's centre is from the
path, in widths of the frame, on average over the frames of a film; a frame without a shape counts as one width. `mouth`
is the correlation of its size with how far the mouth of the face video is open.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine
from benchmarks.judge import judge, objects
from benchmarks.tiny_world import Outcome, make_request, put_report
from benchmarks.tiny_world_s2v import correlation
from tools.tiny.train_animate import SHORT, TEMPLATES, act, mouth, path, write_inputs
from tools.tiny.world import NUM_FRAMES, Clip, still_words
from wan.engine import Engine
from wan.options import Request
from wan.tasks import load_task

TASK = "animate-tiny"
COUNT, FIRST_SEED, SIDE = 32, 20_000, 64
WITHIN = 0.1  # of the width: a film whose path counts as followed
SHOWN = ("color", "shape", "background")  # words that are judged


class Case(NamedTuple):
    """centers: [T, 2] of the path, as fractions of width and height; mouths: [T]"""

    clip: Clip
    prompt: str
    centers: Tensor
    mouths: np.ndarray
    seed: int


class Result(NamedTuple):
    case: Case
    outcome: Outcome
    path_error: float
    mouth: float


def all_cases() -> list[Case]:
    pairs, found = still_words()[1], []
    for at, seed in enumerate(range(FIRST_SEED, FIRST_SEED + COUNT)):
        rng = random.Random(seed)
        clip, _, _ = act(rng, [pairs[at % len(pairs)]])
        frames = 2 * NUM_FRAMES - 1 if at // 2 % 2 else NUM_FRAMES
        words = {"color": clip.color, "shape": clip.shape, "background": clip.background}
        prompt = SHORT[0] if at % 2 else TEMPLATES[0].format(**words)
        found.append(Case(clip, prompt, path(rng, frames), mouth(rng, frames), seed))
    return found


def measure(case: Case, frames: np.ndarray, seconds: float) -> Result:
    found, (height, width) = objects(frames), frames.shape[1:3]
    wanted = case.centers.numpy() * (width, height)
    errors = [
        np.hypot(*(np.array([found[at].x, found[at].y]) - wanted[at])) / width if at in found else 1.0
        for at in range(len(frames))
    ]
    sizes = np.array([found[at].area ** 0.5 if at in found else 0.0 for at in range(len(frames))])
    outcome = Outcome(case.clip, judge(frames), seconds, frames)
    return Result(case, outcome, float(np.mean(errors)), correlation(sizes, case.mouths))


@torch.inference_mode()
def run(count: int, steps: int | None, ckpt_dir: str | None, **options: Any) -> tuple[list[Result], Request]:
    """Of the first `count` cases; and the last request. options: more of the request."""
    engine, results, spec = None, [], load_task(TASK)
    for case in all_cases()[:count]:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), case.clip, case.centers, case.mouths, SIDE, SIDE, spec)
            given = {"src_root_path": folder, **options}
            request = make_request(case.prompt, case.seed, steps, ckpt_dir, task=TASK, **given)
            engine = engine or Engine.of(request.load, spec)
            started = time.perf_counter()
            frames = engine.make(request).frames
            results.append(measure(case, frames, time.perf_counter() - started))
        one = results[-1]
        told = f"{case.clip.color} {case.clip.shape}, path error {one.path_error:.3f}, mouth {one.mouth:.2f}"
        print(f"{len(results)}/{count} {one.outcome.seconds:.1f} s {case.prompt}: {told}", file=sys.stderr)
    return results, request


def summary(results: list[Result]) -> dict[str, Any]:
    """Errors in widths of the frame; rates from 0 to 1."""
    errors = [one.path_error for one in results]
    return {
        "films": len(results),
        "path_error": round(statistics.mean(errors), 4),
        "path_error_most": round(max(errors), 4),
        "path_followed": statistics.mean(error <= WITHIN for error in errors),
        **{word: statistics.mean(one.outcome.right(word) for one in results) for word in SHOWN},
        "mouth": round(statistics.mean(one.mouth for one in results), 4),
    }


def main(args: Namespace) -> int:
    """With the options of benchmarks.tiny_world."""
    results, request = run(min(args.clips, COUNT), args.steps, args.ckpt_dir)
    parts = {"named": results[::2], "shown_alone": results[1::2]}
    parts |= {"one_clip": [one for one in results if len(one.case.mouths) == NUM_FRAMES]}
    parts |= {"two_clips": [one for one in results if len(one.case.mouths) > NUM_FRAMES]}
    report = {
        "task": TASK,
        "steps": request.sample.steps,
        "guide_scale": request.sample.guide_scale[0],
        **summary(results),
        **{name: summary(some) for name, some in parts.items() if some},
        "seconds_per_film": {"median": round(statistics.median(one.outcome.seconds for one in results), 2)},
        "device": request.load.device,
        "dtype": request.load.dtype,
        "machine": machine(),
    }
    put_report(report, [one.outcome for one in results], args, words=SHOWN)
    return 0
