"""The chains on whole tensors: in fp32, rounded once to the type of the hidden states."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Segments = list[tuple[int, int]]  # (row of the modulation, so many tokens), along the B*L tokens


class Modulated(NamedTuple):
    """LayerNorm without weights, times (1 + scale) plus shift, of any type; a row of both for each segment."""

    shift_RC: Tensor
    scale_RC: Tensor
    eps: float


Norm = Modulated | nn.LayerNorm  # the latter with weights of its own, the same for all tokens


class Reference:
    """Shape legend: B batch, L tokens, N = B*L of them or some, C width, H heads, D head width, R rows of modulation;
    of pictures: T frames, H rows, W columns.

    What is given as `x` may be overwritten by `norm_rope` and `gelu`.
    """

    def norm_rope(self, x_BLC: Tensor, weight_C: Tensor, eps: float, head_dim: int, rope_LD: Tensor | None) -> Tensor:
        """RMS norm over the full width, times `weight`, then (with a table) rotary embedding: `[B, L, H, D]`.

        rope: complex `[L, D / 2]` or None
        """
        B, L, _ = x_BLC.shape
        rope_ND = rope_LD if B == 1 or rope_LD is None else rope_LD.repeat(B, 1)
        y_NC = self._norm_rope(x_BLC.flatten(0, 1), weight_C.float(), eps, head_dim, rope_ND)
        return y_NC.view(B, L, -1, head_dim)

    def _norm_rope(self, x_NC: Tensor, weight_C: Tensor, eps: float, head_dim: int, rope_ND: Tensor | None) -> Tensor:
        x = x_NC.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_C
        if rope_ND is not None:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, head_dim // 2, 2)))
            x = torch.view_as_real(pairs * rope_ND[:, None]).flatten(-3)
        return x.to(x_NC.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""
        return F.gelu(x, approximate="tanh")

    def linear_gelu(self, linear: nn.Module, x: Tensor) -> Tensor:
        """`gelu(linear(x))`."""
        return self.gelu(linear(x))

    def norm(self, x_BLC: Tensor, norm: Norm, segments: Segments) -> Tensor:
        """Modulation rides on LayerNorm's own weight and bias, so it is one kernel a segment."""
        if not isinstance(norm, Modulated):
            return norm(x_BLC)
        weight_RC, bias_RC = 1 + norm.scale_RC.float(), norm.shift_RC.float()
        parts = zip(_split(x_BLC, segments), segments, strict=True)
        return _join([self._norm(x, weight_RC[row], bias_RC[row], norm.eps) for x, (row, _) in parts], x_BLC)

    def gated_add(self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor | None, segments: Segments) -> Tensor:
        """`x + gate * y`; the gate by segment, None: 1."""
        if gate_RC is None:
            return x_BLC + y_BLC
        parts = zip(_split(x_BLC, segments), _split(y_BLC, segments), segments, strict=True)
        return _join([self._gated(x, y, gate_RC[row].float()) for x, y, (row, _) in parts], x_BLC)

    def gated_add_norm(
        self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor | None, norm: Norm, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """`gated_add`, and the norm of its result, rounded as it is: both."""
        x_BLC = self.gated_add(x_BLC, y_BLC, gate_RC, segments)
        return x_BLC, self.norm(x_BLC, norm, segments)

    def rms_norm(self, x_BTHWC: Tensor, gamma_C: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        """`x / max(|x|_2, 1e-12) * sqrt(C) * gamma` at each position, perhaps SiLU of it; into `out`, where given."""
        x = x_BTHWC.float()
        y = x * (math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)) * gamma_C.float()
        y = (F.silu(y) if silu else y).to(x_BTHWC.dtype)
        return y if out is None else out.copy_(y)

    def _norm(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x_NC.float(), x_NC.shape[-1:], weight_C, bias_C, eps).to(x_NC.dtype)

    def _gated(self, x_NC: Tensor, y_NC: Tensor, gate_C: Tensor) -> Tensor:
        return torch.addcmul(x_NC.float(), y_NC.float(), gate_C).to(x_NC.dtype)


def _split(x_BLC: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    return x_BLC.flatten(0, 1).split([count for _, count in segments])


def _join(parts: list[Tensor], like_BLC: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(like_BLC)
