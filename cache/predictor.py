"""How a skipped result is formed from residuals of computed steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Residuals:
    """The residuals of one expert and branch, and their extrapolation in sigma.

    order "zero": the last one. "first": on the line through the last two, in physical time (arXiv 2503.06923, whose
    order 1 in Newton form is exact for uneven steps). "damped": along that line at first, and by one interval of it in
    all, as forecasts by a damped trend (Gardner and McKenzie 1985): t intervals ahead, by 1 - exp(-t).
    device: where they are kept; None: where they were made.
    """

    def __init__(self, order: str = "zero", device: torch.device | str | None = None):
        self.order, self.device = order, device
        self._kept: list[tuple[float, Tensor]] = []  # (sigma, residual), the newest last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept, the newest last."""
        return [residual for _, residual in self._kept]

    def make_room(self) -> None:
        """Free what the next residual will replace, before the network runs that makes it."""
        self._kept = [] if self.order == "zero" else self._kept[-1:]

    def add(self, sigma: float, residual: Tensor) -> None:
        self.make_room()
        self._kept.append((sigma, residual.to(self.device) if self.device else residual))

    def predict(self, sigma: float, like: Tensor) -> Tensor:
        """The residual at `sigma`, on the device of `like`."""
        newest, last = self._kept[-1]
        last = last.to(like.device)
        if len(self._kept) < 2 or self._kept[0][0] == newest:
            return last
        older, first = self._kept[0]
        weight = (sigma - older) / (newest - older)  # 1: the last one, 2: one interval ahead
        if self.order == "damped":
            weight = 2 - math.exp(1 - weight)
        return torch.lerp(first.to(like.device), last, weight)

    def to(self, device: torch.device | str) -> None:
        if self.device is None:
            self._kept = [(sigma, residual.to(device)) for sigma, residual in self._kept]

    def clear(self) -> None:
        self._kept.clear()
