"""Trains the tiny DiT together with its UMT5 text encoder on latents of Tiny World clips.

Flow matching as Wan is trained (arXiv 2210.02747): x_t = (1 - sigma) x_0 + sigma noise, the network predicts
noise - x_0 at t = 1000 sigma; sigma is uniform, then shifted by 7 towards noise. A tenth of the prompts is empty, for
classifier-free guidance. What is kept is an average of the weights over the run's end (decay 0.999).
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5Config, UMT5EncoderModel

from tools.tiny.tokenizer import VOCAB_SIZE, sentence, train_tokenizer
from tools.tiny.world import SIZES, Clip, combinations, held_out, render, sample
from wan.models.dit import WanModel
from wan.models.text import load_tokenizer
from wan.models.vae import WanVAE
from wan.tasks import load_task

BATCH, TIMES = 32, 8  # clips in a batch; distinct timesteps in it
SHIFT = 7.0  # where a shape is and where it goes is decided at sigma > 0.9: that is where half of the steps are spent


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
    return nn.ModuleDict({"dit": initialise(WanModel(**spec.dit)), "t5": UMT5EncoderModel(config)})


def initialise(dit: WanModel) -> WanModel:
    """Weights to begin training with, in place."""
    for name, weight in dit.named_parameters():
        if name.startswith("head.head"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
        elif weight.ndim == 5:
            nn.init.xavier_uniform_(weight.data.flatten(1))
        elif name.endswith(".bias"):
            nn.init.zeros_(weight)
    return dit


@torch.no_grad()
def latents_of(out: Path, spec, rng: random.Random, count: int) -> dict[tuple[int, int], tuple[Tensor, list[Clip]]]:
    """By size, latents `[n, 16, 5, h, w]` of random clips, and the clips. In bf16, which is the faster here."""
    vae = WanVAE(**spec.vae)
    vae.load_state_dict(torch.load(out / "vae.pth", weights_only=True))
    vae.eval().to(torch.bfloat16)
    combos = [c for c in combinations() if c not in held_out()]
    data = {}
    for size in SIZES:
        clips = [sample(rng, combos) for _ in range(count if size == SIZES[0] else count // 10)]
        batches = [torch.stack([render(c, *size) for c in clips[i : i + 8]]) for i in range(0, len(clips), 8)]
        data[size] = torch.cat([vae.encode(batch) for batch in batches]), clips
    return data


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
    # At this size the plain attention is faster, backwards too, than the fused one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        context = encode_texts(model["t5"], tokenizer, texts, text_len)
        velocity = model["dit"]((1 - mix) * latents + mix * noise, sigma * 1000, context)
    return (velocity - (noise - latents)).square().mean()


def train(out: Path, steps: int, clips: int = 2000, peak: float = 8e-4, seed: int = 0, resume: bool = False) -> None:
    """`out` holds vae.pth; tokenizer, dit.pth and log go there. `clips` of 64x64, a tenth of that at other sizes.

    `resume` begins with the weights of an earlier dit.pth.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = load_task("t2v-tiny")
    start = time.time()
    data = latents_of(out, spec, rng, clips)
    log = (out / "train_dit.jsonl").open("w")
    print(json.dumps({"stage": "latents", "seconds": round(time.time() - start)}), file=log, flush=True)

    train_tokenizer(out / "google" / "umt5-xxl")
    tokenizer = load_tokenizer(out / "google" / "umt5-xxl")
    model = build(spec)
    if resume:
        for name, weights in torch.load(out / "dit.pth", weights_only=True).items():
            model[name].load_state_dict(weights)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, total = time.time(), 0.0
    for step in range(steps):
        warm, cool = min(1, (step + 1) / 200), min(1, (steps - step) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
        size = SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])
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
