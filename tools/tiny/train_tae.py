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
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
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


def pixel_loss(tae: TAE, pair: Pair) -> Tensor:
    _, _, noisy, target = pair
    state = State()
    error = tae.pixels(tae.decoder(tae.latents(noisy, state), state)) - target
    return error.abs().mean() + 2 * error.square().mean()


def latent_loss(tae: TAE, pair: Pair) -> Tensor:
    video, latent, _, _ = pair
    frames = torch.cat(list(tae.frames(video)), 1)
    return F.mse_loss(tae.encoder(frames, State()).permute(0, 4, 1, 2, 3), latent)


@torch.no_grad()
def score(tae: TAE, held: list[Pair]) -> dict[str, float]:
    """PSNR in dB of what is decoded, against what the VAE makes of the same latents, and the latents' RMS error."""
    error = sum((tae.decode(noisy) - target).square().mean().item() for _, _, noisy, target in held) / len(held)
    latent = sum(F.mse_loss(tae.encode(video), latent).item() for video, latent, _, _ in held) / len(held)
    return {"psnr_db": round(10 * math.log10(4 / error), 2), "latent_rms": round(math.sqrt(latent), 3)}


def train(out: Path, checkpoint: Path, steps: int, decoder_steps: int, seed: int = 0) -> None:
    """Writes `checkpoint`/taew2_1.safetensors, in fp16 as the released ones are: so many steps of both halves, and then
    of the decoder alone, in bf16. With `steps` 0 the decoder goes on from what is there."""
    torch.manual_seed(seed)
    rng = random.Random(seed if steps else seed + 1)
    spec, tae = load_task("t2v-tiny"), build()
    vae = WanVAE(**spec.vae)
    vae.load_state_dict(torch.load(checkpoint / spec.files.vae, weights_only=True))
    vae.eval()
    if not steps:
        tae.load_state_dict(load_file(checkpoint / FILE))
    combos = [one for one in combinations() if one not in held_out()]
    start = time.time()
    data = [pair for size, count in CLIPS.items() for pair in pairs(vae, rng, clips_of(rng, combos, count), size)]
    held = pairs(vae, rng, clips_of(rng, sorted(held_out()), 4 * BATCH), SIZES[0])
    log = (out / "train_tae.jsonl").open("w" if steps else "a")
    both = {"pixels": pixel_loss, "latents": latent_loss}
    for count, peak, losses in ((steps, 2e-3, both), (decoder_steps, 1e-3, {"pixels": pixel_loss})):
        weights = [*tae.decoder.parameters(), *(tae.encoder.parameters() if "latents" in losses else ())]
        optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=1e-4)
        totals: Counter[str] = Counter()
        for step in range(count):
            rate = peak * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / count)))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            pair = rng.choice(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=losses is not both):
                found = {name: loss(tae, pair) for name, loss in losses.items()}
            sum(found.values()).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            totals.update({name: loss.item() for name, loss in found.items()})
            if step % 100 == 99 or step == count - 1:
                row = {"step": step + 1} | {name: round(sum_ / (step % 100 + 1), 5) for name, sum_ in totals.items()}
                print(
                    json.dumps(row | score(tae, held) | {"seconds": round(time.time() - start)}), file=log, flush=True
                )
                totals.clear()
    stored = {name: weight.half().contiguous() for name, weight in tae.state_dict().items()}
    save_file(stored, checkpoint / FILE, metadata={"format": "pt"})
