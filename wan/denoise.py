"""The sampling loop: expert by noise level, classifier-free guidance, solver, conditioning, callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from wan.cache import NO_CACHE, NoCache, StepContext
from wan.conditioning.condition import Condition
from wan.distributed.parallel import Parallel
from wan.models.dit.sequence import Schedule, Times
from wan.solvers import Solver
from wan.solvers.schedule import TIMESTEPS

# predict(latent, times, ctx) -> velocity like latent. ``times`` is what WanModel takes for t. The caller finds the
# network by ctx.expert and the text by ctx.branch.
Predict = Callable[[torch.Tensor, Times, StepContext], torch.Tensor]
OnStep = Callable[[StepContext, torch.Tensor], None]
Scale = float | tuple[float, float]  # of guidance; a pair is (low-noise, high-noise), as in the official configs


@torch.no_grad()
def denoise(
    predict: Predict,
    solver: Solver,
    latent: torch.Tensor,
    *,
    guide_scale: Scale | Callable[[int], Scale],
    boundary: float | None = None,
    boundary_step_index: int | None = None,
    condition: Condition | None = None,
    on_step: OnStep | None = None,
    on_clean: OnStep | None = None,
    cache: NoCache = NO_CACHE,
    parallel: Parallel | None = None,
    run: int = 0,
) -> torch.Tensor:
    """The clean latent, fp32, from ``latent``, noise of any shape [..., F, H, W].

    guide_scale: one scale, or (low-noise, high-noise), or what gives one by the number of a step; at scale 1 the uncond
                 branch is not computed
    boundary:    None for one network ("model"); else the expert is "high" while t >= boundary * 1000, then "low".
                 The solver's history goes on over the switch
    boundary_step_index: the first step of "low", in place of the boundary
    condition:   its `inputs` are predict's matter; here its latent is restored and its timesteps are used
    on_step:     called after each step with the cond branch's context and the new latent; whatever it raises ends the
                 run, which is how one is cancelled
    on_clean:    called before it with the clean latent that the step's prediction means, which a preview shows
    parallel:    may compute cond and uncond on different ranks
    cache:       stands around every prediction, and is told of the run; predict hands it on to the network
    """
    condition, parallel = condition or Condition(), parallel or Parallel()
    latent = condition.restore(latent.float())
    contexts = []
    timesteps = solver.timesteps.tolist()
    experts = experts_of(timesteps, boundary, boundary_step_index, solver.first)
    steps = solver.first + solver.steps
    for step, (timestep, expert) in enumerate(zip(timesteps, experts, strict=True)):
        sigma = solver.sigmas[step].item()
        contexts.append(StepContext(solver.first + step, steps, timestep, sigma, expert, "cond", run))
    told = {name: [t for t, one in zip(solver.timesteps, experts, strict=True) if one == name] for name in experts}
    schedules = {name: iter(Schedule(map(condition.timesteps, steps))) for name, steps in told.items()}
    with cache.run(contexts):
        for ctx in contexts:
            times = next(schedules[ctx.expert])
            scale = scale_of(ctx.expert, guide_scale(ctx.step) if callable(guide_scale) else guide_scale)
            velocity = guided_velocity(predict, latent, times, ctx, scale, cache, parallel)
            if on_clean is not None:
                on_clean(ctx, condition.restore(latent - ctx.sigma * velocity))
            latent = condition.restore(solver.step(velocity, latent))
            if on_step is not None:
                on_step(ctx, latent)
    return latent


def guided_velocity(
    predict: Predict,
    latent: torch.Tensor,
    times: Times,
    ctx: StepContext,
    scale: float,
    cache: NoCache,
    parallel: Parallel,
) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598) in fp32: uncond + scale * (cond - uncond)."""

    apart = scale != 1 and parallel.cfg.size > 1

    def velocity(branch: str) -> torch.Tensor:
        here = replace(ctx, branch=branch, apart=apart)
        return cache.prediction(here, latent, lambda: predict(latent, times, here)).float()

    if scale == 1:
        return velocity("cond")
    cond, uncond = parallel.branches(velocity, ("cond", "uncond"))
    return uncond + scale * (cond - uncond)


def expert_at(timestep: float, boundary: float | None) -> str:
    """ "model" without a boundary, else "high" from boundary * 1000 upwards and "low" below."""
    if boundary is None:
        return "model"
    return "high" if timestep >= boundary * TIMESTEPS else "low"


def boundary_of(spec: Any, sample: Any) -> float | None:
    """The noise level, 0..1, from which on the high-noise expert of a task works; None for one expert."""
    return spec.get("boundary") if sample.boundary is None else sample.boundary


def experts_of(
    timesteps: Sequence[float], boundary: float | None, boundary_step_index: int | None, first: int = 0
) -> list[str]:
    """The expert of each step. first: the number of the first one."""
    if boundary is None or boundary_step_index is None:
        return [expert_at(timestep, boundary) for timestep in timesteps]
    return ["high" if step < boundary_step_index else "low" for step in range(first, first + len(timesteps))]


def scale_of(expert: str, guide_scale: Scale) -> float:
    """The scale of an expert."""
    if isinstance(guide_scale, (int, float)):
        return guide_scale
    low, high = guide_scale
    return high if expert == "high" else low
