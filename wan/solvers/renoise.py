"""The stochastic step of few-step models: to the clean data, and back to the next noise level with fresh noise.

Source: multistep consistency sampling (arXiv 2303.01469, algorithm 1) as DMD2 (arXiv 2405.14867) samples with it; so do
CausVid, FastWan, Self-Forcing and rCM.
"""

from __future__ import annotations

import torch

from wan.solvers.base import Draw, Solver


class Renoise(Solver):
    """(1 - sigma) * x_0 + sigma * noise at the next sigma; x_0 itself in the end.

    `draw` gives the noise of a step, fp32 of the latent's shape; by default it is torch's own.
    """

    draw: Draw = staticmethod(torch.randn)

    def _advance(self, data: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma[self.index + 1]
        return data if sigma == 0 else (1 - sigma) * data + sigma * self.draw(tuple(data.shape)).to(data)
