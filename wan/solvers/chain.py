"""Solvers one after another, each for some steps of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from wan.solvers.base import Draw, Solver
from wan.solvers.schedule import Schedule


class Method(NamedTuple):
    """update: the rule of a step; is_rcm: its own steps are rCM's, and noise is scaled to the first of them."""

    update: type[Solver]
    is_rcm: bool = False


class Chain(Solver):
    """Its parts in turn. Each begins without history, and takes the noise level that it ends at for its last."""

    def __init__(self, schedule: Schedule, parts: Sequence[Solver]):
        super().__init__(schedule)
        self._parts = list(parts)

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self.index >= self.steps:
            raise IndexError(f"all {self.steps} steps of this solver are done")
        part = next(one for one in self._parts if one.index < one.steps)
        self.index += 1
        return part.step(velocity, sample)


def chain(parts: Sequence[tuple[Method, int]], schedule: Schedule, first: int = 0, draw: Draw | None = None) -> Solver:
    """The solver of a schedule from step `first` on. parts: (method, steps), the steps of all of it together.

    Where there is one part, that is its own solver. draw: see `Renoise`.
    """
    solvers, start = [], 0
    for method, count in parts:
        end = start + count
        if end > first:
            solvers.append(method.update(schedule.between(max(first, start), end)))
            if draw is not None:
                solvers[-1].draw = draw
        start = end
    rest = schedule.between(first, start)
    solver = solvers[0] if len(solvers) == 1 else Chain(rest, solvers)
    solver.first = first
    if parts[0][0].is_rcm:
        solver.noise_scale = rest.sigmas[0].item()
    return solver
