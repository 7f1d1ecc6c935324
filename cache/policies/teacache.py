"""TeaCache: the change of the time embedding, rescaled by a polynomial, adds up to a threshold.

Source: arXiv 2411.19108 and its official Wan2.1 code. Time embeddings depend on the timestep alone, so the whole plan
is known before the first step. A fitted polynomial is used on the interval of its fit, and where it is not negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wan.cache.context import StepContext
from wan.cache.policy import Embed, Lifecycle, Option, PlannedPolicy, count, numbers, register, threshold

RESCALES = ("linear", "polynomial", "polynomial_projection")


@register
class TeaCache(PlannedPolicy):
    """polynomial: coefficients by expert, highest power first; empty: linear, that is p(x) = x.

    fitted: (least, largest) x of the fit, by expert. signal: "embedding" or "projection" of the time step.
    """

    name = "teacache"
    help = "skip by the change of the time embedding"
    flags = {
        "teacache_thresh": threshold(0.08),
        "teacache_policy": Option("name", "linear", f"rescaling: {', '.join(RESCALES)}; default linear"),
        "teacache_polynomial": numbers("take this polynomial, highest power first, in place of the measured one"),
        "teacache_warmup": count(1, "compute the first N steps of each expert"),
        "teacache_last_steps": count(1, "compute the last N steps of each expert"),
        "teacache_alternating": Option("flag", False, "never skip twice in a row"),
    }

    def __init__(
        self,
        threshold: float,
        lifecycle: Lifecycle,
        polynomial: dict[str, Sequence[float]] | None = None,
        fitted: dict[str, tuple[float, float]] | None = None,
        signal: str = "embedding",
    ):
        super().__init__(threshold, lifecycle)
        self.polynomial, self.fitted, self.signal = polynomial or {}, fitted or {}, signal

    @classmethod
    def make(cls, options: Mapping[str, Any], coefficients: Mapping[str, Any]) -> TeaCache:
        projection = options["teacache_policy"] == "polynomial_projection"
        given, polynomial = options["teacache_polynomial"], coefficients.get("polynomial")
        if given:
            polynomial = dict.fromkeys(("model", "high", "low"), given)
        # The methods of the polynomials compute the first step, and the first five.
        least = 5 if projection else 1 if polynomial else 0
        cap = 1 if options["teacache_alternating"] else options["cache_max_skips"]
        return cls(
            options["teacache_thresh"],
            Lifecycle(max(options["teacache_warmup"], least), options["teacache_last_steps"], cap),
            polynomial,
            coefficients.get("range"),
            "projection" if projection else "embedding",
        )

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        signal = {"polynomial": "embedding", "polynomial_projection": "projection"}.get(options["teacache_policy"])
        return ("teacache", signal, "polynomial") if signal and not options["teacache_polynomial"] else ()

    def distances(self, steps: Sequence[StepContext], embed: Embed | None) -> list[float]:
        import torch

        values = torch.stack([embed(step.timestep)[self.signal].float().flatten() for step in steps])
        changes = (values[1:] - values[:-1]).abs().mean(1) / values[:-1].abs().mean(1)
        return [math.inf, *(self.rescale(change, steps[0].expert) for change in changes.tolist())]

    def rescale(self, change: float, expert: str) -> float:
        """p(change); infinite outside of the fitted range and where the polynomial is negative."""
        coefficients = self.polynomial.get(expert)
        if not coefficients:
            return change
        least, largest = self.fitted.get(expert, (0.0, math.inf))
        value = 0.0
        for coefficient in coefficients:
            value = value * change + coefficient
        return value if least <= change <= largest and value >= 0 else math.inf
