"""Does Tiny World show what its prompts say? `python -m benchmarks.tiny_world` makes 64 clips and judges them.

Half of the prompts are of colour-shape-direction combinations that were kept out of training. Prompts and seeds are
fixed, everything else is the task's default. Prints JSON: the rates at which colour, shape, direction and background
are right, and the seconds a clip takes (the first one loads the models).

With `--task i2v-tiny` each clip begins from a picture, and `first_frame_psnr_db` is how well its first frame keeps it.

With `--task vace-tiny` it makes 32 clips from parts of others, see tiny_world_vace.py; with `--task s2v-tiny` 32 films
of shapes that pulse with a sound, see tiny_world_s2v.py; with `--task animate-tiny` 32 of shapes that follow a path,
see tiny_world_animate.py.

With `--lora`, `--lora_high`, `--lora_low` and `--preset`, which are those of generate.py, it judges what they make;
where there is a LoRA, `stripes` is the rate of clips with a striped background, which no prompt asks for. The
comparisons of the embedded LoRAs are made by tiny_world_lora.py.

With `--gguf-types` it compares quantised copies of the model with it, see tiny_world_gguf.py.
"""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.common import machine
from benchmarks.judge import Verdict, has_stripes, judge
from tools.tiny.world import BACKGROUNDS, Clip, combinations, held_out, picture, sample_starts
from wan.command import Parser, run_command
from wan.engine import Engine
from wan.errors import UsageError
from wan.options import Request, build_request, check_device
from wan.tasks import load_task, preset_names

TASK = "t2v-tiny"
MODULES = {"vace-tiny": "tiny_world_vace", "s2v-tiny": "tiny_world_s2v", "animate-tiny": "tiny_world_animate"}
TASKS = (TASK, "i2v-tiny", *MODULES)
CASES_PER_HALF = 32
WORDS = ("color", "shape", "direction")
LORA_FLAGS = ("lora", "lora_high", "lora_low")


class Outcome(NamedTuple):
    """One clip made: what was asked, what the judge saw, how long it took, its frames, and the picture given if any."""

    clip: Clip
    verdict: Verdict
    seconds: float
    frames: np.ndarray
    picture: np.ndarray | None = None

    @property
    def stills(self) -> np.ndarray:
        """First, middle and last frame."""
        return self.frames[[0, len(self.frames) // 2, -1]]

    def right(self, word: str) -> bool:
        return getattr(self.verdict, word) == getattr(self.clip, word)

    @property
    def held_out(self) -> bool:
        return (self.clip.color, self.clip.shape, self.clip.direction) in held_out()


def cases(task: str = TASK) -> list[tuple[Clip, int]]:
    """64 clips to ask for and the seed of each; trained and held-out combinations alternate.

    For i2v-tiny the same ones, each from a place of its own from which every direction has room.
    """
    unseen = held_out()
    halves = []
    for combos in ([one for one in combinations() if one not in unseen], sorted(unseen)):
        # Evenly over all pairs; a step prime to 3 and to the words' counts mixes backgrounds and words.
        pairs = [(combo, background) for background in BACKGROUNDS for combo in combos]
        step = next(n for n in range(len(pairs) * 5 // 13, len(pairs)) if np.gcd(n, len(pairs)) == 1)
        chosen = [pairs[index * step % len(pairs)] for index in range(CASES_PER_HALF)]
        halves.append([Clip(*combo, background) for combo, background in chosen])
    clips = [clip for pair in zip(*halves) for clip in pair]
    if task != TASK:
        clips = [
            sample_starts(random.Random(seed), clip.color, clip.shape, clip.background)[clip.direction]
            for seed, clip in enumerate(clips)
        ]
    return [(clip, seed) for seed, clip in enumerate(clips)]


def make_request(prompt: str | None, seed: int, steps: int | None, ckpt_dir: str | None, **options) -> Request:
    """A request with the task's defaults and `options`; no file is written."""
    given = {"prompt": prompt, "seed": seed, "sample_steps": steps, "ckpt_dir": ckpt_dir}
    options = {"task": TASK, **options, **given}
    nowhere = str(Path(tempfile.gettempdir()) / "unused.mp4")
    return build_request(options | {"offload_model": False, "device": check_device("auto"), "save_file": nowhere})


@torch.inference_mode()
def run(
    count: int, steps: int | None, ckpt_dir: str | None, engine: Engine | None = None, task: str = TASK, **options
) -> tuple[list[Outcome], Request]:
    """Make and judge the first `count` clips with one engine. Returns them and the last request.

    `options` are more of the request; LoRAs among them count only where no `engine` is given.
    """
    spec = load_task(task)
    width, height = map(int, spec.sampling.size.split("*"))
    outcomes = []
    for clip, seed in cases(task)[:count]:
        given = picture(clip, width, height) if spec.kind == "i2v" else None
        with _image_file(given) as image:
            request = make_request(clip.prompt, seed, steps, ckpt_dir, task=task, image=image, **options)
            engine = engine or Engine.of(request.load, spec)
            started = time.perf_counter()
            frames = engine.make(request).frames
            seconds = time.perf_counter() - started
        outcome = Outcome(clip, judge(frames), seconds, frames, given)
        outcomes.append(outcome)
        missed = "".join(f", {word} {getattr(outcome.verdict, word)}" for word in WORDS if not outcome.right(word))
        print(f"{len(outcomes)}/{count} {seconds:.1f} s {clip.prompt}{missed}", file=sys.stderr)
    return outcomes, request


@contextmanager
def _image_file(picture: np.ndarray | None) -> Iterator[str | None]:
    """The path of a PNG of the picture, None for none."""
    if picture is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "first_frame.png")
        Image.fromarray(picture).save(path)
        yield str(path)


def report(outcomes: list[Outcome], request: Request) -> dict:
    """The JSON: rates from 0 to 1, overall and by half."""
    halves = {"trained": [one for one in outcomes if not one.held_out]}
    halves["held_out"] = [one for one in outcomes if one.held_out]
    seconds = [one.seconds for one in outcomes]
    return {
        "task": request.load.task,
        "clips": len(outcomes),
        "size": f"{request.sample.width}x{request.sample.height}",
        "frames": request.sample.frame_num,
        "steps": request.sample.steps,
        "solver": request.sample.solver,
        "guide_scale": request.sample.guide_scale[0],
        **rates(outcomes),
        **({"loras": _named(request), "stripes": stripes_rate(outcomes)} if request.sample.loras else {}),
        **{name: {"clips": len(half), **rates(half)} for name, half in halves.items()},
        "seconds_per_clip": {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)},
        "device": request.load.device,
        "dtype": request.load.dtype,
        "machine": machine(),
    }


def _named(request: Request) -> dict[str, list[str]]:
    """FILE:STRENGTH of the LoRAs, by flag."""
    return {flag: [f"{Path(path).name}:{x:g}" for path, x in chosen] for flag, chosen in request.sample.loras.items()}


def rates(outcomes: list[Outcome]) -> dict[str, float]:
    """How often each word is right, from 0 to 1; for clips from a picture, how like it their first frames are."""
    if not outcomes:
        return {}
    hits = {word: [one.right(word) for one in outcomes] for word in (*WORDS, "background")}
    hits["color_shape_direction"] = [all(one.right(word) for word in WORDS) for one in outcomes]
    found = {word: round(sum(right) / len(right), 4) for word, right in hits.items()}
    if likeness := [cv2.PSNR(one.frames[0], one.picture) for one in outcomes if one.picture is not None]:
        found["first_frame_psnr_db"] = round(statistics.mean(likeness), 2)
        found["first_frame_psnr_db_least"] = round(min(likeness), 2)
    return found


def stripes_rate(outcomes: list[Outcome]) -> float:
    """How many of the clips have a striped background, from 0 to 1."""
    return round(sum(has_stripes(one.frames) for one in outcomes) / len(outcomes), 4)


def draw(
    outcomes: list[Outcome],
    columns: int = 4,
    text_px: int = 14,
    gap_px: int = 6,
    words: Sequence[str] = (*WORDS, "background"),
) -> Image.Image:
    """A contact sheet: first, middle and last frame of each clip under its words, red where the judge disagrees."""
    height, width = outcomes[0].stills.shape[1:3]
    cell_width, cell_height = max(3 * width, 330) + gap_px, height + text_px + gap_px
    rows = -(-len(outcomes) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap_px, rows * cell_height + gap_px), (225, 225, 235))
    pen = ImageDraw.Draw(sheet)
    for index, one in enumerate(outcomes):
        x, y = gap_px + index % columns * cell_width, gap_px + index // columns * cell_height
        good = all(one.right(word) for word in words)
        mark = " (held out)" if "direction" in words and one.held_out else ""
        told = one.clip.prompt.removeprefix("a ") if "direction" in words else f"{one.clip.color} {one.clip.shape}"
        pen.text((x, y), told + mark, fill="black" if good else "red")
        for place, still in enumerate(one.stills):
            sheet.paste(Image.fromarray(still), (x + place * width, y + text_px))
    return sheet


def put_report(found: dict, outcomes: list[Outcome], args: Namespace, **how) -> None:
    """Prints the JSON; writes it, and the contact sheet, where they are asked for. how: see `draw`"""
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.picture:
        draw(outcomes, **how).quantize(128).save(args.picture, format="PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.tiny_world", description=__doc__.splitlines()[0], allow_abbrev=False)
    every = 2 * CASES_PER_HALF
    parser.add_argument("--task", default=TASK, choices=TASKS, help=f"default {TASK}")
    parser.add_argument("--clips", type=int, default=every, choices=range(1, every + 1), metavar="N", help="first N")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the task's")
    parser.add_argument("--ckpt_dir", metavar="DIR", help="other weights of the same shape; default: the embedded ones")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here as well")
    parser.add_argument("--picture", metavar="FILE", help="write a contact sheet (PNG)")
    for flag in LORA_FLAGS:
        parser.add_argument(f"--{flag}", action="append", metavar="FILE[:X]", help="as in generate.py")
    parser.add_argument("--preset", choices=preset_names(), help="as in generate.py")
    parser.add_argument(
        "--gguf-types",
        metavar="TYPE,...",
        help="compare the model in these types of GGUF, or fp8, int8, mlx8, mlx4, with itself",
    )
    args = parser.parse_args(argv)
    if args.gguf_types is not None:
        from benchmarks import tiny_world_gguf

        if args.task != TASK:
            raise UsageError(f"--gguf-types is for {TASK}")
        return tiny_world_gguf.main(args)
    options = {name: getattr(args, name) for name in (*LORA_FLAGS, "preset") if getattr(args, name)}
    if args.task in MODULES:
        if options:
            raise UsageError(f"--{next(iter(options))} is not for {args.task}")
        return importlib.import_module(f"benchmarks.{MODULES[args.task]}").main(args)
    outcomes, request = run(args.clips, args.steps, args.ckpt_dir, task=args.task, **options)
    put_report(report(outcomes, request), outcomes, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
