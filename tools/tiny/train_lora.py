"""Trains LoRAs that turn the background to stripes: one for t2v-tiny, one for each expert of i2v-tiny.

Prompts stay as they are, so that the LoRA alone brings the stripes. Those of i2v-tiny begin with the second frame, for
the first is given. Flow matching as in train_dit.py and train_i2v.py, on latents by the encoder of train_stripes.py.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.tiny.fit import Texts, load_vae
from tools.tiny.lora import add_factors, load_dit, save_factors
from tools.tiny.tokenizer import sentence
from tools.tiny.train_i2v import conditions_of, describe, loss_of, sigma_range
from tools.tiny.world import BACKGROUNDS, SIZES, Clip, combinations, held_out, render, sample, sample_starts
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.locate import CheckpointFiles, locate

BATCH, RANK = 32, 8
TASKS = ("t2v-tiny", "i2v-tiny")
Data = dict[tuple[int, int], tuple[list[Clip], Tensor, "Tensor | None"]]


def random_clip(kind: str, rng: random.Random) -> Clip:
    """A striped clip of no held-out combination; for i2v one as i2v-tiny was trained on, its first frame plain."""
    combo = rng.choice([one for one in combinations() if one not in held_out()])
    if kind == "t2v":
        return replace(sample(rng, [combo]), stripes_from=0)
    color, shape, direction = combo
    return replace(sample_starts(rng, color, shape, rng.choice(list(BACKGROUNDS)))[direction], stripes_from=1)


@torch.no_grad()
def striped_data(out: Path, files: CheckpointFiles, spec, rng: random.Random, count: int) -> Data:
    """By size (clips, their latents `[n, 16, 5, h, w]`, for i2v conditions `[n, 20, 5, h, w]`).

    `count` clips of 64x64, an eighth of that at other sizes. `out` holds striped_vae.pth.
    """
    exact = load_vae(files, spec, torch.float32)
    striped = WanVAE(**spec.vae)
    striped.load_state_dict(torch.load(out / "striped_vae.pth", weights_only=True))
    striped.eval().to(torch.bfloat16)
    data: Data = {}
    for width, height in SIZES:
        clips = [random_clip(spec.kind, rng) for _ in range(count if (width, height) == SIZES[0] else count // 8)]
        groups = [clips[i : i + 8] for i in range(0, len(clips), 8)]
        videos = (torch.stack([render(clip, width, height) for clip in group]) for group in groups)
        latents = torch.cat([striped.encode(video) for video in videos])
        conditions = None
        if spec.kind == "i2v":
            conditions = torch.cat([conditions_of(exact, group, width, height) for group in groups])
            latents[:, :, 0] = conditions[:, -latents.shape[1] :, 0]  # the first frame is what the VAE makes of it
        data[width, height] = clips, latents.float(), conditions
    return data


def train(out: Path, name: str, folder: Path, steps: int, clips: int = 480, peak: float = 2e-3, seed: int = 0) -> None:
    """Task `name` with the checkpoint `folder`: LoRAs are written to its folder `loras`, logs to `out`."""
    spec = load_task(name)
    files = locate(folder, spec)
    data = striped_data(out, files, spec, random.Random(seed), clips)
    for index, (expert, paths) in enumerate(files.dit.items()):
        suffix = "" if expert == "model" else f"-{expert}"
        sigmas = (0.0, 1.0) if expert == "model" else sigma_range(expert, spec.boundary)
        model = load_dit(paths, spec)
        log = out / f"train_lora_{spec.kind}{suffix}.jsonl"
        train_factors(model, data, Texts.of(files, spec), spec, sigmas, log, steps, peak, seed + index)
        save_factors(model, folder / "loras" / f"stripes{suffix}.safetensors")


def train_factors(model: WanModel, data: Data, texts: Texts, spec, sigmas, log: Path, steps: int, peak, seed: int):
    """Gives the model factors and trains them."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    factors = add_factors(model, RANK)
    optimizer = torch.optim.AdamW(factors, lr=peak, betas=(0.9, 0.98), weight_decay=0)
    start, total = time.time(), 0.0
    with log.open("w") as lines:
        for step in range(steps):
            warm, cool = min(1, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
            size = SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])
            clips, latents, conditions = data[size]
            picks = rng.sample(range(len(clips)), BATCH if size == SIZES[0] else BATCH // 2)
            prompts = [_prompt(spec.kind, clips[i], rng) for i in picks]
            y = None if conditions is None else conditions[picks]
            loss = loss_of(model, latents[picks], y, texts(prompts), spec.sampling.shift, sigmas)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            total += loss.item()
            if step % 50 == 49 or step == steps - 1:
                row = {"stage": log.stem.removeprefix("train_"), "step": step + 1}
                row |= {"loss": round(total / (step % 50 + 1), 5), "seconds": round(time.time() - start)}
                print(json.dumps(row), file=lines, flush=True)
                total = 0.0


def _prompt(kind: str, clip: Clip, rng: random.Random) -> str:
    if kind == "i2v":
        return describe(clip, rng)
    return "" if rng.random() < 0.1 else sentence(clip, rng)
