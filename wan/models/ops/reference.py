"""The chains on whole tensors: in fp32, rounded once to the type of the hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = list[tuple[int, int]]  # (row of the modulation, so many tokens), along the B*L tokens


class Reference:
    """Shape legend: B batch, L tokens, N = B*L of them or some, C width, H heads, D head width, R rows of modulation.

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

    def modulated_norm(
        self, x_BLC: Tensor, shift_RC: Tensor, scale_RC: Tensor, segments: Segments, eps: float
    ) -> Tensor:
        """LayerNorm without weights, times (1 + scale) plus shift: these ride on the norm's own weight and bias, so it
        is one kernel a segment."""
        weight_RC, bias_RC = 1 + scale_RC.float(), shift_RC.float()
        parts = zip(_split(x_BLC, segments), segments, strict=True)
        return _join([self._norm(x, weight_RC[row], bias_RC[row], eps) for x, (row, _) in parts], x_BLC)

    def gated_add(self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor, segments: Segments) -> Tensor:
        """`x + gate * y`; the gate by segment."""
        parts = zip(_split(x_BLC, segments), _split(y_BLC, segments), segments, strict=True)
        return _join([self._gated(x, y, gate_RC[row].float()) for x, y, (row, _) in parts], x_BLC)

    def _norm(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x_NC.float(), x_NC.shape[-1:], weight_C, bias_C, eps).to(x_NC.dtype)

    def _gated(self, x_NC: Tensor, y_NC: Tensor, gate_C: Tensor) -> Tensor:
        return torch.addcmul(x_NC.float(), y_NC.float(), gate_C).to(x_NC.dtype)


def _split(x_BLC: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    return x_BLC.flatten(0, 1).split([count for _, count in segments])


def _join(parts: list[Tensor], like_BLC: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(like_BLC)
