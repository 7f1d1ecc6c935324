"""Trains the two experts of i2v-tiny, in the shape of Wan2.2 i2v-A14B, with the VAE and the text encoder of t2v-tiny.

The network sees the first frame as `image_condition` shows it at inference. Every first frame is there with all the
directions that are not held out, so only the prompt tells them apart. Flow matching as in train_dit.py; each expert is
trained on its side of the boundary and a little beyond it (OVERLAP), with sigma shifted as in sampling.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from wan.models.encoders import TextEncoder, load_text_encoder
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.assign import load_weights
from wan.weights.locate import CheckpointFiles, locate
from wan.weights.source import open_source

EXPERTS = ("high", "low")
BATCH, TIMES = 32, 8  # clips in a batch; distinct timesteps in it
OVERLAP = 0.02  # in sigma
SHORT = ("it moves {direction}", "moving {direction}")  # the picture shows the rest
SAVE_EVERY = 250


def load_vae(files: CheckpointFiles, spec, dtype: torch.dtype) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(**spec.vae)
    return load_weights(vae, open_source(files.vae), "vae", device="cpu", dtype=dtype)


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


class Texts:
    """Embeddings of prompts by the frozen text encoder, each computed once."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> list[Tensor]:
        if new := sorted(set(texts) - self.known.keys()):
            self.known |= zip(new, self.encoder(new))
        return [self.known[text] for text in texts]


def sigma_range(expert: str, boundary: float) -> tuple[float, float]:
    return (boundary - OVERLAP, 1.0) if expert == "high" else (0.0, boundary + OVERLAP)


def loss_of(model: WanModel, latents: Tensor, y: Tensor, texts: list[Tensor], shift: float, sigmas) -> Tensor:
    low, high = (sigma / (shift - (shift - 1) * sigma) for sigma in sigmas)  # before the shift
    u = low + (high - low) * (torch.arange(TIMES) + torch.rand(TIMES)) / TIMES  # stratified
    sigma = shift * u / (1 + (shift - 1) * u)
    sigma = sigma.repeat_interleave(len(latents) // TIMES)
    noise = torch.randn_like(latents)
    mix = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model((1 - mix) * latents + mix * noise, sigma * 1000, texts, y=y)
    return (velocity - (noise - latents)).square().mean()


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
    encoder = load_text_encoder(open_source(files.t5), files.tokenizer, text_len=spec.dit.text_len, dtype=torch.float32)
    kept = out / "i2v_latents.pth"
    if not (resume and kept.is_file()):
        torch.save(clips_and_latents(files, spec, random.Random(seed), images), kept)
    data = torch.load(kept, weights_only=False)
    for expert in experts:
        with (out / f"train_i2v_{expert}.jsonl").open("a" if resume else "w") as log:
            seed_of_expert = seed + 1 + EXPERTS.index(expert)
            train_expert(out, spec, expert, data, Texts(encoder), log, steps, peak, seed_of_expert, resume)


def train_expert(out: Path, spec, expert: str, data, texts: Texts, log, steps: int, peak, seed: int, resume: bool):
    """`train` for one expert on the data of `clips_and_latents`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = initialise(WanModel(**spec.dit))
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    saved = {"model": model, "average": average, "optimizer": optimizer}
    first, spent, total = 0, 0.0, 0.0
    state_file = out / f"i2v_{expert}_state.pth"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        for name, one in saved.items():
            one.load_state_dict(state[name])
        first, spent = state["step"], state["seconds"]
        rng.setstate(state["python_rng"])
        torch.set_rng_state(state["torch_rng"])
    sigmas = sigma_range(expert, spec.boundary)
    start = time.time() - spent
    for step in range(first, steps):
        warm, cool = min(1, (step + 1) / 200), min(1, (steps - step) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
        size = SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])
        clips, latents, conditions, of_clip = data[size]
        picks = rng.sample(range(len(clips)), BATCH if size == SIZES[0] else BATCH // 2)
        context = texts([describe(clips[i], rng) for i in picks])
        loss = loss_of(model, latents[picks], conditions[of_clip[picks]], context, spec.sampling.shift, sigmas)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += loss.item()
        if step % 100 == 99 or step == steps - 1:
            row = {"stage": f"i2v_{expert}", "step": step + 1, "loss": round(total / (step % 100 + 1), 5)}
            row |= {"grad": round(norm.item(), 3), "seconds": round(time.time() - start)}
            print(json.dumps(row), file=log, flush=True)
            total = 0.0
        if (step + 1) % SAVE_EVERY == 0 or step == steps - 1:
            torch.save(average.state_dict(), out / f"i2v_{expert}.pth")
            state = {name: one.state_dict() for name, one in saved.items()}
            state |= {"step": step + 1, "seconds": time.time() - start}
            torch.save(state | {"python_rng": rng.getstate(), "torch_rng": torch.get_rng_state()}, state_file)
