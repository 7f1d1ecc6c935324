"""Phases: parts of the steps that have guidance, strengths of LoRAs, a solver or an expert of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wan.errors import UsageError
from wan.options.names import LORA_FLAGS, MAX_STEPS, MAX_STRENGTH, SOLVER_NAMES, LoraChoice
from wan.options.schema import Asked
from wan.options.values import choice, number, shown, whole

KEYS = ("steps", "guide", "lora", "solver", "expert")
EXPERTS = ("high", "low")


class Phase(NamedTuple):
    """lora: what the strengths of the LoRAs are multiplied by, one number for all or one for each, in the order of
    `scaled`; guide_scale: (low-noise, high-noise); expert: of two, the one that runs, None: the boundary decides."""

    steps: int
    solver: str
    guide_scale: tuple[float, float]
    lora: tuple[float, ...] = (1.0,)
    expert: str | None = None


def parse_phases(text: str) -> list[dict[str, Any]]:
    """What each phase says, by `KEYS`: `steps=2,guide=3.5,lora=0 | steps=4,guide=1`. Raises UsageError, one line."""
    phases = [_phase(part, index) for index, part in enumerate(text.split("|"), 1)]
    if len(phases) > MAX_STEPS or sum(phase["steps"] for phase in phases) > MAX_STEPS:
        raise UsageError(f"--phases: at most {MAX_STEPS} steps in all")
    named = [phase.get("expert") for phase in phases]
    if any(named) and (None in named or sorted(named) != named):
        raise UsageError("--phases: name the expert of every phase or of none, and high before low")
    return phases


def _phase(text: str, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in KEYS or not value:
            allowed = f"{', '.join(f'{one}=...' for one in KEYS)}, with commas between them and | between phases"
            raise UsageError(f"--phases: phase {index} has {shown(item.strip())}; it may have {allowed}")
        if key in found:
            raise UsageError(f"--phases: phase {index} says {key} twice")
        found[key] = _value(key, value)
    if "steps" not in found:
        raise UsageError(f"--phases: phase {index} does not say how many steps it has: steps=N")
    return found


def _value(key: str, value: str) -> Any:
    flag = f"phases: {key}"
    if key == "steps":
        return whole(value, 1, flag, 1, MAX_STEPS)
    if key == "guide":
        return number(value, flag, float, "a number of at least 0", lambda n: 0 <= n < math.inf)
    if key == "lora":
        allowed = f"numbers from -{MAX_STRENGTH} to {MAX_STRENGTH}, as 0 or, for each LoRA, 1/0"
        return tuple(number(one, flag, float, allowed, lambda n: abs(n) <= MAX_STRENGTH) for one in value.split("/"))
    return choice(value, "", flag, SOLVER_NAMES if key == "solver" else EXPERTS)


def check_phases(at: Asked, text: str | None) -> str | None:
    """The text of --phases. Raises UsageError for one that says nothing, or what the task has not."""
    if text is None:
        return None
    phases = parse_phases(text)
    if any("expert" in phase for phase in phases) and "experts" not in at.spec:
        raise UsageError(f"--phases: expert is for tasks with two experts; {at.spec.name} has one")
    return text.strip()


def make_phases(text: str | None, rest: Phase) -> tuple[Phase, ...]:
    """At least one: without text that is `rest`, whose values hold where a phase says nothing."""
    made = []
    for phase in parse_phases(text) if text else ():
        guide = phase.pop("guide", None)
        made.append(rest._replace(**phase, **({} if guide is None else {"guide_scale": (guide, guide)})))
    return tuple(made) or (rest,)


def steps_of(text: str) -> int:
    """Of all phases together."""
    return sum(phase["steps"] for phase in parse_phases(text))


def first_low_step(text: str) -> int | None:
    """The first step of the low-noise expert; None where the phases leave that to the boundary."""
    phases = parse_phases(text)
    if "expert" not in phases[0]:
        return None
    return sum(phase["steps"] for phase in phases if phase["expert"] == "high")


def scaled(loras: Mapping[str, LoraChoice], factors: tuple[float, ...]) -> dict[str, LoraChoice]:
    """LoRAs by flag with the strengths of a phase. factors: one for all, or one for each: those of --lora, --lora_high
    and --lora_low in this order."""
    each = iter(factors * count_loras(loras) if len(factors) == 1 else factors)
    return {flag: tuple((path, x * next(each)) for path, x in loras[flag]) for flag in LORA_FLAGS if flag in loras}


def count_loras(loras: Mapping[str, LoraChoice]) -> int:
    return sum(map(len, loras.values()))


def check_phase_loras(phases: tuple[Phase, ...], loras: Mapping[str, LoraChoice]) -> None:
    """Raises UsageError where phases have strengths for other LoRAs than there are."""
    count = count_loras(loras)
    for index, phase in enumerate(phases, 1):
        if phase.lora != (1.0,) and not count:
            raise UsageError(f"--phases: phase {index} has a strength for LoRAs, and there is none: give --lora FILE")
        if len(phase.lora) not in (1, count):
            raise UsageError(f"--phases: phase {index} has {len(phase.lora)} strengths for {count} LoRAs")
