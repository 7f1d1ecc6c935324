"""Trains the branch of vace-tiny, in the shape of Wan2.1 VACE, beside the frozen transformer of t2v-tiny.

The network sees what `vace_context` makes at inference of a clip of which a part is to be made anew: a hole around the
shape's path or anywhere (inpainting), margins (outpainting), what follows or precedes some frames (extension), or all;
in a third of the clips after a picture of the shape on white (reference), which the text then need not describe. Flow
matching as in train_dit.py, on the clip as it should become. The branch begins as the first blocks of t2v-tiny, and
its hints as zeros, so at first nothing is changed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tools.tiny.fit import Texts, fit, flow_errors, load_vae, noise_levels
from tools.tiny.lora import load_dit
from tools.tiny.tokenizer import sentence
from tools.tiny.world import DIRECTIONS, NUM_FRAMES, SIZES, Clip, combinations, held_out, render, sample
from wan.conditioning.vace import mask_channels
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.locate import locate

BATCH = 32  # clips
SHIFTS = (7.0, 2.0)  # of sigma, by turns: where the shape goes, and how exactly what is given is kept
WITH_REFERENCE, ITS_BATCHES = 1 / 3, 0.45  # of the clips, and of the batches
SHORT = ("it moves {direction} on a {background} background", "moving {direction} on {background}")


class Examples(NamedTuple):
    """Clips of one size, with a reference (R = 1) or without (R = 0), the latents `[n, 16, R + 5, h, w]` of what should
    be made, and what is given for it, `[n, 96, R + 5, h, w]` in fp16."""

    clips: list[Clip]
    latents: Tensor
    contexts: Tensor


def hole(rng: random.Random, clip: Clip, width: int, height: int) -> Tensor:
    """What is made anew, bool [T, height, width]: a box around the whole path, one that moves along, or any."""
    radius, (dx, dy) = clip.radius * min(width, height), DIRECTIONS[clip.direction]
    mask = torch.zeros(NUM_FRAMES, height, width, dtype=torch.bool)
    kind, margin = rng.choice(("path", "path", "moving", "any")), rng.randint(2, 10)
    box = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
    corner = rng.uniform(0, width - box[0]), rng.uniform(0, height - box[1])
    for frame in range(NUM_FRAMES):
        if kind == "any":
            left, top, right, bottom = *corner, corner[0] + box[0], corner[1] + box[1]
        else:
            times = (-0.5, 0.5) if kind == "path" else (frame / (NUM_FRAMES - 1) - 0.5,) * 2
            xs = [(clip.x + dx * clip.travel * time) * width for time in times]
            ys = [(clip.y + dy * clip.travel * time) * height for time in times]
            reach = radius + margin
            left, right, top, bottom = min(xs) - reach, max(xs) + reach, min(ys) - reach, max(ys) + reach
        mask[frame, max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = True
    return mask


def margins(rng: random.Random, width: int, height: int) -> Tensor:
    mask = torch.ones(NUM_FRAMES, height, width, dtype=torch.bool)
    sides = [rng.random() < 0.5 for _ in range(4)]
    sides[rng.randrange(4)] = True
    left, right = (rng.randint(4, int(0.35 * width)) * side for side in sides[:2])
    top, bottom = (rng.randint(4, int(0.35 * height)) * side for side in sides[2:])
    mask[:, top : height - bottom, left : width - right] = False
    return mask


def rest(rng: random.Random, width: int, height: int) -> Tensor:
    """All but some frames at the beginning, at the end, or both."""
    mask = torch.ones(NUM_FRAMES, height, width, dtype=torch.bool)
    ends = rng.choice(("first", "first", "last", "both"))
    if ends != "last":
        mask[: rng.choice((1, 5, 5, 9, rng.randint(1, 12)))] = False
    if ends != "first":
        mask[-rng.choice((1, 4, rng.randint(1, 8))) :] = False
    return mask


def everything(width: int, height: int) -> Tensor:
    return torch.ones(NUM_FRAMES, height, width, dtype=torch.bool)


def new_part(rng: random.Random, clip: Clip, width: int, height: int, has_reference: bool) -> Tensor:
    chance = rng.random()
    if chance < (0.5 if has_reference else 0.08):
        return everything(width, height)
    chance = rng.random()
    if chance < 0.4:
        return hole(rng, clip, width, height)
    return margins(rng, width, height) if chance < 0.7 else rest(rng, width, height)


def likeness(rng: random.Random, clip: Clip) -> Clip:
    """A picture to refer to: the same shape, larger or smaller, somewhere on white."""
    radius = rng.uniform(0.16, 0.4)
    x, y = (rng.uniform(radius, 1 - radius) for _ in range(2))
    return Clip(clip.color, clip.shape, clip.direction, "white", radius, x, y, 0.0)


def groups(rng: random.Random, count: int) -> Iterator[tuple[tuple[int, int], bool, list[Clip]]]:
    """(size, has reference, clips): `count` clips of 64x64, a tenth of that at each other size, by eights."""
    combos = [c for c in combinations() if c not in held_out()]
    for size in SIZES:
        number = count if size == SIZES[0] else count // 10
        for has_reference, share in ((False, 1 - WITH_REFERENCE), (True, WITH_REFERENCE)):
            for _ in range(max(2, round(number * share / 8))):
                yield size, has_reference, [sample(rng, combos) for _ in range(8)]


@torch.no_grad()
def examples(vae: WanVAE, rng: random.Random, count: int) -> dict[tuple[tuple[int, int], bool], Examples]:
    """By size and whether there is a reference."""
    found: dict[tuple[tuple[int, int], bool], list[Examples]] = {}
    for size, has_reference, clips in groups(rng, count):
        videos = torch.stack([render(clip, *size) for clip in clips])
        masks = torch.stack([new_part(rng, clip, *size, has_reference) for clip in clips])[:, None]
        latents, kept = vae.encode(videos), vae.encode(videos.masked_fill(masks, 0))
        grey = vae.encode(torch.zeros_like(videos[:1])).expand_as(kept)
        channels = [mask_channels(mask.float(), *kept.shape[-2:]) for mask in masks]
        contexts = torch.cat([kept, grey, torch.stack(channels)], 1)
        if has_reference:
            stills = vae.encode(torch.stack([render(likeness(rng, clip), *size, [0]) for clip in clips]))
            latents = torch.cat([stills, latents], 2)
            contexts = torch.cat([nn.functional.pad(stills, (0, 0, 0, 0, 0, 0, 0, 80)), contexts], 2)
        found.setdefault((size, has_reference), []).append(Examples(clips, latents, contexts.half()))
    return {
        key: Examples(sum((one.clips for one in some), []), *(torch.cat(part) for part in list(zip(*some))[1:]))
        for key, some in found.items()
    }


def describe(clip: Clip, rng: random.Random, has_reference: bool) -> str:
    """A prompt: a tenth are empty, for guidance; with a reference, half leave the shape to it."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    if has_reference and chance < 0.6:
        return rng.choice(SHORT).format(direction=clip.direction, background=clip.background)
    return sentence(clip, rng)


def build(dit: WanModel, spec) -> WanModel:
    """The transformer of vace-tiny from that of t2v-tiny, which is frozen; what is trained requires a gradient.

    The branch is given what is kept, and what is replaced, as the base is given its latents.
    """
    model = WanModel(**spec.dit)
    model.load_state_dict(dit.state_dict(), strict=False)
    model.requires_grad_(False)
    embedding, branch = model.vace_patch_embedding, model.vace_blocks
    nn.init.normal_(embedding.weight, std=0.02)
    for part in range(2):
        embedding.weight.data[:, 16 * part : 16 * part + 16] = dit.patch_embedding.weight.data
    embedding.bias.data.copy_(dit.patch_embedding.bias.data)
    for block, layer in zip(branch, spec.dit.vace_layers, strict=True):
        block.load_state_dict(dit.blocks[layer].state_dict(), strict=False)
        nn.init.zeros_(block.after_proj.weight)
        nn.init.zeros_(block.after_proj.bias)
    nn.init.eye_(branch[0].before_proj.weight)
    nn.init.zeros_(branch[0].before_proj.bias)
    for module in (embedding, branch):
        module.requires_grad_(True)
    return model


def loss_of(model: WanModel, latents: Tensor, contexts: Tensor, texts: list[Tensor], shift: float) -> Tensor:
    how = {"vace_context": contexts, "vace_context_scale": 1.0}
    errors = flow_errors(model, latents, texts, noise_levels(len(latents), shift), **how)
    kept = 1 - contexts[:, 32:].mean(1, keepdim=True)  # counts twice
    return (errors * (1 + kept)).mean()


def train(
    out: Path, tiny: Path, steps: int, clips: int = 1200, peak: float = 1e-3, seed: int = 0, resume: bool = False
) -> None:
    """`tiny` is the checkpoint folder of t2v-tiny. vace.pth, the averaged weights of the branch, and a log go to `out`.

    `resume` goes on from the last saved step of an earlier run with the same arguments, or with its examples.
    """
    torch.manual_seed(seed)
    spec, base = load_task("vace-tiny"), load_task("t2v-tiny")
    files = locate(tiny, base)
    kept = out / "vace_examples.pth"
    if not (resume and kept.is_file()):
        torch.save(examples(load_vae(files, base, torch.float32), random.Random(seed), clips), kept)
    with torch.serialization.safe_globals([Clip, Examples]):
        data = torch.load(kept, weights_only=True)
    texts, model = Texts.of(files, spec), build(load_dit(files.dit["model"], base), spec)

    def loss(step: int, rng: random.Random) -> Tensor:
        size = SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])
        has_reference = rng.random() < ITS_BATCHES
        pool = data[size, has_reference]
        picks = rng.sample(range(len(pool.clips)), BATCH if size == SIZES[0] else BATCH // 2)
        prompts = texts([describe(pool.clips[i], rng, has_reference) for i in picks])
        shift = SHIFTS[step % len(SHIFTS)]
        return loss_of(model, pool.latents[picks], pool.contexts[picks].float(), prompts, shift)

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fit("vace", out, trained, loss, steps=steps, peak=peak, seed=seed, resume=resume)
