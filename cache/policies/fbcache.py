"""FBCache: the first block runs; where its result has changed little since the last computed step, the rest is skipped.

Source: ParaAttention's first-block cache (github.com/chengzeyi/ParaAttention).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from wan.cache.policy import Lifecycle, Option, Policy, Sums, count, ratio, register, threshold

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("hidden_rel_l1", "residual_rel_l1", "hidden_rel_l2")


@register
class FBCache(Policy):
    """measure: one of METRICS, of the hidden states after the first block or of what the block added to them.

    downsample: every so many tokens are looked at. ema: how much of the last metric stays in the next one, 0..1.
    """

    name = "fbcache"
    help = "skip by the change after the first block"
    flags = {
        "fb_thresh": threshold(0.08),
        "fb_metric": Option(
            "name", METRICS[0], f"what is measured: {', '.join(METRICS)}; default {METRICS[0]}", ", ".join(METRICS)
        ),
        "fb_downsample": count(1, "look at every Nth token", 1),
        "fb_ema": Option("number", 0.0, "smoothing; default 0", "from 0 to below 1", lambda n: 0 <= n < 1),
        "fb_warmup": count(1, "compute the first N steps of each expert"),
        "fb_last_steps": count(1, "compute the last N steps of each expert"),
        "fb_cfg_sep_diff": Option("bool", True, "uncond measures its own change, and obeys cond; default true"),
    }
    probe_blocks = 1

    def __init__(
        self,
        threshold: float,
        lifecycle: Lifecycle,
        measure: str = "hidden_rel_l1",
        downsample: int = 1,
        ema: float = 0.0,
    ):
        super().__init__(threshold, lifecycle)
        self.measure, self.downsample, self.ema = measure, downsample, ema

    @classmethod
    def make(cls, options: Mapping[str, Any], coefficients: Mapping[str, Any]) -> FBCache:
        life = Lifecycle(options["fb_warmup"], options["fb_last_steps"], options["cache_max_skips"])
        return cls(options["fb_thresh"], life, options["fb_metric"], options["fb_downsample"], options["fb_ema"])

    def _signal(self, before: Tensor, probe: Tensor, tokens: slice) -> Tensor:
        """What is measured, of every `downsample`-th token: those with the numbers `tokens` among these."""
        tokens = slice(tokens.start * self.downsample, tokens.stop * self.downsample, self.downsample)
        return probe[:, tokens] - before[:, tokens] if self.measure == "residual_rel_l1" else probe[:, tokens]

    def sums(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> Sums | None:
        from wan.cache.sums import read, slices, total

        if getattr(memory, "reference", None) is None:
            return None
        parts = (self._signal(before, probe, part) - memory.reference[:, part] for part in slices(memory.reference))
        change = total(parts, squared=self.measure == "hidden_rel_l2")
        return read(change, memory.size)

    def metric(self, memory: SimpleNamespace, index: int, sums: Sums) -> float:
        value = ratio(*sums)
        if self.measure == "hidden_rel_l2" and math.isfinite(value):
            value = math.sqrt(value)
        last = getattr(memory, "last", None)
        if self.ema and last is not None and math.isfinite(last) and math.isfinite(value):
            value = self.ema * last + (1 - self.ema) * value
        memory.last = value
        return value

    def computing(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> None:
        from wan.cache.sums import slices, total

        memory.reference = None
        signal = self._signal(before, probe, slice(0, probe.shape[1]))
        memory.reference = signal.clone() if self.downsample > 1 else signal  # a view would keep the whole probe
        parts = (signal[:, part].clone() for part in slices(signal))
        memory.size = total(parts, squared=self.measure == "hidden_rel_l2")
