"""A stack of blocks to put a cache around, policies to try on it, and a rank of several that share its tokens.

Run as `python -m tests.caching.toy RANK RANKS FOLDER` it is one of RANKS processes that cut up the tokens, and
writes what it decided into FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from wan.cache import CacheManager, StepContext
from wan.cache.options import check_options, make_manager
from wan.distributed.shards import Group

STEPS = 12
# Name -> (flags that skip about half of the steps, coefficients).
CONFIGS: dict[str, tuple[dict, dict]] = {
    "teacache linear": ({"teacache": True, "teacache_thresh": 1.6}, {}),
    "teacache polynomial": (
        {"teacache": True, "teacache_thresh": 1.6, "teacache_policy": "polynomial"},
        {"polynomial": {expert: [0.5, 0.5, 0.05] for expert in ("model", "high", "low")}},
    ),
    "teacache polynomial_projection": (
        {"teacache": True, "teacache_thresh": 1.6, "teacache_policy": "polynomial_projection"},
        {"polynomial": {expert: [1.0, 0.05] for expert in ("model", "high", "low")}},
    ),
    **{
        f"fbcache {measure}": ({"fbcache": True, "fb_thresh": thresh, "fb_metric": measure}, {})
        for measure, thresh in (("hidden_rel_l1", 0.09), ("residual_rel_l1", 0.09), ("hidden_rel_l2", 0.12))
    },
    "magcache": (
        {"magcache": True, "mag_thresh": 0.12},
        {"ratios": {expert: [1.0, *[0.98] * 19] for expert in ("model", "high", "low")}},
    ),
    "easycache": ({"easycache": True, "easy_thresh": 1.0}, {}),
}
THRESHOLDS = {
    "teacache": "teacache_thresh",
    "fbcache": "fb_thresh",
    "magcache": "mag_thresh",
    "easycache": "easy_thresh",
}


def make(name: str, *, ranks=None, steps: int = STEPS, **flags) -> CacheManager:
    """The manager for a name in CONFIGS, with more flags."""
    given, coefficients = CONFIGS[name]
    options, _ = check_options({**given, **flags}, steps)
    return make_manager(options, coefficients, ranks)


def contexts(steps: int = STEPS, expert: str = "model", first: int = 0, of: int | None = None) -> list[StepContext]:
    """Steps `first`.. of a run; sigmas at uneven distances."""
    of = of or steps
    return [
        StepContext(step, of, 1000 * (1 - step / of) ** 0.8, (1 - step / of) ** 0.8, expert)
        for step in range(first, first + steps)
    ]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Stack:
    """Blocks that treat each token by itself, so that a sequence may be cut anywhere. `calls` counts blocks."""

    def __init__(self, count: int = 3, width: int = 8):
        self.weights = [random(width, width, seed=100 + index) for index in range(count)]
        self.calls = 0

    def run(self, h: Tensor, first: int, last: int) -> Tensor:
        for weight in self.weights[first:last]:
            self.calls += 1
            h = h + 0.3 * torch.tanh(h @ weight.to(h.dtype))
        return h

    @staticmethod
    def embed(timestep: float) -> Mapping[str, Tensor]:
        wave = torch.cos(torch.arange(1, 9) * timestep / 250)
        return {"embedding": wave[None], "projection": wave.sin()[None]}


def hidden(step: int, branch: str, tokens: int = 37, width: int = 8) -> Tensor:
    """Hidden states on a way through the steps. Tokens differ in how much they change."""
    start, way = (random(1, tokens, width, seed=seed + 10 * (branch == "cond")) for seed in (1, 2))
    return start + 0.04 * step * torch.linspace(0, 2, tokens)[:, None] ** 3 * way


def predict(manager: CacheManager, ctx: StepContext, h: Tensor, stack: Stack) -> Tensor:
    """What a sampler and its network do for one prediction, `h` being both the latent and the hidden states."""
    return manager.prediction(ctx, h, lambda: manager.blocks(ctx, h, stack.run, len(stack.weights), stack.embed))


def run_stack(
    manager: CacheManager,
    stack: Stack,
    *,
    shard: slice = slice(None),
    steps: Sequence[StepContext] | None = None,
    branches: Sequence[str] = ("cond", "uncond"),
    glitch: tuple[int, str] | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Results by (step, branch). glitch: the step and the branch at which a token is missing."""
    outs = {}
    steps = contexts() if steps is None else steps
    with torch.no_grad(), manager.run(steps):
        for ctx in steps:
            for branch in branches:
                h = hidden(ctx.step, branch)[:, shard]
                if glitch == (ctx.step, branch):
                    h = h[:, :-1]
                outs[ctx.step, branch] = predict(manager, replace(ctx, branch=branch), h, stack)
    return outs


def decisions(manager: CacheManager, branch: str | None = None, expert: str | None = None) -> str:
    """A letter a prediction: S skipped, c computed."""
    chosen = (
        one for one in manager.telemetry.decisions if branch in (None, one.branch) and expert in (None, one.expert)
    )
    return "".join("S" if one.skipped else "c" for one in chosen)


# Ranks

CUTS = {2: (0, 5, 37), 4: (0, 2, 21, 24, 37)}
GLITCH_STEP = 5  # which all of these skip
GLITCHES = [(GLITCH_STEP, "cond"), (GLITCH_STEP, "uncond")]
GLITCH_CASES = [
    ("teacache linear", {}),
    ("fbcache residual_rel_l1", {}),
    ("fbcache residual_rel_l1", {"fb_cfg_sep_diff": False}),
]


class RankStack(Stack):
    """Its ranks wait for each other in every block, as those of a sequence-parallel network do."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def run(self, h: Tensor, first: int, last: int) -> Tensor:
        torch.distributed.all_reduce(torch.zeros(7), group=self.group)
        return super().run(h, first, last)


class SharedTokens:
    """The ranks of a group, among which the tokens are shared."""

    def __init__(self, group):
        self.reduce_scalar = Group(group).sum


def rank_main(rank: int, ranks: int, folder: Path) -> None:
    """Every policy on 4 ranks and on the first 2 of them; then with hidden states that change on one rank only."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    report = {}
    for size in CUTS:
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue

        shard = slice(*CUTS[size][rank : rank + 2])
        cases = [(name, None, {}) for name in CONFIGS]
        cases += [(name, glitch, flags) for name, flags in GLITCH_CASES for glitch in GLITCHES]
        for name, glitch, flags in cases:
            manager = make(name, ranks=SharedTokens(group), **flags)
            whole = manager.policy.level == "prediction"  # every rank holds the whole latent
            run_stack(
                manager,
                RankStack(group) if glitch else Stack(),
                shard=slice(None) if whole else shard,
                glitch=glitch if rank == 1 else None,
            )
            report[f"{size} {name} {glitch} {flags}"] = [asdict(one) for one in manager.telemetry.decisions]
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
