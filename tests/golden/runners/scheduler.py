"""kind "scheduler": a solver driven by a made-up velocity, 0.7 * sample * cos(k) + noise."""

from __future__ import annotations

import math
import re

from tests.golden.cases import Case
from tests.golden.checks import Check, close, exact
from wan.solvers import SOLVERS, make_solver

SAMPLE_TOLERANCE = 5e-5
SIGMA_TOLERANCE = 1e-6


def matches(case: Case) -> bool:
    return case.meta.get("kind") == "scheduler" and case.meta.get("solver") in SOLVERS


def run(case: Case) -> list[Check]:
    checks = []
    for key in case.tags("outputs/"):
        found = re.fullmatch(r"(shift(.+)\.steps(\d+))\.samples", key)
        if found:
            checks += _run_one(case, found[1], shift=float(found[2]), steps=int(found[3]))
    return checks


def _run_one(case: Case, tag: str, *, shift: float, steps: int) -> list[Check]:
    expected = case.group("outputs")
    noise, sample = case.tensors["inputs/noise"], case.tensors["inputs/sample"]
    solver = make_solver(case.meta["solver"], steps=steps, shift=shift)
    checks = [
        exact(f"{tag}.timesteps", solver.timesteps, expected[f"{tag}.timesteps"]),
        close(f"{tag}.sigmas", solver.sigmas, expected[f"{tag}.sigmas"], SIGMA_TOLERANCE),
    ]
    for step in range(steps):
        sample = solver.step(0.7 * sample * math.cos(step) + noise, sample)
        checks.append(
            close(f"{tag}.samples[{step + 1}]", sample, expected[f"{tag}.samples"][step + 1], SAMPLE_TOLERANCE)
        )
    return checks
