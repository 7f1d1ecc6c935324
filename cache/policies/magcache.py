"""MagCache: how fast the residual's magnitude falls, measured once per model, bounds the error of reusing it.

Source: arXiv 2506.09045 and its official Wan code: gamma_t is the mean over tokens of |r_t| / |r_{t-1}|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wan.cache.context import StepContext
from wan.cache.policy import Embed, Lifecycle, Option, PlannedPolicy, below, count, numbers, register, threshold


@register
class MagCache(PlannedPolicy):
    """ratios: gamma by expert, of the steps of the calibration; other step counts take the nearest. Under "run": of the
    steps of the whole run, whichever expert makes them.

    retention: the first fraction of an expert's steps, which is computed. The lifecycle's max_skips is K.
    """

    name = "magcache"
    help = "skip by the measured fall of the residual's magnitude"
    idle = ("cache_max_skips",)  # K
    flags = {
        "mag_thresh": threshold(0.12),
        "mag_K": count(4, "at most N skips in a row", 1),
        "mag_retention": Option(
            "number",
            0.2,
            "fraction of each expert's steps to compute first; default 0.2",
            "from 0 to 1",
            lambda n: 0 <= n <= 1,
        ),
        "mag_ratios": numbers(
            "take these ratios, one for each step of the run, in place of the measured ones", lambda n: 0 <= n < 1e6
        ),
    }

    def __init__(
        self, threshold: float, lifecycle: Lifecycle, ratios: dict[str, Sequence[float]], retention: float = 0.2
    ):
        super().__init__(threshold, lifecycle)
        self.ratios, self.retention = ratios, retention

    @classmethod
    def make(cls, options: Mapping[str, Any], coefficients: Mapping[str, Any]) -> MagCache:
        life = Lifecycle(warmup=1, last_steps=0, max_skips=options["mag_K"])
        ratios = {"run": options["mag_ratios"]} if options["mag_ratios"] else coefficients["ratios"]
        return cls(options["mag_thresh"], life, ratios, options["mag_retention"])

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if options["mag_ratios"] else ("magcache", "ratios")

    def life(self, count: int) -> Lifecycle:
        warmup = max(self.lifecycle.warmup, int(count * self.retention))
        return Lifecycle(warmup, self.lifecycle.last_steps, self.lifecycle.max_skips)

    def begin(self, steps: Sequence[StepContext], embed: Embed | None) -> None:
        life, count = self.life(len(steps)), len(steps)
        self.metrics, self.plan = [], []
        gamma, error, in_a_row = 1.0, 0.0, 0
        for index, ratio in enumerate(self._ratios(steps)):
            if life.phase(index, count) != "warm-up":
                gamma *= ratio
                error += abs(1 - gamma)
            self.metrics.append(error)
            is_main = life.phase(index, count) == "main"
            skip = is_main and below(error, self.threshold) and in_a_row < life.max_skips
            self.plan.append(skip)
            gamma, error, in_a_row = (gamma, error, in_a_row + 1) if skip else (1.0, 0.0, 0)

    def _ratios(self, steps: Sequence[StepContext]) -> list[float]:
        if "run" in self.ratios:
            of_run = nearest(self.ratios["run"], steps[0].steps)
            return [of_run[one.step] for one in steps]
        return nearest(self.ratios[steps[0].expert], len(steps))


def nearest(values: Sequence[float], count: int) -> list[float]:
    """`values` resampled to `count`, each the nearest of the old; the first, which compares with no step, is 1."""
    if count == 1:
        return [1.0]
    picked = [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]
    return [1.0, *picked[1:]]
