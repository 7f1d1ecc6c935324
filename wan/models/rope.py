"""Rotary position embedding over (frame, row, column)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit complex rotations `[F*H*W, head_dim / 2]` (complex64) for tokens of a (frames, rows, columns) grid.

    The head's width d is split into d - 4(d//6), 2(d//6), 2(d//6) for frame, row and column; angles are computed in
    fp64 (RoFormer, arXiv 2104.09864; axes as in the official Wan code).
    """
    make = _make if torch.device(device).type == "meta" else _table  # what has no numbers is not kept
    return make(tuple(grid), head_dim, torch.device(device), torch.is_inference_mode_enabled())


def _make(grid: tuple[int, int, int], head_dim: int, device: torch.device, inference: bool) -> Tensor:
    side, angles = 2 * (head_dim // 6), []
    with torch.device("meta" if device.type == "meta" else "cpu"):
        for axis, (length, width) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
            rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            shape = [1, 1, 1, width // 2]
            shape[axis] = length
            angles.append(torch.outer(torch.arange(length, dtype=torch.float64), rate).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


_table = lru_cache(maxsize=2)(_make)  # the same for every step of a run, and for cond and uncond
