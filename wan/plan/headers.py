"""What a weight file holds, by its header alone: names, sizes and types of tensors. What cannot be understood is None,
and the plan goes by the shapes of the task.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from wan.errors import SwanError
from wan.files import open_plain
from wan.weights.source import Source, open_source

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_GGUF_SLOW = "IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S IQ1_M TQ1_0 TQ2_0 MXFP4".split()  # are never kept packed


@dataclass(frozen=True)
class Held:
    """A stored tensor. weights: how many; stored: bytes, with its scales; itemsize: of one, 0 if quantised."""

    name: str
    weights: int
    axes: int
    stored: int
    itemsize: int
    stays_packed: bool = False


def held_in(source: Source) -> list[Held] | None:
    """The tensors of a checkpoint; None for a PyTorch file, as which plans know others."""
    if any(path.suffix in _PICKLED for path in source.paths):
        return None
    return [_held(source, name) for name in source.keys()]


def _held(source: Source, name: str) -> Held:
    info, kind = source.info(name), source.block_type(name)
    weights, axes = math.prod(info.shape), len(info.shape)
    if kind is None:
        return Held(name, weights, axes, weights * info.dtype.itemsize, info.dtype.itemsize)
    rows, columns = info.shape if axes == 2 else (1, weights)
    stays = axes == 2 and name.endswith(".weight") and kind.name not in _GGUF_SLOW
    return Held(name, weights, axes, rows * kind.row_bytes(columns), 0, stays)


def held_at(path: Path) -> list[Held] | None:
    """The tensors of a file; None where it cannot be told from."""
    with contextlib.suppress(SwanError):
        return held_in(open_source(path))
    return None


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with contextlib.suppress(SwanError, OSError), open_plain(path) as file:
        return file.read(4) == b"GGUF"
    return False
