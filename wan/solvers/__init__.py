"""Flow-matching solvers: from a velocity prediction at sigma_k to the sample at sigma_{k+1}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wan.errors import UsageError
from wan.solvers.base import Solver
from wan.solvers.dpmpp import DPMPlusPlus2M
from wan.solvers.euler import Euler
from wan.solvers.schedule import linear_schedule, listed_schedule, unipc_schedule
from wan.solvers.unipc import UniPC2

# name -> (update rule, its schedule when the caller lists no steps)
SOLVERS = {
    "unipc": (UniPC2, unipc_schedule),
    "dpm++": (DPMPlusPlus2M, linear_schedule),
    "euler": (Euler, linear_schedule),
}


def make_solver(
    name: str,
    *,
    steps: int,
    shift: float,
    denoising_step_list: Sequence[float] | None = None,
    num_train_timesteps: int = 1000,
    first: int = 0,
) -> Solver:
    """A fresh solver, holding its whole schedule, from step `first` on, and no history.

    ``shift`` is the timestep shift of flow matching: sigma -> shift * sigma / (1 + (shift - 1) * sigma).
    ``denoising_step_list`` names the unshifted training timesteps of a step-distilled model, for example
    ``[1000, 750, 500, 250]``; it replaces the solver's own spacing and must have ``steps`` entries.
    Raises UsageError for an unknown name or an impossible schedule.
    """
    if name not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}; choose one of: {', '.join(SOLVERS)}")
    if steps < 1:
        raise UsageError(f"the number of sampling steps must be at least 1, got {steps}")
    if not shift > 0:
        raise UsageError(f"the timestep shift must be positive, got {shift}")
    solver_class, own_schedule = SOLVERS[name]
    if denoising_step_list is None:
        timesteps, sigmas = own_schedule(steps, shift, num_train_timesteps)
    elif len(denoising_step_list) == steps:
        timesteps, sigmas = listed_schedule(denoising_step_list, shift, num_train_timesteps)
    else:
        raise UsageError(f"{len(denoising_step_list)} denoising steps are listed, but {steps} sampling steps are asked")
    solver = solver_class((timesteps[first:], sigmas[first:]))
    solver.first = first
    return solver


def solver_of(sample: Any) -> Solver:
    """The solver of a `wan.options.Sample`."""
    return make_solver(
        sample.solver,
        steps=sample.steps,
        shift=sample.shift,
        denoising_step_list=sample.denoising_step_list,
        first=sample.first_step,
    )


__all__ = ["SOLVERS", "Solver", "make_solver", "solver_of"]
