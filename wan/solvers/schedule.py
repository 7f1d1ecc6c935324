"""Noise levels and timesteps of a run, computed in float64 so that timesteps come out as exact integers.

Wan is a rectified flow: x_sigma = (1 - sigma) * x_0 + sigma * noise, and the network is told t = 1000 * sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from wan.errors import UsageError

TIMESTEPS = 1000  # that all models here were trained with
RCM_ANGLES = (1.5, 1.4, 1.0)  # behind the first one, which sigma_max tells
RCM_SIGMA_MAX = 80.0


class Schedule(NamedTuple):
    """``timesteps`` [steps] as the network sees them; ``sigmas`` fp32 [steps + 1], falling to 0. Both on the CPU."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def between(self, start: int, end: int) -> Schedule:
        """Some of its steps, with the noise level that the last of them goes to."""
        return Schedule(self.timesteps[start:end], self.sigmas[start : end + 1])


def shift_sigma(sigma, shift: float):
    """Moves noise levels (a float or an array) towards 1 for shift > 1; 0 and 1 stay (SD3, arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unipc_schedule(steps: int, shift: float) -> Schedule:
    """Evenly spaced from the largest training sigma below 1 (0.999), then shifted: the first timestep is 999."""
    # The training table is fp32, so the start is 0.9990000128746033; a float64 0.999 would move some timesteps by one.
    sigma_max = float(np.float32(1 - 1 / TIMESTEPS))
    return _schedule(shift_sigma(np.linspace(sigma_max, 0, steps + 1)[:-1], shift))


def linear_schedule(steps: int, shift: float) -> Schedule:
    """Evenly spaced from exactly 1, then shifted: the first timestep is 1000."""
    return _schedule(shift_sigma(np.linspace(1, 0, steps + 1)[:-1], shift))


def listed_schedule(step_list: Sequence[float], shift: float) -> Schedule:
    """The steps a distilled model was trained on: each listed t gives sigma = shifted(t / 1000).

    The timesteps are float32 and keep their fraction ([1000, 750, 500, 250] with shift 5 gives 1000, 937.5, 833.33,
    625), because the distilled models (LightX2V) were trained with these values.
    """
    listed = np.asarray(step_list, dtype=np.float64)
    if listed.size == 0 or listed[0] > TIMESTEPS or listed[-1] < 1 or (np.diff(listed) >= 0).any():
        raise UsageError(f"the denoising steps must fall strictly, within {TIMESTEPS} and 1, got {list(step_list)}")
    sigmas = shift_sigma(listed / TIMESTEPS, shift)
    timesteps = torch.from_numpy((sigmas * TIMESTEPS).astype(np.float32))
    return Schedule(timesteps, _with_zero(sigmas))


def sigma_schedule(sigmas: Sequence[float]) -> Schedule:
    """Noise levels as they are given, with no shift; one 0 at the end, which other programs write, is left out.

    The network is told 1000 * sigma, unrounded.
    """
    listed = np.asarray(sigmas, dtype=np.float64)
    if listed.size > 1 and listed[-1] == 0:
        listed = listed[:-1]
    if listed.size == 0 or listed[0] > 1 or not listed[-1] > 0 or (np.diff(listed) >= 0).any():
        raise UsageError(f"the sigmas must fall strictly, from at most 1 to above 0, got {list(sigmas)}")
    return Schedule(torch.from_numpy((listed * TIMESTEPS).astype(np.float32)), _with_zero(listed))


def rcm_schedule(steps: int, sigma_max: float) -> Schedule:
    """The steps of rCM (arXiv 2510.08431) and TurboDiffusion, 1 to 4 of them.

    Their noise is told by an angle, of tangent noise / data: atan(sigma_max), 1.5, 1.4, 1.0. In a rectified flow that
    is sigma = tan / (1 + tan). Source: behaviour of TurboDiffusion's inference, which also rounds 1000 * sigma to bf16.
    """
    angles = (math.atan(sigma_max), *RCM_ANGLES)[:steps]
    if steps > len(angles):
        raise UsageError(f"rcm has 1 to {len(angles)} steps of its own, not {steps}; --sigmas lists others")
    if not sigma_max > 0 or (np.diff(angles) >= 0).any():
        raise UsageError(f"the sigma_max of rcm must be above {math.tan(RCM_ANGLES[0]):.1f}, got {sigma_max:g}")
    return sigma_schedule([math.tan(angle) / (1 + math.tan(angle)) for angle in angles])


def joined(schedules: Sequence[Schedule]) -> Schedule:
    """Schedules one after another: each goes to where the next begins. Raises UsageError where that is no lower."""
    timesteps = torch.cat([one.timesteps for one in schedules])
    sigmas = torch.cat([*(one.sigmas[:-1] for one in schedules), schedules[-1].sigmas[-1:]])
    if len(schedules) > 1 and (sigmas.diff() >= 0).any():
        raise UsageError(f"the noise levels of these solvers do not fall one after another: {sigmas.tolist()}")
    return Schedule(timesteps, sigmas)


def _schedule(sigmas: np.ndarray) -> Schedule:
    # Timesteps are truncated, sigmas are not: the network sees 999 where the solver integrates from 0.9998.
    timesteps = torch.from_numpy((sigmas * TIMESTEPS).astype(np.int64))
    return Schedule(timesteps, _with_zero(sigmas))


def _with_zero(sigmas: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
