"""Flow-matching solvers: from a velocity prediction at sigma_k to the sample at sigma_{k+1}."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from wan.errors import UsageError
from wan.solvers.base import Draw, Solver
from wan.solvers.chain import Method, chain
from wan.solvers.dpmpp import DPMPlusPlus2M
from wan.solvers.euler import Euler
from wan.solvers.renoise import Renoise
from wan.solvers.schedule import (
    RCM_SIGMA_MAX,
    Schedule,
    joined,
    linear_schedule,
    listed_schedule,
    rcm_schedule,
    sigma_schedule,
    unipc_schedule,
)
from wan.solvers.unipc import UniPC2

SOLVERS = {
    "unipc": Method(UniPC2),
    "dpm++": Method(DPMPlusPlus2M),
    "euler": Method(Euler),
    "dmd": Method(Renoise),
    "rcm": Method(Renoise, is_rcm=True),
    "rcm-ode": Method(Euler, is_rcm=True),
}


def make_solver(name: str, *, steps: int, first: int = 0, draw: Draw | None = None, **how: Any) -> Solver:
    """A fresh solver, holding its whole schedule, from step `first` on, and no history.

    how: see `make_schedule`; draw: gives the noise that a solver adds, see `Renoise`. Raises UsageError for an unknown
    name or an impossible schedule.
    """
    schedule = make_schedule(name, steps=steps, **how)
    return chain([(SOLVERS[name], steps)], schedule, first, draw)


def make_schedule(
    name: str,
    *,
    steps: int,
    shift: float = 1.0,
    denoising_step_list: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    sigma_max: float = RCM_SIGMA_MAX,
) -> Schedule:
    """The steps of a solver. Raises UsageError for an unknown name or impossible steps.

    shift: the timestep shift of flow matching: sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    denoising_step_list: unshifted training timesteps of a step-distilled model, for example [1000, 750, 500, 250]; and
        sigmas: noise levels as they are. Each replaces the solver's own spacing and must have `steps` entries
    sigma_max: of rCM's own steps, which have no shift
    """
    if name not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}; choose one of: {', '.join(SOLVERS)}")
    if steps < 1:
        raise UsageError(f"the number of sampling steps must be at least 1, got {steps}")
    if not shift > 0:
        raise UsageError(f"the timestep shift must be positive, got {shift}")
    if sigmas is not None:
        schedule = sigma_schedule(sigmas)
    elif denoising_step_list is not None:
        schedule = listed_schedule(denoising_step_list, shift)
    elif SOLVERS[name].is_rcm:
        schedule = rcm_schedule(steps, sigma_max)
    else:
        own = unipc_schedule if name == "unipc" else linear_schedule
        schedule = own(steps, shift)
    listed = len(schedule.timesteps)
    if listed != steps:
        raise UsageError(f"{listed} denoising steps are listed, but {steps} sampling steps are asked")
    return schedule


def solver_of(sample: Any, draw: Draw | None = None) -> Solver:
    """The solver of a `wan.options.Sample`, of several where its phases name several: each takes its own steps of the
    whole number, and ends where the next begins."""
    groups = groupby(sample.by_phase, lambda phase: phase.solver)
    parts = [(name, sum(phase.steps for phase in phases)) for name, phases in groups]
    schedules, start = [], 0
    for name, count in parts:
        whole = make_schedule(
            name,
            steps=sample.steps,
            shift=sample.shift or 1.0,
            denoising_step_list=sample.denoising_step_list,
            sigmas=sample.sigmas,
            sigma_max=sample.sigma_max or RCM_SIGMA_MAX,
        )
        schedules.append(whole.between(start, start + count))
        start += count
    return chain([(SOLVERS[name], count) for name, count in parts], joined(schedules), sample.first_step, draw)


__all__ = ["SOLVERS", "Solver", "make_schedule", "make_solver", "solver_of"]
