"""UniPC of order 2 with B(h) = e^h - 1 ("bh2"), predicting x_0 (Zhao et al., arXiv 2302.04867), for rectified flow."""

from __future__ import annotations

import math

import torch

from wan.solvers.base import Solver
from wan.solvers.schedule import Schedule


class UniPC2(Solver):
    """Every step first corrects the sample it arrived at with the new prediction, then predicts the next one.

    The prediction is taken at the uncorrected sample, so the correction costs no extra network call. The order is 1 at
    the first step and at the last, which goes to sigma 0; a correction has the order of the prediction it corrects.
    """

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        self._data: list[torch.Tensor] = []  # x_0 of the last two steps, newest last
        self._corrected: torch.Tensor | None = None  # the sample that the last prediction started from
        self._order = 0  # of the last prediction

    def _advance(self, data: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self._corrected is not None:
            sample = self._correct(data)
        self._order = min(2, self.index + 1, self.steps - self.index)
        target = data
        if self._order == 2:
            weight = 0.5 * self._log_snr_step(self.index) / self._log_snr_step(self.index - 1)
            target = data + weight * (data - self._data[-1])
        self._data = [*self._data[-1:], data]
        self._corrected = sample
        return self._move(self.index, sample, target)

    def _correct(self, data: torch.Tensor) -> torch.Tensor:
        """The last step made again, now that x_0 at its end (``data``) is known."""
        start = self.index - 1
        newest = self._data[-1]
        if self._order == 1:
            return self._move(start, self._corrected, newest + 0.5 * (data - newest))
        h = self._log_snr_step(start)
        ratio = -self._log_snr_step(start - 1) / h  # where the step before began, in units of h; negative
        ahead, behind = _corrector_weights(h, ratio)
        target = newest + behind / ratio * (self._data[-2] - newest) + ahead * (data - newest)
        return self._move(start, self._corrected, target)


def _corrector_weights(h: float, ratio: float) -> tuple[float, float]:
    """Weights of the x_0 differences at the end of the step and at ``ratio`` * h, matching two moments of e^-h.

    Solves [[1, 1], [ratio, 1]] (behind, ahead) = (b_1, b_2) for predicting x_0.
    """
    growth = math.expm1(-h)
    phi_2 = growth / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / growth, 2 * phi_3 / growth
    behind = (b_1 - b_2) / (1 - ratio)
    return b_1 - behind, behind
