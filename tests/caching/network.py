"""A small network, its sampling under a cache, and what its tests measure that by."""

from __future__ import annotations

import torch
from wan.cache import NO_CACHE, NoCache

from tests.caching.toy import CONFIGS, STEPS, random
from wan.denoise import denoise
from wan.models.dit import WanModel
from wan.solvers import make_solver

SHAPE = (1, 4, 3, 4, 8)  # latents of 24 tokens
MEASURED = [name for name in CONFIGS if name.startswith(("fbcache", "easycache"))]
PLANNED = [name for name in CONFIGS if name not in MEASURED]
ON_BLOCKS = [name for name in CONFIGS if name != "easycache"]
FBCACHE = [name for name in CONFIGS if name.startswith("fbcache")]


def tiny_model(seed):
    shape = {"patch_size": (1, 2, 2), "text_len": 8, "in_dim": 4, "dim": 32, "ffn_dim": 48, "freq_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanModel("t2v", text_dim=16, out_dim=4, num_heads=2, num_layers=2, **shape).eval()


def texts(seed=0):
    return {branch: 3 * random(4, 16, seed=seed + index) for index, branch in enumerate(("cond", "uncond"))}


class Scripted:
    """A solver whose latents do not depend on what was predicted. Steps are uneven."""

    def __init__(self, latents, steps=STEPS):
        self.steps, self.first, self.latents = steps, 0, latents
        self.sigmas = torch.linspace(1, 0, steps + 1) ** 0.8
        self.timesteps = 1000 * self.sigmas[:-1]
        self.velocities = []

    def step(self, velocity, sample):
        self.velocities.append(velocity)
        return self.latents[min(len(self.velocities), self.steps - 1)]


def way(steps=STEPS, seed=0):
    """Latents for Scripted."""
    start, drift = random(*SHAPE, seed=seed), random(*SHAPE, seed=seed + 50)
    return [start + 0.05 * step * drift for step in range(steps)]


def sample(models, cache=NO_CACHE, *, steps=STEPS, seed=0, words=None, solver=None, scale=3.0, **options):
    """Latents after a run of `denoise` under `cache`."""
    words = words or texts()

    def predict(latent, times, ctx):
        return models[ctx.expert](latent, times, [words[ctx.branch]], cache=cache, ctx=ctx)

    solver = solver or make_solver("unipc", steps=steps, shift=5.0)
    start = solver.latents[0] if isinstance(solver, Scripted) else random(*SHAPE, seed=seed)
    return denoise(predict, solver, start, guide_scale=scale, cache=cache, **options)


class Watch(NoCache):
    """Hands everything on to a cache and keeps what each prediction gave."""

    def __init__(self, cache):
        self.cache, self.outs = cache, {}

    def run(self, steps):
        return self.cache.run(steps)

    def blocks(self, *args):
        return self.cache.blocks(*args)

    def prediction(self, ctx, latent, call):
        self.outs[ctx.step, ctx.branch] = out = self.cache.prediction(ctx, latent, call)
        return out


def skips(manager):
    return sum(one.skipped for one in manager.telemetry.decisions)


def official_mask(ratios, threshold, K, retention):
    """The loop of MagCache's own code: True where a step is skipped."""
    mask, gamma, error, run = [], 1.0, 0.0, 0
    for index, ratio in enumerate(ratios):
        skip = False
        if index >= int(len(ratios) * retention):
            gamma, run = gamma * ratio, run + 1
            error += abs(1 - gamma)
            skip = error < threshold and run <= K
            if not skip:
                gamma, error, run = 1.0, 0.0, 0
        mask.append(skip)
    return mask
