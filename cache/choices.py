"""`--cache auto`: a policy and its settings from a table of what was measured, by model, solver, steps and quality.

    {"format": "cache-choices-1", "models": {NAME: [{
        "solver": NAME, "steps": N, "quality": "high" or "medium",
        "options": {FLAG: value},                                     as the policy takes them
        "compute": of that without a cache, "psnr_db": to the video without one, "clips": N, "source": FILE}]}}

Nothing is guessed: a threshold says little about another model, and not much about another number of steps. Imports no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("data") / "choices.json"
QUALITIES = {"high": 45, "medium": 40}  # -> dB that the mean over the clips reaches
BESIDE = ("cache_device",)  # options that may stand beside --cache auto


def choose(given: Mapping[str, Any], model: str | None, solver: str, steps: int) -> tuple[dict[str, Any], list[str]]:
    """(options of a policy, a line that says what was taken) in place of --cache auto; `given` as it is without it.

    given: options of caches by their flags, none of them None. Raises ValueError, one line, for what does not go
    together and for what nobody has measured.
    """
    given = dict(given)
    asked, quality = given.pop("cache", None), given.pop("cache_quality", None)
    if asked is None:
        if quality is not None:
            raise ValueError("--cache_quality has no effect without --cache auto")
        return given, []
    if asked != "auto":
        raise ValueError(f"unknown --cache {asked!r}; choose one of: auto")
    quality = quality or "medium"
    if quality not in QUALITIES:
        raise ValueError(f"unknown --cache_quality {quality!r}; choose one of: {', '.join(QUALITIES)}")
    if other := next((name for name in given if name not in BESIDE), None):
        raise ValueError(f"--{other} has no effect with --cache auto, which chooses it")
    table = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    asked = (solver, steps, quality)
    found = next((row for row in table.get(model, []) if (row["solver"], row["steps"], row["quality"]) == asked), None)
    if found is None:
        raise ValueError(_unknown(model, solver, steps, table))
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in found["options"].items())
    measured = f"{found['compute']:.0%} of the compute, {found['psnr_db']:.0f} dB, on {found['clips']} clips of {model}"
    return given | found["options"], [f"--cache auto, {quality}: {flags} ({measured})"]


def _unknown(model: str | None, solver: str, steps: int, table: Mapping[str, list[Mapping[str, Any]]]) -> str:
    measured = ((name, row) for name, rows in table.items() for row in rows)
    known = dict.fromkeys(f"{name}, {row['steps']} steps of {row['solver']}" for name, row in measured)
    return (
        f"--cache auto takes what was measured, and nobody has measured {model or 'this model'} at {steps} steps of"
        f" {solver} (known: {'; '.join(known)}); choose a cache yourself, with numbers from python -m wan.calibrate"
    )
