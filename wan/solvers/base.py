"""What the solvers share: the schedule, the step counter, and the exponential-integrator step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from wan.solvers.schedule import Schedule

Draw = Callable[[tuple[int, ...]], torch.Tensor]  # noise of a shape, fp32


class Solver:
    """Integrates the flow from noise to data, one ``step`` per network prediction.

    timesteps: [steps] on the CPU, int64 (float32 for an explicit step list)
    sigmas:    fp32 [steps + 1] on the CPU, the last one 0
    index:     how many steps are done
    first:     how many steps of the schedule are left out, and none of these
    noise_scale: what noise is multiplied by before the first step

    The counter is the solver's own and always starts at 0. The reference looks its first index up by timestep; where
    the first two timesteps coincide (UniPC, shift 12, 100 steps) that lookup answers 1, and the reference skips a sigma
    and then fails on its last step, so there is no result to reproduce.
    """

    first = 0
    noise_scale = 1.0

    def __init__(self, schedule: Schedule):
        self.timesteps, self.sigmas = schedule
        self.index = 0
        # Coefficients are Python floats of the fp32 sigmas: float64 precision, and no read from the device per step.
        self._sigma = self.sigmas.tolist()
        self._log_snr = [_log_snr(sigma) for sigma in self._sigma]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @torch.no_grad()
    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample at the next sigma, fp32, from the velocity predicted at the present one.

        Any shape, any dtype, any device; both tensors alike. IndexError after the last step.
        """
        if self.index >= self.steps:
            raise IndexError(f"all {self.steps} steps of this solver are done")
        sample = sample.float()
        data = sample - self._sigma[self.index] * velocity.float()  # the x_0 this velocity points at
        result = self._advance(data, sample)
        self.index += 1
        return result

    def _advance(self, data: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _move(self, start: int, sample: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """From sigma[start] to sigma[start + 1] with x_0 held at ``data``; exact on the straight path, exact at 0.

        DPM-Solver++ writes the weight of x_0 as alpha_t * (1 - e^-h). With alpha = 1 - sigma this is one minus the
        ratio of the sigmas, which has no logarithm and so needs no care at sigma 0 and 1.
        """
        ratio = self._sigma[start + 1] / self._sigma[start]
        return ratio * sample + (1 - ratio) * data

    def _log_snr_step(self, start: int) -> float:
        """h > 0: the growth of log(alpha / sigma) from sigma[start] to the next; infinite from 1 and to 0."""
        return self._log_snr[start + 1] - self._log_snr[start]


def _log_snr(sigma: float) -> float:
    if sigma <= 0:
        return math.inf
    if sigma >= 1:
        return -math.inf
    return math.log1p(-sigma) - math.log(sigma)
