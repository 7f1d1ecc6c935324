"""What is sampled: prompt, frames, steps, schedule, guidance."""

from __future__ import annotations

import math
import secrets
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import latent_frames
from wan.errors import UsageError
from wan.options.names import MAX_SEED, MAX_STEPS
from wan.options.values import listed, number, or_default, shown, whole


def check_prompt(spec: EasyDict, prompts: list[str] | None, prompt: str | None) -> str:
    """prompts: those of the clips, of which the first one is told where one is."""
    if prompts and prompt is not None and prompt != prompts[0]:
        raise UsageError("--prompt and --prompts both say what is shown: give one")
    prompt = prompts[0] if prompts else or_default(prompt, spec.get("prompt", ""))
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


def check_seed(value: Any) -> int:
    allowed = f"a whole number from 0 to {MAX_SEED}, or -1 for a random one"
    seed = number(or_default(value, -1), "seed", int, allowed, lambda n: -1 <= n <= MAX_SEED)
    return secrets.randbelow(2**32) if seed == -1 else seed


def check_shift(spec: EasyDict, value: Any, size: str) -> float:
    if value is None:
        at_480p = size in ("832*480", "480*832")
        value = spec.sampling.get("shift_480p", spec.sampling.shift) if at_480p else spec.sampling.shift
    return number(value, "sample_shift", float, "a number above 0", lambda n: 0 < n < math.inf)


def check_guide_scale(spec: EasyDict, value: Any) -> tuple[float, float]:
    value = or_default(value, spec.sampling.guide_scale)
    parts = listed(value)
    if not 1 <= len(parts) <= 2 or (len(parts) == 2 and "experts" not in spec):
        allowed = "one number, or LOW,HIGH" if "experts" in spec else "one number (this task has one expert)"
        raise UsageError(f"--sample_guide_scale must be {allowed}, not {shown(value)}")
    allowed = "a number of at least 0"
    scales = [number(part, "sample_guide_scale", float, allowed, lambda n: 0 <= n < math.inf) for part in parts]
    return scales[0], scales[-1]


def check_step_list(value: Any, steps: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    allowed = "falling timesteps from at most 1000 to above 0, such as 1000,750,500,250"
    timesteps = [number(part, "denoising_step_list", float, allowed, lambda n: 0 < n <= 1000) for part in listed(value)]
    falling = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:]))
    if not 1 <= len(timesteps) <= MAX_STEPS or not falling:
        raise UsageError(f"--denoising_step_list must be {allowed}, not {shown(value)}")
    count = len(timesteps)
    if steps is not None and str(steps) != str(count):
        raise UsageError(f"--sample_steps {shown(steps)} contradicts --denoising_step_list, which has {count} steps")
    return tuple(timesteps)


def check_boundary_step(spec: EasyDict, value: Any, steps: int) -> int | None:
    if value is None:
        return None
    if "experts" not in spec:
        raise UsageError(f"--boundary_step_index is for tasks with two experts; {spec.name} has one")
    return whole(value, 0, "boundary_step_index", 0, steps)
