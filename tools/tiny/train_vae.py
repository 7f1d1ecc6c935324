"""Trains the tiny VAE (the Wan2.1 structure at width 8): images first, then whole clips.

Loss: L1 + squared error of the pixels, with a little noise on the latent (so that nearby latents decode alike) and a
small penalty on its size (so that the noise cannot be drowned). At the end the per-channel statistics of the latents
are folded into the two 1x1x1 convolutions around the latent, so that the official constants of the Wan2.1 VAE hold.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from tools.tiny.world import Clip, combinations, held_out, render, sample
from wan.models.vae import WanVAE
from wan.models.vae_blocks import State

WIDTH = 8


def build() -> WanVAE:
    """A fresh model whose time axis starts as the identity, so that clips begin where images left off.

    Weights start with variance 1 / fan-in (of the taps that images use): torch's default, far below, does not train.
    """
    vae = WanVAE("2.1", dim=WIDTH)
    for name, weight in vae.named_parameters():
        if weight.ndim >= 4 and not name.endswith("gamma"):
            weight.data *= 3**0.5
        if name.endswith("time_conv.weight"):
            torch.nn.init.zeros_(weight)
            for half in weight.data[:, :, -1, 0, 0].split(weight.shape[1]):
                torch.nn.init.eye_(half)
        elif weight.ndim == 5 and weight.shape[2] == 3:
            weight.data[:, :, -1] *= 3**0.5
            weight.data[:, :, :-1] *= 0.1
    return vae


def reconstruct(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video `[B, 3, T, H, W]` -> (reconstruction from a noisy latent, latent), all frames after the first at once."""
    x = video.permute(0, 2, 3, 4, 1).contiguous()
    state = State()
    h = [vae.encoder(part.contiguous(), state) for part in _first_and_rest(x)]
    z = vae.conv1(torch.cat(h, 1), state)[..., : vae.z_dim].float()
    state = State()
    y = [vae.decoder(part, state) for part in _first_and_rest(vae.conv2(z + 0.1 * torch.randn_like(z), state))]
    return torch.cat(y, 1).float().permute(0, 4, 1, 2, 3), z


def _first_and_rest(x: Tensor) -> list[Tensor]:
    return [x[:, :1]] + ([x[:, 1:]] if x.shape[1] > 1 else [])


def images(rng: random.Random, combos) -> list[Tensor]:
    return [torch.stack([render(sample(rng, combos), 64, 64, [rng.randrange(17)]) for _ in range(16)])]


def clips(rng: random.Random, combos) -> list[Tensor]:
    """Windows of 32x32 from six clips and, in a third of the steps, two whole ones, which alone would pull all colours
    towards theirs. (Batches of one clip are avoided: torch's convolutions of them are several times slower here.)"""
    windows = []
    for _ in range(6):
        clip = sample(rng, combos)
        left, top = (min(max(int(64 * c) - 16 + rng.randint(-12, 12), 0), 32) for c in (clip.x, clip.y))
        windows.append(render(clip, 64, 64)[..., top : top + 32, left : left + 32])
    whole = [render(sample(rng, combos), 64, 64) for _ in range(2)] if rng.random() < 0.33 else []
    return [torch.stack(part) for part in (windows, whole) if part]


@torch.no_grad()
def psnr(vae: WanVAE, clips: list[Clip], size=(64, 64)) -> float:
    """Mean PSNR in dB of decoded clips (17 frames, through the streaming path)."""
    values = []
    for clip in clips:
        video = render(clip, *size)[None]
        error = (vae.decode_raw(vae.encode_raw(video)).clamp(-1, 1) - video).square().mean().item()
        values.append(10 * math.log10(4 / error))
    return sum(values) / len(values)


@torch.no_grad()
def fold_statistics(vae: WanVAE, clips: list[Clip]) -> None:
    """Rescales the latent so that its mean and deviation per channel are the official constants."""
    z = torch.cat([vae.encode_raw(render(clip, 64, 64)[None]).flatten(2) for clip in clips], -1)[0]
    mean, std = z.mean(-1), z.std(-1)
    target_mean, target_std = torch.tensor(vae.latent_mean), torch.tensor(vae.latent_std)
    gain = target_std / std
    vae.conv1.weight[: vae.z_dim] *= gain[:, None, None, None, None]
    vae.conv1.bias[: vae.z_dim] = (vae.conv1.bias[: vae.z_dim] - mean) * gain + target_mean
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ (mean - target_mean / gain)
    vae.conv2.weight /= gain[None, :, None, None, None]


def train(out: Path, image_steps: int, clip_steps: int, seed: int = 0) -> None:
    """Both stages; with `image_steps` 0 the clips begin from the images' result of an earlier run, `vae_images.pth`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = build().train()
    if not image_steps:
        vae.load_state_dict(torch.load(out / "vae_images.pth", weights_only=True))
    combos = [c for c in combinations() if c not in held_out()]
    test = [sample(random.Random(i), combinations()) for i in range(8)]
    log = (out / "train_vae.jsonl").open("w" if image_steps else "a")
    start = time.time()
    for stage, steps, peak in ((images, image_steps, 2e-3), (clips, clip_steps, 4e-4)):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
        total = 0.0
        for step in range(steps):
            rate = peak * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            parts = stage(rng, combos)
            for video in parts:
                y, z = reconstruct(vae, video)
                error = y - video
                loss = (error.abs().mean() + error.square().mean() + 1e-3 * z.square().mean()) / len(parts)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49 or step == steps - 1:
                row = {"stage": stage.__name__, "step": step + 1, "loss": round(total / (step % 50 + 1), 5)}
                row["seconds"] = round(time.time() - start)
                total = 0.0
                if step % 250 == 249 or step == steps - 1:
                    row["psnr_db"] = round(psnr(vae.eval(), test), 2)
                    vae.train()
                    torch.save(vae.state_dict(), out / f"vae_{stage.__name__}.pth")
                print(json.dumps(row), file=log, flush=True)
    vae.eval()
    fold_statistics(vae, [sample(rng, combos) for _ in range(200)])
    torch.save(vae.state_dict(), out / "vae.pth")
    row = {"stage": "end", "psnr_db": round(psnr(vae, test), 2), "psnr_96_db": round(psnr(vae, test, (96, 96)), 2)}
    print(json.dumps(row | {"seconds": round(time.time() - start)}), file=log, flush=True)
