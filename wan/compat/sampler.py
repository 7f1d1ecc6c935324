"""Samplers and schedulers of other projects -> our solvers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.errors import UsageError

DEFAULT_SAMPLER = "Flow_Unipc"
SAMPLERS = {"Flow_Unipc": "unipc", "Flow": "euler", "Flow_DPM++": "dpm++"}  # VideoX-Fun's names

# Class names of VideoX-Fun (Flow...) and diffusers.
_SCHEDULERS = {
    "FlowUniPCMultistepScheduler": "unipc",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowDPMSolverMultistepScheduler": "dpm++",
    "DPMSolverMultistepScheduler": "dpm++",
}
# What a scheduler must be set to, where it has the setting, to be the solver of that name.
_WANTED = {
    "num_train_timesteps": (1000,),
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "use_dynamic_shifting": (False,),
    "stochastic_sampling": (False,),
    "invert_sigmas": (False,),
    "solver_order": (2,),
    "solver_type": ("bh2", "midpoint"),
    "algorithm_type": ("dpmsolver++",),
    **{f"use_{kind}_sigmas": (False,) for kind in ("karras", "exponential", "beta")},
}


def sampler(name: str) -> tuple[str, str | None]:
    """(our solver, None) for a sampler of VideoX-Fun; an unknown one gives ("unipc", a warning)."""
    if name in SAMPLERS:
        return SAMPLERS[name], None
    known = ", ".join(SAMPLERS)
    warning = f"sampler {name!r} is not one for Wan and would leave noise; {DEFAULT_SAMPLER} is used (known: {known})"
    return SAMPLERS[DEFAULT_SAMPLER], warning


def solver_of(scheduler: Any) -> tuple[str, float | None]:
    """(our solver, its shift or None) that do what the object `scheduler` was set up to do.

    VideoX-Fun sets the shift of its two Flow...Multistep schedulers at the call and builds them with 1: that is None
    here. Raises UsageError for another kind of scheduler or for settings that would give another sampler.
    """
    name = type(scheduler).__name__
    if name not in _SCHEDULERS:
        raise UsageError(f"unknown scheduler {name}; known: {', '.join(_SCHEDULERS)}, or one of {', '.join(SAMPLERS)}")
    config = getattr(scheduler, "config", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    for key, wanted in _WANTED.items():
        if config.get(key) is not None and config[key] not in wanted:
            raise UsageError(f"{name} with {key} {config[key]!r} has no counterpart here; {key} must be {wanted[0]!r}")
    shift = config.get("flow_shift", config.get("shift"))
    set_at_the_call = name in ("FlowUniPCMultistepScheduler", "FlowDPMSolverMultistepScheduler") and shift == 1
    return _SCHEDULERS[name], None if set_at_the_call else shift
