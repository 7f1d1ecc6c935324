"""Does a shape of s2v-tiny pulse with the sound? `python -m benchmarks.tiny_world --task s2v-tiny`.

32 films of two clips: sounds that training never had, of tones and noise, and colours with shapes that were kept out of
it. What is judged is the mp4 as it was written: in each frame the size of the shape, the root of its area, and how loud
the file's own sound is at that time. `correlation` is that of both over a film, `lag_frames` by how much later than the
sound the picture is where both agree best, over all films together and at most in one. Where there is no shape, its
size is 0. `perfect` is what perfect films reach that have been through the VAE, of which four frames are one latent:
the shortest pulses are lost there.
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
from PIL import Image

from benchmarks.common import machine
from benchmarks.judge import judge, objects
from benchmarks.tiny_world import Outcome, make_request, put_report
from tools.tiny.fit import load_vae
from tools.tiny.sound import loudness, make_sound, write_wav
from tools.tiny.train_s2v import SIDE, TEMPLATES, radii, sample
from tools.tiny.world import Clip, picture, render_moved, still_words
from wan.audio import RATE, open_audio
from wan.conditioning.sizes import LOST_FRAMES
from wan.engine import Engine
from wan.media import Sound, write_video
from wan.options import Request
from wan.tasks import embedded_checkpoint, load_task
from wan.video import open_video
from wan.weights.locate import locate

TASK = "s2v-tiny"
COUNT, SECONDS, FIRST_SEED = 32, 2.5, 10_000  # s: all of two clips
LAGS = np.arange(-3, 3.25, 0.25)  # frames
SHOWN = ("color", "shape", "background")  # words that are judged


class Result(NamedTuple):
    """sizes: in each frame of a film, in pixels; lagging: by each of `LAGS`, how loud it is in each frame"""

    outcome: Outcome
    sizes: np.ndarray
    lagging: np.ndarray

    @property
    def correlations(self) -> np.ndarray:
        """At each of `LAGS`."""
        return np.array([correlation(self.sizes, loud) for loud in self.lagging])

    @property
    def correlation(self) -> float:
        return float(self.correlations[len(LAGS) // 2])


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where either does not change."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() > 1e-9 and other.std() > 1e-9 else 0.0


def all_cases() -> list[tuple[Clip, np.ndarray, int]]:
    """(clip, sound fp32 [S], seed)"""
    seeds = range(FIRST_SEED, FIRST_SEED + COUNT)
    makers = [random.Random(seed) for seed in seeds]
    pairs = still_words()[1]
    clips = [sample(rng, [pairs[at % len(pairs)]]) for at, rng in enumerate(makers)]
    return [(clip, make_sound(rng, SECONDS), seed) for clip, rng, seed in zip(clips, makers, seeds)]


def prompt_of(clip: Clip) -> str:
    return TEMPLATES[0].format(color=clip.color, shape=clip.shape, background=clip.background)


def measure(file: str, clip: Clip, seconds: float) -> Result:
    """What is seen and heard in a film's mp4."""
    video, sound = open_video(file), open_audio(file).read()
    frames = np.stack(list(video.frames(range(len(video)))))
    found = objects(frames)
    sizes = np.array([found[at].area ** 0.5 if at in found else 0.0 for at in range(len(frames))])
    times = np.arange(len(frames)) / video.fps
    lagging = loudness(sound, times - LAGS[:, None] / video.fps)
    return Result(Outcome(clip, judge(frames), seconds, frames), sizes, lagging)


@torch.inference_mode()
def run(count: int, steps: int | None, ckpt_dir: str | None, **options: Any) -> tuple[list[Result], Request]:
    """Of the first `count` cases; and the last request. options: more of the request."""
    engine, results = None, []
    for clip, sound, seed in all_cases()[:count]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_wav(folder / "a.wav", sound)
            Image.fromarray(picture(clip, SIDE, SIDE)).save(folder / "a.png")
            given = {"image": str(folder / "a.png"), "audio": str(folder / "a.wav"), **options}
            request = make_request(prompt_of(clip), seed, steps, ckpt_dir, task=TASK, **given)
            engine = engine or Engine.of(request.load, load_task(TASK))
            started = time.perf_counter()
            engine.make(request).save(str(folder / "a.mp4"))
            results.append(measure(str(folder / "a.mp4"), clip, time.perf_counter() - started))
        one = results[-1]
        told = f"correlation {one.correlation:.3f}, lag {LAGS[one.correlations.argmax()]:g}"
        print(f"{len(results)}/{count} {one.outcome.seconds:.1f} s {prompt_of(clip)}: {told}", file=sys.stderr)
    return results, request


@torch.inference_mode()
def perfect(count: int) -> list[Result]:
    """What the first `count` films would be without a network, but for the VAE."""
    spec, results = load_task(TASK), []
    vae = load_vae(locate(embedded_checkpoint(spec), spec), spec, torch.float32)
    fps, before = spec.sampling.fps, LOST_FRAMES + 1
    for clip, sound, _ in all_cases()[:count]:
        shown = np.arange(-1, 2 * spec.sampling.infer_frames)
        centers = torch.tensor([[clip.x, clip.y]]).expand(len(shown), 2)
        video = render_moved(clip, SIDE, SIDE, centers, radii(sound, shown, fps))
        decoded = vae.decode(vae.encode(video[None]))[0, :, before:].clamp(-1, 1)
        frames = ((decoded + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
        with tempfile.TemporaryDirectory() as folder:
            write_wav(Path(folder, "a.wav"), sound)
            write_video(Path(folder, "a.mp4"), frames, fps, {}, Sound(str(Path(folder, "a.wav")), LOST_FRAMES / fps))
            results.append(measure(str(Path(folder, "a.mp4")), clip, 0.0))
    return results


def summary(results: list[Result]) -> dict[str, Any]:
    """Correlations, lags in frames, and how often, from 0 to 1, colour and shape are those of the picture."""
    found = [one.correlation for one in results]
    together = np.mean([one.correlations for one in results], axis=0)
    lags = [float(LAGS[one.correlations.argmax()]) for one in results]
    sizes = [np.percentile(one.sizes, (5, 95)) for one in results]
    return {
        "films": len(results),
        "frames": len(results[0].sizes),
        "correlation": round(statistics.mean(found), 4),
        "correlation_least": round(min(found), 4),
        "correlation_above_0.8": sum(one >= 0.8 for one in found),
        "size_px": {"small": round(float(np.mean(sizes, 0)[0]), 1), "large": round(float(np.mean(sizes, 0)[1]), 1)},
        "lag_frames": {"all": float(LAGS[together.argmax()]), "furthest": max(lags, key=abs)},
        **{word: statistics.mean(one.outcome.right(word) for one in results) for word in SHOWN},
    }


def main(args: Namespace) -> int:
    """With the options of benchmarks.tiny_world."""
    results, request = run(min(args.clips, COUNT), args.steps, args.ckpt_dir)
    report = {
        "task": TASK,
        "steps": request.sample.steps,
        "guide_scale": request.sample.guide_scale[0],
        "samples_a_second": RATE,
        **summary(results),
        "perfect": {key: value for key, value in summary(perfect(len(results))).items() if "correlation" in key},
        "seconds_per_film": {"median": round(statistics.median(one.outcome.seconds for one in results), 2)},
        "device": request.load.device,
        "dtype": request.load.dtype,
        "machine": machine(),
    }
    put_report(report, [one.outcome for one in results], args, words=SHOWN)
    return 0
