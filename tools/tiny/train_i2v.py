"""Trains the two experts of i2v-tiny, in the shape of Wan2.2 i2v-A14B, with the VAE and the text encoder of t2v-tiny.

The network sees the first frame as `image_condition` shows it at inference. Every first frame is there with all the
directions that are not held out, so only the prompt tells them apart. Flow matching as in train_dit.py; each expert is
trained on its side of the boundary and a little beyond it (OVERLAP), with sigma shifted as in sampling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.tiny.fit import Texts, fit, flow_errors, load_vae, noise_levels
from tools.tiny.tokenizer import sentence
from tools.tiny.train_dit import initialise
from tools.tiny.world import (
    BACKGROUNDS,
    COLORS,
    NUM_FRAMES,
    SHAPES,
    SIZES,
    Clip,
    held_out,
    picture,
    render,
    sample_starts,
)
from wan.conditioning.image import conditioning_video, frame_mask, to_pixels
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.locate import CheckpointFiles, locate

EXPERTS = ("high", "low")
BATCH = 32  # clips
OVERLAP = 0.02  # in sigma
SHORT = ("it moves {direction}", "moving {direction}")  # the picture shows the rest


@torch.no_grad()
def clips_and_latents(files: CheckpointFiles, spec, rng: random.Random, count: int) -> dict:
    """By size (clips, their latents `[n, 16, 5, h, w]`, conditions `[m, 20, 5, h, w]`, condition of each clip).

    `count` first frames of 64x64, a tenth of that at other sizes.
    """
    exact, fast = load_vae(files, spec, torch.float32), load_vae(files, spec, torch.bfloat16)
    data = {}
    for width, height in SIZES:
        clips, firsts, of_clip = [], [], []
        for index in range(count if (width, height) == SIZES[0] else count // 10):
            color, shape, background = (rng.choice(list(words)) for words in (COLORS, SHAPES, BACKGROUNDS))
            starts = sample_starts(rng, color, shape, background)
            shown = [clip for way, clip in starts.items() if (color, shape, way) not in held_out()]
            clips += shown
            firsts.append(shown[0])
            of_clip += [index] * len(shown)
        groups = [clips[i : i + 8] for i in range(0, len(clips), 8)]
        latents = [fast.encode(torch.stack([render(clip, width, height) for clip in group])) for group in groups]
        conditions = [conditions_of(exact, firsts[i : i + 8], width, height) for i in range(0, len(firsts), 8)]
        data[width, height] = clips, torch.cat(latents), torch.cat(conditions), torch.tensor(of_clip)
    return data


def conditions_of(vae: WanVAE, clips: list[Clip], width: int, height: int) -> Tensor:
    """What `image_condition` makes of each clip's first frame, as one batch."""
    frames = [to_pixels(picture(clip, width, height)) for clip in clips]
    latents = vae.encode(torch.stack([conditioning_video([frame], NUM_FRAMES) for frame in frames]))
    mask = frame_mask(NUM_FRAMES, *latents.shape[-2:])
    return torch.cat([mask.expand(len(clips), -1, -1, -1, -1), latents], 1)


def describe(clip: Clip, rng: random.Random) -> str:
    """A prompt for the clip: a tenth are empty, for guidance, and a tenth name the direction alone."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    return rng.choice(SHORT).format(direction=clip.direction) if chance < 0.2 else sentence(clip, rng)


def sigma_range(expert: str, boundary: float) -> tuple[float, float]:
    return (boundary - OVERLAP, 1.0) if expert == "high" else (0.0, boundary + OVERLAP)


def loss_of(model: WanModel, latents: Tensor, y: Tensor | None, texts: list[Tensor], shift: float, sigmas) -> Tensor:
    return flow_errors(model, latents, texts, noise_levels(len(latents), shift, *sigmas), y=y).mean()


def train(
    out: Path,
    tiny: Path,
    steps: int,
    experts: Sequence[str] = EXPERTS,
    images: int = 700,
    peak: float = 1e-3,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """`tiny` is the checkpoint folder of t2v-tiny. i2v_high.pth and i2v_low.pth, the averaged weights, and logs go to
    `out`. `resume` goes on from the last saved step of an earlier run with the same arguments, or with its latents.
    """
    spec = load_task("i2v-tiny")
    files = locate(tiny, load_task("t2v-tiny"))
    kept = out / "i2v_latents.pth"
    if not (resume and kept.is_file()):
        torch.save(clips_and_latents(files, spec, random.Random(seed), images), kept)
    data, texts = torch.load(kept, weights_only=False), Texts.of(files, spec)
    for expert in experts:
        train_expert(out, spec, expert, data, texts, steps, peak, seed + 1 + EXPERTS.index(expert), resume)


def train_expert(out: Path, spec, expert: str, data, texts: Texts, steps: int, peak: float, seed: int, resume: bool):
    """`train` for one expert on the data of `clips_and_latents`."""
    torch.manual_seed(seed)
    model, sigmas = initialise(WanModel(**spec.dit)), sigma_range(expert, spec.boundary)

    def loss(step: int, rng: random.Random) -> Tensor:
        size = SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])
        clips, latents, conditions, of_clip = data[size]
        picks = rng.sample(range(len(clips)), BATCH if size == SIZES[0] else BATCH // 2)
        context = texts([describe(clips[i], rng) for i in picks])
        return loss_of(model, latents[picks], conditions[of_clip[picks]], context, spec.sampling.shift, sigmas)

    how = {"warm_steps": 200, "cool": 0.4, "average_decay": 0.999, "log_every": 100, "save_every": 250}
    trained = dict(model.named_parameters())
    fit(f"i2v_{expert}", out, trained, loss, steps=steps, peak=peak, seed=seed, resume=resume, **how)
