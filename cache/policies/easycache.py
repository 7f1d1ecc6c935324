"""EasyCache: from the last two computed steps, how far the prediction moves when its input does.

Source: arXiv 2507.02860 and its official Wan2.1 code. Works on latents, so it needs no look into the network:
k = |v_i - v_j| / |x_i - x_j|; E adds k |x_n - x_{n-1}| / |v_i|; a skipped prediction is x_n + (v_i - x_i).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from wan.cache.policy import Lifecycle, Policy, Sums, ratio, register, threshold

if TYPE_CHECKING:
    from torch import Tensor

WARMUP_FRACTION = 0.2  # 10 of 50 steps, as published


@register
class EasyCache(Policy):
    name = "easycache"
    help = "skip by how far the prediction moves with its input"
    flags = {"easy_thresh": threshold(0.05)}
    level = "prediction"

    @classmethod
    def make(cls, options: Mapping[str, Any], coefficients: Mapping[str, Any]) -> EasyCache:
        return cls(options["easy_thresh"], Lifecycle(max_skips=options["cache_max_skips"]))

    def life(self, count: int) -> Lifecycle:
        return Lifecycle(max(2, round(count * WARMUP_FRACTION)), self.lifecycle.last_steps, self.lifecycle.max_skips)

    def sums(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor) -> Sums | None:
        previous, memory.previous = getattr(memory, "previous", None), before.clone()
        if previous is None or getattr(memory, "rate", None) is None:
            return None
        step = (before - previous).abs().mean().item()
        return memory.rate * step, memory.size

    def metric(self, memory: SimpleNamespace, index: int, sums: Sums) -> float:
        memory.error = getattr(memory, "error", 0.0) + ratio(*sums)
        return memory.error

    def computed(self, memory: SimpleNamespace, index: int, before: Tensor, probe: Tensor, after: Tensor) -> None:
        last = getattr(memory, "computed", None)
        if last is not None:
            moved = (before - last[0]).abs().mean().item()
            memory.rate = (after - last[1]).abs().mean().item() / moved if moved else None
        memory.size = after.abs().mean().item()
        memory.computed, memory.error = (before.clone(), after.clone()), 0.0
