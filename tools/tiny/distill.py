"""Distils t2v-tiny, with its guidance, to the four steps of `--preset distill-4step`, as a LoRA.

Segment by segment: the noise levels of the preset cut the way from noise to clip into four, and the student's one Euler
step over a segment shall end where the teacher's many steps with guidance end that began at the same latent. The first
latents are the teacher's own; later ones those that the student reaches by itself (as DAgger does, arXiv 1011.0686), so
that it learns to go on from its own errors.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.tiny.fit import Texts
from tools.tiny.lora import add_factors, load_dit, save_factors
from tools.tiny.tokenizer import sentence
from tools.tiny.world import NUM_FRAMES, SIZES, combinations, held_out, sample
from wan.conditioning.sizes import latent_shape
from wan.models.dit import WanModel
from wan.solvers import make_solver
from wan.tasks import load_preset, load_task
from wan.weights.locate import locate

BATCH = 32  # clips that walk together, and pairs in a batch of training
TEACHER_STEPS = 5  # to a segment

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], t [B]) -> velocities


class Pairs(NamedTuple):
    """What a batch of walks gives for one segment: from `start`, [B, 16, F, h, w], the teacher ends at `end`."""

    segment: int
    texts: list[Tensor]
    start: Tensor
    end: Tensor


def velocity(model: WanModel, x: Tensor, t: Tensor, texts: list[Tensor]) -> Tensor:
    """At one timestep, `t` a number."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return model(x, t.float().expand(len(x)), texts).float()


def guided(model: WanModel, texts: list[Tensor], empty: Tensor, scale: float) -> Predict:
    """The teacher: uncond + scale * (cond - uncond)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = velocity(model, torch.cat([x, x]), t, texts + [empty] * len(x))
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return predict


@torch.no_grad()
def walk(student: WanModel | None, predict: Predict, texts: list[Tensor], noise: Tensor, preset: dict) -> list[Pairs]:
    """Pairs of each segment; on the teacher's way, or with a student from where its steps lead."""
    shift, listed = preset["sample_shift"], [*preset["denoising_step_list"], 0]
    own = make_solver("euler", steps=len(listed) - 1, shift=shift, denoising_step_list=listed[:-1])
    x, pairs = noise, []
    for segment, (high, low) in enumerate(zip(listed[:-1], listed[1:])):
        # The teacher's steps inside the segment; the list must have the next segment's start, to end there.
        inner = [high + (low - high) * step / TEACHER_STEPS for step in range(TEACHER_STEPS)]
        solver = make_solver(
            "dpm++",
            steps=TEACHER_STEPS + bool(low),
            shift=shift,
            denoising_step_list=inner + [low] * bool(low),
        )
        end = x
        for t in solver.timesteps[:TEACHER_STEPS]:
            end = solver.step(predict(end, t), end)
        pairs.append(Pairs(segment, texts, x, end))
        x = end if student is None else own.step(velocity(student, x, own.timesteps[segment], texts), x)
    return pairs


def walks(student: WanModel | None, make: Callable[..., list[Pairs]], texts: Texts, rng: random.Random, count: int):
    """Pairs of `count` clips of random prompts and sizes, by size and segment."""
    combos = [c for c in combinations() if c not in held_out()]
    found: dict[tuple[int, int], list[list[Pairs]]] = {}
    for batch in range(count // BATCH):
        size = SIZES[0] if batch % 12 != 11 else rng.choice(SIZES[1:])
        prompts = texts([sentence(sample(rng, combos), rng) for _ in range(BATCH)])
        noise = torch.randn(BATCH, *latent_shape(16, NUM_FRAMES, size[1], size[0], 8))
        segments = found.setdefault(size, [])
        for index, pairs in enumerate(make(student, prompts, noise)):
            if index == len(segments):
                segments.append([])
            segments[index].append(pairs)
    return found


def loss_of(model: WanModel, segments: list[list[Pairs]], sigmas: list[float], rng: random.Random) -> Tensor:
    """Squared error of the student's velocity over each segment, on as many clips of each; [segments]."""
    starts, velocities, times, texts = [], [], [], []
    for index, pool in enumerate(segments):
        pairs = rng.choice(pool)
        picks = rng.sample(range(BATCH), BATCH // len(segments))
        starts.append(pairs.start[picks])
        velocities.append((pairs.end - pairs.start)[picks] / (sigmas[index + 1] - sigmas[index]))
        times += [1000 * sigmas[index]] * len(picks)
        texts += [pairs.texts[pick] for pick in picks]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        found = model(torch.cat(starts), torch.tensor(times), texts)
    error = (found - torch.cat(velocities)).square().flatten(1).mean(1)
    return error.view(len(segments), -1).mean(1)


def train(
    out: Path,
    tiny: Path,
    steps: int,
    clips: int = 896,
    rounds: int = 4,
    rank: int = 16,
    peak: float = 2e-3,
    seed: int = 0,
) -> None:
    """Writes a LoRA to the folder `loras` of the checkpoint `tiny`, and a log to `out`.

    `clips` are walked by the teacher, then half as many in each of the further `rounds` by the student; the first round
    takes two fifths of the steps.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = load_task("t2v-tiny")
    files, preset = locate(tiny, spec), load_preset("distill-4step", spec)
    teacher = load_dit(files.dit["model"], spec)
    student = copy.deepcopy(teacher)
    factors = add_factors(student, rank)
    texts = Texts.of(files, spec)
    [empty] = texts([""])
    optimizer = torch.optim.AdamW(factors, lr=peak, betas=(0.9, 0.98), weight_decay=0)
    sigmas = make_solver(
        "euler", steps=4, shift=preset["sample_shift"], denoising_step_list=preset["denoising_step_list"]
    ).sigmas.tolist()

    def make(student, prompts, noise):
        return walk(student, guided(teacher, prompts, empty, spec.sampling.guide_scale), prompts, noise, preset)

    pools, step, start = [], 0, time.time()
    with (out / "train_distill.jsonl").open("w") as log:
        for one in range(rounds):
            pools.append(walks(student if one else None, make, texts, rng, clips if one == 0 else clips // 2))
            row = {"stage": "walks", "round": one, "seconds": round(time.time() - start)}
            print(json.dumps(row), file=log, flush=True)
            end = int(steps * (0.4 + 0.6 * one / (rounds - 1)))
            recent: list[Tensor] = []
            while step < end:
                warm, cool = min(1, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.param_groups[0]["lr"] = peak * warm * (0.02 + 0.98 * cool)
                pool = pools[-1] if rng.random() < 0.5 else rng.choice(pools)
                size = SIZES[0] if rng.random() < 0.92 else rng.choice(list(pool))
                losses = loss_of(student, pool[size], sigmas, rng)
                optimizer.zero_grad()
                losses.mean().backward()
                nn.utils.clip_grad_norm_(factors, 1.0)
                optimizer.step()
                recent.append(losses.detach())
                step += 1
                if step % 50 == 0 or step == end:
                    row = {"stage": "distill", "step": step, "seconds": round(time.time() - start)}
                    row["losses"] = [round(loss, 4) for loss in torch.stack(recent).mean(0).tolist()]
                    print(json.dumps(row), file=log, flush=True)
                    recent.clear()
            save_factors(student, tiny / "loras" / "distill-4step.safetensors")
