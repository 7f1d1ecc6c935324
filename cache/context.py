"""Where in a run a prediction stands. Passed explicitly, so that nothing has to count calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepContext:
    """One network prediction of a sampling run.

    step:     0-based index of the solver step, of ``steps``
    timestep: what the network is told, 0..1000
    sigma:    noise level, 0..1
    expert:   name of the network that runs ("model", or "high" / "low" for a pair)
    branch:   "cond" or "uncond"
    run:      distinguishes runs that share one cache (the clips of a long video)
    apart:    the two branches of this step are computed at once, by different ranks
    """

    step: int
    steps: int
    timestep: float
    sigma: float
    expert: str = "model"
    branch: str = "cond"
    run: int = 0
    apart: bool = False
