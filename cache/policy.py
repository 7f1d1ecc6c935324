"""What decides when the transformer is skipped. A new policy is one file in cache/policies with one registered class,
its flags included.

A policy says *when*, by a metric that is compared with its threshold; a predictor says *how* a skipped result is
formed; the manager owns phases, storage, caps, failsafes and telemetry. Metrics are accumulated or instant as the
method has it. Imports no torch, so that `--help` knows all flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from wan.cache.context import StepContext

if TYPE_CHECKING:
    from torch import Tensor

# A time step's embedding, and its projection (the modulation), as the network computes them; for `embed(timestep)`.
Embed = Callable[[float], "Mapping[str, Tensor]"]
Sums = tuple[float, float]  # numerator and denominator; summed over ranks, then divided


@dataclass(frozen=True)
class Option:
    """A flag. kind: "flag", "bool", "number", "numbers", "whole", "name" or "file"; allowed: in words, of a name the
    choices; fits: of a number, of each of several."""

    kind: str
    default: Any
    help: str
    allowed: str = ""
    fits: Callable[[Any], bool] = lambda value: True


def count(default: int, help: str, least: int = 0) -> Option:
    return Option(
        "whole", default, f"{help}; default {default}", f"a whole number of at least {least}", lambda n: n >= least
    )


def threshold(default: float) -> Option:
    return Option(
        "number", default, f"how much change is let pass; 0: none; default {default}", "a number", math.isfinite
    )


def numbers(help: str, fits: Callable[[Any], bool] = math.isfinite) -> Option:
    return Option("numbers", None, help, "numbers with commas between them", fits)


@dataclass(frozen=True)
class Lifecycle:
    """Computed whatever the metric says: the first `warmup` (at least one) and the last `last_steps` cond steps of each
    expert.

    max_skips: at most so many skips in a row.
    """

    warmup: int = 1
    last_steps: int = 1
    max_skips: int = 5

    def phase(self, index: int, count: int) -> str:
        """ "warm-up", "main" or "last" for step `index` of the `count` steps of an expert."""
        if index < max(1, self.warmup):
            return "warm-up"
        return "last" if index >= count - self.last_steps else "main"


class Policy:
    """Base of all policies.

    level: "blocks" (around the block loop) or "prediction" (around a whole prediction, in the sampler).
    probe_blocks: blocks that run before the decision. name: also of the flag that turns it on; flags: of its settings;
    idle: common flags that it has no use for.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    flags: ClassVar[Mapping[str, Option]] = {}
    idle: ClassVar[tuple[str, ...]] = ()
    level: ClassVar[str] = "blocks"
    probe_blocks: ClassVar[int] = 0

    def __init__(self, threshold: float, lifecycle: Lifecycle):
        self.threshold, self.lifecycle = threshold, lifecycle

    @classmethod
    def make(cls, options: Mapping[str, Any], coefficients: Mapping[str, Any]) -> Policy:
        """From checked options and the coefficients that it said it needs."""
        raise NotImplementedError

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Where the coefficients lie in those of a model (keys), and under which key by expert; () for none."""
        return ()

    def life(self, count: int) -> Lifecycle:
        """The lifecycle in an expert of `count` steps."""
        return self.lifecycle

    def begin(self, steps: Sequence[StepContext], embed: Embed | None) -> None:
        """The first step of an expert; `steps` are all of its steps in this run."""

    def sums(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> Sums | None:
        """Numerator and denominator of what is measured now; None: there is no reference yet.

        memory: this policy's own, for one expert and branch, empty at first. before, probe: what goes into the block
        loop and what comes out of the probe blocks; for level "prediction" both are the latent.
        """
        raise NotImplementedError

    def metric(self, memory: SimpleNamespace, index: int, sums: Sums) -> float:
        """What is compared with the threshold, from the sums over all ranks."""
        return ratio(*sums)

    def computing(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> None:
        """The network is about to run. Tensors that are replaced here do not lie in memory while it runs."""

    def computed(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor, after: Tensor) -> None:
        """The network was run; `after` came out."""

    def skipped(self, memory: SimpleNamespace, index: int) -> None:
        """The network was not run."""


class PlannedPolicy(Policy):
    """Distances are known before the first step of an expert, so all ranks and branches agree without exchange."""

    def distances(self, steps: Sequence[StepContext], embed: Embed | None) -> list[float]:
        """One for each step; infinite where a step must be computed."""
        raise NotImplementedError

    def begin(self, steps: Sequence[StepContext], embed: Embed | None) -> None:
        life = self.life(len(steps))
        self.metrics: list[float] = []
        self.plan: list[bool] = []  # True: skip
        total, in_a_row = 0.0, 0
        for index, distance in enumerate(self.distances(steps, embed)):
            total += distance
            self.metrics.append(total)
            is_main = life.phase(index, len(steps)) == "main"
            skip = is_main and below(total, self.threshold) and in_a_row < life.max_skips
            self.plan.append(skip)
            total, in_a_row = (total, in_a_row + 1) if skip else (0.0, 0)

    def sums(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> Sums | None:
        return self.metrics[index], 1.0

    def metric(self, memory: SimpleNamespace, index: int, sums: Sums) -> float:
        return self.metrics[index]


def below(metric: float, threshold: float) -> bool:
    """Whether to skip. Never for a threshold of 0 or less, nor for a metric that is negative or not finite."""
    return threshold > 0 and 0 <= metric < threshold


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator; NaN for 0 / 0 and what is not finite."""
    if not math.isfinite(numerator) or not math.isfinite(denominator):
        return math.nan
    if denominator == 0:
        return math.nan if numerator == 0 else math.inf
    return numerator / denominator


POLICIES: dict[str, type[Policy]] = {}  # by priority: policies/__init__.py


def register(cls: type[Policy]) -> type[Policy]:
    POLICIES[cls.name] = cls
    return cls
