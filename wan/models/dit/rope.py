"""Rotary position embedding over (frame, row, column)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Triple = tuple[int, int, int]  # (frames, rows, columns)
Place = tuple[Triple, Triple, Triple]  # a grid, the position of its first token, and the extent that it stands for


def rope_table(places: tuple[Place, ...], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit complex rotations `[L, head_dim / 2]` (complex64) for the tokens of grids, one after another.

    The tokens of an axis lie evenly between the first and the last position of its extent, at whole positions: what
    falls between two takes the one nearer to 0.

    The head's width d is split into d - 4(d//6), 2(d//6), 2(d//6) for frame, row and column; angles are computed in
    fp64 (RoFormer, arXiv 2104.09864; axes as in the official Wan code).
    """
    return _table(places, head_dim, torch.device(device), torch.is_inference_mode_enabled())


@lru_cache(maxsize=2)  # the same for every step of a run, and for cond and uncond
def _table(places: tuple[Place, ...], head_dim: int, device: torch.device, inference: bool) -> Tensor:
    angle = torch.cat([_angles(*place, head_dim) for place in places])
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def _angles(grid: Triple, origin: Triple, extent: Triple, head_dim: int) -> Tensor:
    side = 2 * (head_dim // 6)
    angles = []
    widths = (head_dim - 2 * side, side, side)
    for axis, (length, first, span, width) in enumerate(zip(grid, origin, extent, widths, strict=True)):
        rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        positions = torch.tensor(np.trunc(np.linspace(first, first + span - 1, length)))
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(torch.outer(positions, rate).view(shape).expand(*grid, -1))
    return torch.cat(angles, dim=-1).flatten(0, 2)
