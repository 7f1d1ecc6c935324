"""What is sampled: prompt, frames, steps, schedule, guidance."""

from __future__ import annotations

import math
import secrets
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import latent_frames
from wan.errors import UsageError
from wan.options.names import MAX_SEED, MAX_STEPS, MOST_RCM_STEPS, RCM_NAMES
from wan.options.phases import first_low_step, parse_phases, steps_of
from wan.options.schema import Asked
from wan.options.values import listed, number, or_default, shown, whole


def check_prompt(at: Asked, prompt: str | None) -> str:
    """Of the prompts of several clips, the first."""
    prompts = at.get["prompts"]
    if prompts and prompt is not None and prompt != prompts[0]:
        raise UsageError("--prompt and --prompts both say what is shown: give one")
    prompt = prompts[0] if prompts else or_default(prompt, at.spec.get("prompt", ""))
    if not prompt.strip():
        raise UsageError("the prompt is empty: give --prompt TEXT")
    return prompt


def check_frame_num(spec: EasyDict, value: Any) -> int:
    frame_num = whole(value, spec.sampling.frame_num, "frame_num", 1, 100_000)
    try:
        latent_frames(frame_num)
    except UsageError as error:
        raise UsageError(f"--frame_num: {error}") from error
    return frame_num


def check_seed(at: Asked, value: Any) -> int:
    allowed = f"a whole number from 0 to {MAX_SEED}, or -1 for a random one"
    seed = number(or_default(value, -1), "seed", int, allowed, lambda n: -1 <= n <= MAX_SEED)
    return secrets.randbelow(2**32) if seed == -1 else seed


def check_shift(at: Asked, value: Any) -> float | None:
    """None where nothing is shifted: listed sigmas are as they are, and rCM has steps of its own."""
    spec, size = at.spec, at.done["size"]
    if at.done["sigmas"] or own_steps(at) == {True}:
        if value is not None:
            what = "--sigmas" if at.done["sigmas"] else "the steps of rcm"
            raise UsageError(f"--sample_shift has no effect: {what} are not shifted")
        return None
    if value is None:
        at_480p = size in ("832*480", "480*832")
        value = spec.sampling.get("shift_480p", spec.sampling.shift) if at_480p else spec.sampling.shift
    return number(value, "sample_shift", float, "a number above 0", lambda n: 0 < n < math.inf)


def check_guide_scale(at: Asked, value: Any) -> tuple[float, float]:
    value, has_two = or_default(value, at.spec.sampling.guide_scale), "experts" in at.spec
    parts = listed(value)
    if not 1 <= len(parts) <= 2 or (len(parts) == 2 and not has_two):
        allowed = "one number, or LOW,HIGH" if has_two else "one number (this task has one expert)"
        raise UsageError(f"--sample_guide_scale must be {allowed}, not {shown(value)}")
    allowed = "a number of at least 0"
    scales = [number(part, "sample_guide_scale", float, allowed, lambda n: 0 <= n < math.inf) for part in parts]
    return scales[0], scales[-1]


def own_steps(at: Asked) -> set[bool]:
    """Whether solvers have steps of their own, for none are listed: those of rCM (True), or shifted ones (False)."""
    if at.done["sigmas"] or at.done["denoising_step_list"]:
        return set()
    phases = parse_phases(at.done["phases"]) if at.done["phases"] else [{}]
    return {phase.get("solver", at.done["solver"]) in RCM_NAMES for phase in phases}


def check_sigma_max(at: Asked, value: Any) -> float | None:
    if True not in own_steps(at):
        if value is not None:
            raise UsageError(f"--sigma_max is for --sample_solver {' and '.join(RCM_NAMES)} without listed steps")
        return None
    if value is None:
        return None
    return number(value, "sigma_max", float, "a number above 0", lambda n: 0 < n < math.inf)


def check_steps(at: Asked, value: Any) -> int:
    """How many there are: as many as are listed, or as the phases have together."""
    told = {f"--{name}": len(at.done[name]) for name in ("denoising_step_list", "sigmas") if at.done[name]}
    if at.done["phases"]:
        told["--phases"] = steps_of(at.done["phases"])
    if len(told) == 2 and len(set(told.values())) == 2:
        (one, count), (other, others) = told.items()
        raise UsageError(f"{other} has {others} steps in all, and {one} {count}")
    for flag, count in told.items():
        if value is not None and str(value) != str(count):
            raise UsageError(f"--sample_steps {shown(value)} contradicts {flag}, which has {count} steps")
    default = MOST_RCM_STEPS if own_steps(at) == {True} else at.spec.sampling.steps
    return next(iter(told.values()), None) or whole(value, default, "sample_steps", 1, MAX_STEPS)


def check_sigmas(at: Asked, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    allowed = "falling noise levels from at most 1 to above 0, such as 1,0.9375,0.8333,0.625; a 0 may follow"
    sigmas = [number(part, "sigmas", float, allowed, lambda n: 0 <= n <= 1) for part in listed(value)]
    if len(sigmas) > 1 and sigmas[-1] == 0:
        del sigmas[-1]
    falling = all(later < earlier for earlier, later in zip(sigmas, sigmas[1:]))
    if not 1 <= len(sigmas) <= MAX_STEPS or not falling or not sigmas[-1] > 0:
        raise UsageError(f"--sigmas must be {allowed}, not {shown(value)}")
    return tuple(sigmas)


def check_step_list(at: Asked, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if at.get["sigmas"] is not None:
        raise UsageError("--sigmas and --denoising_step_list both list the steps: give one")
    allowed = "falling timesteps from at most 1000 to above 0, such as 1000,750,500,250"
    timesteps = [number(part, "denoising_step_list", float, allowed, lambda n: 0 < n <= 1000) for part in listed(value)]
    falling = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:]))
    if not 1 <= len(timesteps) <= MAX_STEPS or not falling:
        raise UsageError(f"--denoising_step_list must be {allowed}, not {shown(value)}")
    return tuple(timesteps)


def check_boundary(at: Asked, value: Any) -> float | None:
    """--boundary_step_index says the same in another way, as --phases may."""
    if value is None:
        return None
    if "experts" not in at.spec:
        raise UsageError(f"--boundary is for tasks with two experts; {at.spec.name} has one")
    if at.get["boundary_step_index"] is not None:
        raise UsageError("--boundary and --boundary_step_index both say where the low-noise expert begins: give one")
    if at.done["phases"] and first_low_step(at.done["phases"]) is not None:
        raise UsageError("--boundary and --phases both say where the low-noise expert begins: give one")
    return number(value, "boundary", float, "a noise level from 0 to 1", lambda n: 0 <= n <= 1)


def check_boundary_step(at: Asked, value: Any) -> int | None:
    told = first_low_step(at.done["phases"]) if at.done["phases"] else None
    if value is None:
        return told
    if "experts" not in at.spec:
        raise UsageError(f"--boundary_step_index is for tasks with two experts; {at.spec.name} has one")
    index = whole(value, 0, "boundary_step_index", 0, at.done["steps"])
    if told is not None and told != index:
        raise UsageError(f"--boundary_step_index {index} contradicts --phases, whose low-noise expert begins at {told}")
    return index
