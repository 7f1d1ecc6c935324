"""Rotary position embedding over (frame, row, column)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Place = tuple[tuple[int, int, int], tuple[int, int, int]]  # a grid, and the position of its first token


def rope_table(places: tuple[Place, ...], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit complex rotations `[L, head_dim / 2]` (complex64) for the tokens of grids, one after another.

    The head's width d is split into d - 4(d//6), 2(d//6), 2(d//6) for frame, row and column; angles are computed in
    fp64 (RoFormer, arXiv 2104.09864; axes as in the official Wan code).
    """
    return _table(places, head_dim, torch.device(device), torch.is_inference_mode_enabled())


@lru_cache(maxsize=2)  # the same for every step of a run, and for cond and uncond
def _table(places: tuple[Place, ...], head_dim: int, device: torch.device, inference: bool) -> Tensor:
    angle = torch.cat([_angles(grid, origin, head_dim) for grid, origin in places])
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def _angles(grid: tuple[int, int, int], origin: tuple[int, int, int], head_dim: int) -> Tensor:
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (length, first, width) in enumerate(zip(grid, origin, (head_dim - 2 * side, side, side), strict=True)):
        rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        positions = torch.arange(first, first + length, dtype=torch.float64)
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(torch.outer(positions, rate).view(shape).expand(*grid, -1))
    return torch.cat(angles, dim=-1).flatten(0, 2)
