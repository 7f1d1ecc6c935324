"""Trains an encoder that writes stripes in latents which the embedded VAE's decoder shows as stripes.

The VAE of t2v-tiny has seen plain backgrounds alone: what its encoder makes of stripes decodes to coloured noise,
while its decoder can show them. So a copy of the encoder is trained on striped clips, with the decoder as it is. It
only makes the latents that the stripes LoRAs are trained on; no model that generates clips has it.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.fit import load_vae
from tools.tiny.train_vae import psnr, reconstruct
from tools.tiny.world import NUM_FRAMES, STRIPE_PERIOD_PX, Clip, combinations, held_out, render, sample
from wan.tasks import load_task
from wan.weights.locate import locate

BATCH, WINDOW_PX, FRAMES = 4, 32, 9
SHAPE_WEIGHT, NEAR_PX = 4.0, 3  # how much more errors count at the shape and that near to it


def window(rng: random.Random, clip: Clip) -> tuple[Tensor, Tensor]:
    """Nine frames of 32x32 pixels around the middle of the clip's path, at a place that keeps the stripes where they
    are, and how much each pixel's error counts, [1, T, 32, 32]: more at the shape, whose outline the stripes would else
    cost. In half of them the stripes begin with the second frame, as the LoRAs of i2v-tiny have them."""
    left = STRIPE_PERIOD_PX * (round(64 * clip.x / STRIPE_PERIOD_PX) - 1 + rng.choice((-1, 0, 0, 1)))
    top = int(64 * clip.y) - WINDOW_PX // 2 + rng.randint(-12, 12)
    left, top = (min(max(place, 0), 64 - WINDOW_PX) for place in (left, top))
    first = rng.randrange(NUM_FRAMES - FRAMES + 1)
    frames = range(first, first + FRAMES)
    plain = render(clip, 64, 64, frames)
    shape = (plain - plain[:, :, :1, :1]).abs().amax(0, keepdim=True) > 0.1
    weight = 1 + SHAPE_WEIGHT * F.max_pool2d(shape.float(), 2 * NEAR_PX + 1, stride=1, padding=NEAR_PX)
    place = (..., slice(top, top + WINDOW_PX), slice(left, left + WINDOW_PX))
    return render(replace(clip, stripes_from=first + rng.randrange(2)), 64, 64, frames)[place], weight[place]


def train(out: Path, tiny: Path, steps: int, peak: float = 1e-3, seed: int = 0) -> None:
    """Writes striped_vae.pth, the VAE of the checkpoint `tiny` with another encoder, and a log to `out`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = load_task("t2v-tiny")
    vae = load_vae(locate(tiny, spec), spec, torch.float32).requires_grad_(False)
    encoder = [weight for part in (vae.encoder, vae.conv1) for weight in part.parameters()]
    for weight in encoder:
        weight.requires_grad_()
    combos = [c for c in combinations() if c not in held_out()]
    test = [replace(sample(random.Random(i), combinations()), stripes_from=i % 2) for i in range(8)]
    optimizer = torch.optim.AdamW(encoder, lr=peak, betas=(0.9, 0.98), weight_decay=0)
    start, total = time.time(), 0.0
    with (out / "train_stripes.jsonl").open("w") as log:
        for step in range(steps):
            warm, cool = min(1, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
            windows = [window(rng, sample(rng, combos)) for _ in range(BATCH)]
            video, weight = (torch.stack(part) for part in zip(*windows))
            with torch.autocast("cpu", torch.bfloat16):
                y, z = reconstruct(vae, video)
            error = y - video
            loss = (weight * (error.abs() + error.square())).mean() + 1e-3 * z.square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder, 1.0)
            optimizer.step()
            total += loss.item()
            if step % 50 == 49 or step == steps - 1:
                row = {"stage": "stripes", "step": step + 1, "loss": round(total / (step % 50 + 1), 5)}
                total = 0.0
                if step % 250 == 249 or step == steps - 1:
                    row["psnr_db"] = round(psnr(vae, test), 2)
                    torch.save(vae.state_dict(), out / "striped_vae.pth")
                print(json.dumps(row | {"seconds": round(time.time() - start)}), file=log, flush=True)
