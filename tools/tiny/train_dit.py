"""Trains the tiny DiT together with its UMT5 text encoder on latents of Tiny World clips.

    WAN_INFERENCE_ONLY=0 python -m tools.tiny.train_dit --out build/tiny      (after train_vae)

Flow matching as Wan is trained (arXiv 2210.02747): x_t = (1 - sigma) x_0 + sigma noise, the network predicts
noise - x_0 at t = 1000 sigma; sigma is uniform, then shifted by 3 towards noise. A tenth of the prompts is empty, for
classifier-free guidance. What is kept is an average of the weights over the run's end (decay 0.999).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tools.tiny.tokenizer import VOCAB_SIZE, sentence, train_tokenizer
from tools.tiny.world import SIZES, Clip, combinations, held_out, render, sample
from wan.models.dit import WanModel
from wan.models.text import load_tokenizer
from wan.models.vae import WanVAE
from wan.tasks import load_task

BATCH, TIMES = 64, 16  # clips in a batch; distinct timesteps in it
SHIFT = 3.0


def build(spec) -> nn.ModuleDict:
    """Fresh DiT and text encoder of the task's shapes."""
    text = spec.text
    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=text.dim,
        d_kv=text.dim_attn // text.num_heads,
        d_ff=text.dim_ffn,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        relative_attention_num_buckets=text.num_buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    dit = WanModel(**spec.dit)
    for name, weight in dit.named_parameters():
        if name.startswith("head.head"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
        elif weight.ndim == 5:
            nn.init.xavier_uniform_(weight.data.flatten(1))
        elif name.endswith(".bias"):
            nn.init.zeros_(weight)
    return nn.ModuleDict({"dit": dit, "t5": UMT5EncoderModel(config)})


@torch.no_grad()
def encode_clips(
    vae: WanVAE, rng: random.Random, combos, count: int, size: tuple[int, int]
) -> tuple[Tensor, list[Clip]]:
    """Latents `[count, 16, 5, h, w]` of random clips, and the clips."""
    clips = [sample(rng, combos) for _ in range(count)]
    latents = [vae.encode(torch.stack([render(c, *size) for c in clips[i : i + 8]])) for i in range(0, count, 8)]
    return torch.cat(latents), clips


def encode_texts(t5: nn.Module, tokenizer, texts: list[str], text_len: int) -> list[Tensor]:
    ids, mask = tokenizer(texts, text_len)
    lengths = [sum(row) for row in mask]
    longest = max(lengths)
    out = t5(input_ids=torch.tensor(ids)[:, :longest], attention_mask=torch.tensor(mask)[:, :longest]).last_hidden_state
    return [row[:length] for row, length in zip(out, lengths, strict=True)]


def loss_of(model: nn.ModuleDict, tokenizer, latents: Tensor, texts: list[str], text_len: int) -> Tensor:
    u = (torch.arange(TIMES) + torch.rand(TIMES)) / TIMES  # stratified
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    sigma = sigma.repeat_interleave(len(latents) // TIMES)  # neighbours share a timestep, which is then embedded once
    noise = torch.randn_like(latents)
    mix = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        context = encode_texts(model["t5"], tokenizer, texts, text_len)
        velocity = model["dit"]((1 - mix) * latents + mix * noise, sigma * 1000, context)
    return (velocity - (noise - latents)).square().mean()


def train(out: Path, steps: int, clips: int, peak: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = load_task("t2v-tiny")
    vae = WanVAE(**spec.vae)
    vae.load_state_dict(torch.load(out / "vae.pth", weights_only=True))
    vae.eval()
    combos = [c for c in combinations() if c not in held_out()]
    start = time.time()
    data = {}
    for i, size in enumerate(SIZES):
        data[size] = encode_clips(vae, rng, combos, clips if i == 0 else clips // 8, size)
    log = (out / "train_dit.jsonl").open("w")
    print(json.dumps({"stage": "latents", "seconds": round(time.time() - start)}), file=log, flush=True)

    train_tokenizer(out / "google" / "umt5-xxl")
    tokenizer = load_tokenizer(out / "google" / "umt5-xxl")
    model = build(spec)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, total = time.time(), 0.0
    for step in range(steps):
        warm, cool = min(1, (step + 1) / 200), min(1, (steps - step) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
        size = SIZES[0] if rng.random() < 0.85 else rng.choice(SIZES[1:])
        latents, described = data[size]
        picks = rng.sample(range(len(latents)), BATCH if size == SIZES[0] else BATCH // 2)
        texts = ["" if rng.random() < 0.1 else sentence(described[i], rng) for i in picks]
        loss = loss_of(model, tokenizer, latents[picks], texts, spec.dit.text_len)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += loss.item()
        if step % 100 == 99 or step == steps - 1:
            row = {"stage": "dit", "step": step + 1, "loss": round(total / (step % 100 + 1), 5)}
            row |= {"grad": round(norm.item(), 3), "seconds": round(time.time() - start)}
            print(json.dumps(row), file=log, flush=True)
            total = 0.0
        if step % 500 == 499 or step == steps - 1:
            torch.save({name: average[name].state_dict() for name in average}, out / "dit.pth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/tiny"), help="folder with vae.pth; weights and log go here"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--clips", type=int, default=4000, help="clips of 64x64; an eighth of that at the other sizes")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    train(args.out, args.steps, args.clips, args.peak)
