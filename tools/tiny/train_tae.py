"""Trains Tiny World's TAE, in TAEHV's layout: from a latent to what the tiny VAE makes of it, and from a video to its
latent.

The pairs are made once: clips of all kinds, their latents with a little noise (as those that a DiT makes have), and
what the VAE decodes these to. Both halves are trained together, each with its own loss.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.tiny.world import NUM_FRAMES, SIZES, Clip, combinations, held_out, render, sample
from wan.models.tae import TAE
from wan.models.vae import WanVAE
from wan.models.vae_blocks import State
from wan.tasks import load_task

WIDTHS, ENCODER_WIDTH = (40, 32, 16, 16), 16
FILE = "taew2_1.safetensors"
BATCH, NOISE, STRIPED = 2, 0.15, 0.25
CLIPS = {size: 96 if size == SIZES[0] else 16 for size in SIZES}
Pair = tuple[Tensor, Tensor, Tensor, Tensor]  # video, its latent, that with noise, what the VAE decodes this to


def build() -> TAE:
    """Weights with variance 2 / fan-in, blocks that begin near the identity, and a grey picture."""
    tae = TAE(widths=WIDTHS, encoder_width=ENCODER_WIDTH)
    for name, weight in tae.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        if name.endswith("conv.4.weight"):
            weight.data *= 0.1
    last = list(tae.decoder.values())[-1]
    last.weight.data *= 0.1
    nn.init.constant_(last.bias, 0.5)
    return tae


@torch.no_grad()
def pairs(vae: WanVAE, rng: random.Random, clips: list[Clip], size: tuple[int, int]) -> list[Pair]:
    """Of clips of one size, by batches."""
    found = []
    for start in range(0, len(clips), BATCH):
        video = torch.stack([render(clip, *size) for clip in clips[start : start + BATCH]])
        latent = vae.encode(video)
        noisy = latent + rng.uniform(0, NOISE) * torch.randn_like(latent)
        found.append((video, latent, noisy, vae.decode(noisy)))
    return found


def clips_of(rng: random.Random, combos: list, count: int) -> list[Clip]:
    """Some with stripes, from the first frame or a later one."""
    clips = [sample(rng, combos) for _ in range(count)]
    return [replace(one, stripes_from=rng.randrange(NUM_FRAMES)) if rng.random() < STRIPED else one for one in clips]


def losses(tae: TAE, pair: Pair) -> tuple[Tensor, Tensor]:
    """Of pixels and of latents."""
    video, latent, noisy, target = pair
    state = State()
    error = tae.pixels(tae.decoder(tae.latents(noisy, state), state)) - target
    state = State()
    frames = torch.cat(list(tae.frames(video)), 1)
    encoded = tae.encoder(frames, state).permute(0, 4, 1, 2, 3)
    return error.abs().mean() + 2 * error.square().mean(), F.mse_loss(encoded, latent)


@torch.no_grad()
def score(tae: TAE, held: list[Pair]) -> dict[str, float]:
    """PSNR in dB of what is decoded, against what the VAE makes of the same latents, and the latents' RMS error."""
    error = sum((tae.decode(noisy) - target).square().mean().item() for _, _, noisy, target in held) / len(held)
    latent = sum(F.mse_loss(tae.encode(video), latent).item() for video, latent, _, _ in held) / len(held)
    return {"psnr_db": round(10 * math.log10(4 / error), 2), "latent_rms": round(math.sqrt(latent), 3)}


def train(out: Path, checkpoint: Path, steps: int, seed: int = 0) -> None:
    """Writes `checkpoint`/taew2_1.safetensors, in fp16 as the released ones are."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec, tae = load_task("t2v-tiny"), build()
    vae = WanVAE(**spec.vae)
    vae.load_state_dict(torch.load(checkpoint / spec.files.vae, weights_only=True))
    vae.eval()
    combos = [one for one in combinations() if one not in held_out()]
    start = time.time()
    data = [pair for size, count in CLIPS.items() for pair in pairs(vae, rng, clips_of(rng, combos, count), size)]
    held = pairs(vae, rng, clips_of(rng, sorted(held_out()), 4 * BATCH), SIZES[0])
    log = (out / "train_tae.jsonl").open("w")
    optimizer = torch.optim.AdamW(tae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    totals = [0.0, 0.0]
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        found = losses(tae, rng.choice(data))
        sum(found).backward()
        torch.nn.utils.clip_grad_norm_(tae.parameters(), 1.0)
        optimizer.step()
        totals = [total + loss.item() for total, loss in zip(totals, found)]
        if step % 100 == 99 or step == steps - 1:
            count = step % 100 + 1
            row = {"step": step + 1, "pixels": round(totals[0] / count, 5), "latents": round(totals[1] / count, 5)}
            totals = [0.0, 0.0]
            row |= score(tae, held) | {"seconds": round(time.time() - start)}
            print(json.dumps(row), file=log, flush=True)
    weights = {name: weight.half().contiguous() for name, weight in tae.state_dict().items()}
    save_file(weights, checkpoint / FILE, metadata={"format": "pt"})
