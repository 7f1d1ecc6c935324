"""Are numbers finite? NaN is black once it is uint8, so nobody else would notice."""

from __future__ import annotations

import math

from torch import Tensor, maximum

from wan.errors import SwanError


class NotFinite(SwanError):
    """A model made NaN, infinity or what is beyond any picture."""


def largest(x: Tensor) -> float:
    """The largest magnitude in `x`, NaN where there is one. No copy of `x`; waits for the device once."""
    return maximum(-x.min(), x.max()).item()


def is_finite(x: Tensor) -> bool:
    """Whether no number in `x` is NaN or infinite; as `largest`. A tensor on the meta device has none."""
    return x.is_meta or math.isfinite(largest(x))
