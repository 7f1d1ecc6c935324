"""Trains the tiny VAE (the Wan2.1 structure at width 8): images first, then whole clips.

    WAN_INFERENCE_ONLY=0 python -m tools.tiny.train_vae --out build/tiny

Loss: L1 + squared error of the pixels, with a little noise on the latent (so that nearby latents decode alike) and a
small penalty on its size (so that the noise cannot be drowned). At the end the per-channel statistics of the latents
are folded into the two 1x1x1 convolutions around the latent, so that the official constants of the Wan2.1 VAE hold.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from tools.tiny.world import SIZES, Clip, combinations, held_out, render, sample
from wan.models.vae import WanVAE

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
    state: dict = {}
    h = [vae.encoder(part.contiguous(), state) for part in _first_and_rest(x)]
    z = vae.conv1(torch.cat(h, 1), state)[..., : vae.z_dim].float()
    state = {}
    y = [vae.decoder(part, state) for part in _first_and_rest(vae.conv2(z + 0.1 * torch.randn_like(z), state))]
    return torch.cat(y, 1).float().permute(0, 4, 1, 2, 3), z


def _first_and_rest(x: Tensor) -> list[Tensor]:
    return [x[:, :1]] + ([x[:, 1:]] if x.shape[1] > 1 else [])


def batch(rng: random.Random, combos, images: bool) -> Tensor:
    width, height = SIZES[0] if images or rng.random() < 0.7 else rng.choice(SIZES[1:])
    if images:
        return torch.stack([render(sample(rng, combos), width, height, [rng.randrange(17)]) for _ in range(16)])
    return torch.stack([render(sample(rng, combos), width, height) for _ in range(2 if width * height == 4096 else 1)])


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
    for steps, peak, images in ((image_steps, 2e-3, True), (clip_steps, 7e-4, False)):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
        for step in range(steps):
            rate = peak * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = rate
            video = batch(rng, combos, images)
            y, z = reconstruct(vae, video)
            size = z.square().mean()
            error = y - video
            loss = error.abs().mean() + error.square().mean() + 1e-3 * size
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49 or step == steps - 1:
                row = {"stage": "images" if images else "clips", "step": step + 1, "loss": round(loss.item(), 5)}
                row |= {"latent": round(size.item() ** 0.5, 3), "grad": round(norm.item(), 3)}
                row["seconds"] = round(time.time() - start)
                if step % 250 == 249 or step == steps - 1:
                    row["psnr_db"] = round(psnr(vae.eval(), test), 2)
                    vae.train()
                    torch.save(vae.state_dict(), out / ("vae_images.pth" if images else "vae_clips.pth"))
                print(json.dumps(row), file=log, flush=True)
    vae.eval()
    fold_statistics(vae, [sample(rng, combos) for _ in range(200)])
    torch.save(vae.state_dict(), out / "vae.pth")
    row = {"stage": "end", "psnr_db": round(psnr(vae, test), 2), "psnr_96_db": round(psnr(vae, test, (96, 96)), 2)}
    print(json.dumps(row | {"seconds": round(time.time() - start)}), file=log, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder for weights and log")
    parser.add_argument("--image_steps", type=int, default=1500)
    parser.add_argument("--clip_steps", type=int, default=1600)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.image_steps, args.clip_steps)
