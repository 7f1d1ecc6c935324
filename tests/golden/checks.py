"""Comparing a result with a recorded one."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Check:
    """One compared value. ``error`` is the largest absolute difference, ``relative`` that over the largest expected."""

    label: str
    error: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for nan

    @property
    def badness(self) -> float:
        """Orders checks from harmless to worst."""
        if not self.ok:
            return float("inf") if self.error != self.error else 1e9 + self.error
        return self.error / self.tolerance if self.tolerance else 0.0


def close(label: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Check:
    """Numbers, within ``tolerance``. A wrong shape is an error of infinity."""
    if actual.shape != expected.shape:
        return Check(f"{label}: shape {list(actual.shape)}, not {list(expected.shape)}", float("inf"), 0.0, tolerance)
    if not expected.numel():
        return Check(label, 0.0, 0.0, tolerance)
    expected = expected.double()
    error = (actual.double() - expected).abs().max().item()
    return Check(label, error, error / max(expected.abs().max().item(), 1e-12), tolerance)


def exact(label: str, actual, expected) -> Check:
    """Anything with ==, and no tolerance: integers, shapes, strings, names. Tensors are compared as numbers."""
    if isinstance(expected, torch.Tensor):
        return close(label, torch.as_tensor(actual), expected, 0.0)
    if actual == expected:
        return Check(label, 0.0, 0.0, 0.0)
    return Check(f"{label}: {actual!r}, not {expected!r}", float("inf"), 0.0, 0.0)
