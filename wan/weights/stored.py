"""A quantised matrix in a file: codes, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.schemes import Scheme, scale_values
from wan.weights.source import Source

ACTIVATIONS = ("input_scale", "scale_input")  # last parts of names that say nothing of the weights


@dataclass(frozen=True)
class Stored:
    """shape: of the matrix; hidden: names of what lies beside its codes, which are tensors of no model."""

    scheme: Scheme
    shape: tuple[int, int]
    hidden: tuple[str, ...]

    def pack(self, source: Source, name: str, first: int, last: int) -> Tensor:
        """Some rows of the matrix `name`: uint8 [rows, bytes a row], see `pack_rows`. Raises SwanError for scales that
        no writer leaves."""
        raise NotImplementedError


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_finite(source: Source, name: str, scales: Tensor) -> Tensor:
    """`scales`, which tensor `name` holds."""
    if not scale_values(scales).isfinite().all():
        raise SwanError(f"{source.describe()}: tensor {name} holds infinite or NaN numbers: the file is damaged")
    return scales
