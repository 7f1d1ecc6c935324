"""Euler's method on the straight path; what step-distilled models are sampled with."""

from __future__ import annotations

import torch

from wan.solvers.base import Solver


class Euler(Solver):
    """First order: x + (sigma_next - sigma) * velocity, written as a move towards x_0."""

    def _advance(self, data: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self._move(self.index, sample, data)
