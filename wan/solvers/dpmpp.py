"""DPM-Solver++ 2M, midpoint form (Lu et al., arXiv 2211.01095, algorithm 2), for rectified flow."""

from __future__ import annotations

import torch

from wan.solvers.base import Solver


class DPMPlusPlus2M(Solver):
    """Second order from two predictions; the first step and the last one, to sigma 0, are first order."""

    _previous: torch.Tensor | None = None

    def _advance(self, data: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        target = data
        if self._previous is not None and self.index < self.steps - 1:
            # Extrapolate x_0 half a step ahead in log-SNR. After a start at sigma 1 the step behind is infinite and
            # the weight is 0.
            weight = 0.5 * self._log_snr_step(self.index) / self._log_snr_step(self.index - 1)
            target = data + weight * (data - self._previous)
        self._previous = data
        return self._move(self.index, sample, target)
