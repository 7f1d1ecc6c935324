"""The chains over one slice of rows at a time, in fp32 and in place, with one rounding at the end.

On a CPU a slice is small enough that all but its first and last step stay in the L2 cache; on a GPU slices are large
and keep the fp32 copy small beside the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.models.ops.reference import Reference
from wan.quant.native import norm_silu_native

CPU_ELEMENTS, GPU_ELEMENTS = 1 << 17, 1 << 24  # 512 KiB and 64 MiB in fp32


_counted_for: ContextVar[str | None] = ContextVar("counted_for", default=None)


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """While memory and work are counted: tensors on the meta device go the way of those on `device_type`, and of the
    slices of a chain, and of its frames, which are alike, the first one alone is run."""
    token = _counted_for.set(device_type)
    try:
        yield
    finally:
        _counted_for.reset(token)


def acting_type(device: torch.device) -> str:
    """The type of a device, or of that which the meta device stands for."""
    return (_counted_for.get() or "meta") if device.type == "meta" else device.type


def slices(x: Tensor, elements: int | None = None, copies: int = 1) -> Iterator[slice]:
    """The rows of `x` `[N, ...]` that a chain handles at a time, in so many copies; elements: of a slice, by default
    those of the device."""
    if not len(x):
        return iter(())
    elements = elements or (CPU_ELEMENTS if acting_type(x.device) == "cpu" else GPU_ELEMENTS)
    rows = max(1, elements // max(1, x[0].numel()) // copies)
    stop = min(rows, len(x)) if _is_counted(x) else len(x)
    return (slice(start, start + rows) for start in range(0, stop, rows))


def _is_counted(x: Tensor) -> bool:
    return x.device.type == "meta" and _counted_for.get() is not None


class Gpu(Reference):
    """Where no kernel takes hidden states in 16 bits beside a modulation in fp32."""

    elements = GPU_ELEMENTS

    def _norm_rope(self, x_NC: Tensor, weight_C: Tensor, eps: float, head_dim: int, rope_ND: Tensor | None) -> Tensor:
        C = x_NC.shape[-1]
        for part in self._slices(x_NC):
            rope = None if rope_ND is None else rope_ND[part]
            if x_NC.dtype == torch.float32:
                x_NC[part] = super()._norm_rope(x_NC[part], weight_C, eps, head_dim, rope)
                continue
            x = x_NC[part].float()
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            x.mul_(norm.square_().div_(C).add_(eps).rsqrt_()).mul_(weight_C)
            if rope is not None:
                torch.view_as_complex(x.view(len(x), -1, head_dim // 2, 2)).mul_(rope[:, None])
            x_NC[part] = x
        return x_NC

    def _norm(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        if x_NC.dtype == torch.float32:
            return super()._norm(x_NC, weight_C, bias_C, eps)
        out = torch.empty_like(x_NC)
        for part in self._slices(x_NC, 2):  # a slice and its norm
            out[part] = F.layer_norm(x_NC[part].float(), x_NC.shape[-1:], weight_C, bias_C, eps)
        return out

    def _gated(self, x_NC: Tensor, y_NC: Tensor, gate_C: Tensor) -> Tensor:
        if x_NC.dtype == torch.float32:
            return super()._gated(x_NC, y_NC, gate_C)
        out = torch.empty_like(x_NC)
        for part in self._slices(x_NC, 2):  # a slice of x and of y
            out[part] = x_NC[part].float().addcmul_(y_NC[part].float(), gate_C)
        return out

    def rms_norm(self, x_BTHWC: Tensor, gamma_C: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        out = torch.empty_like(x_BTHWC) if out is None else out
        gamma_C = gamma_C.float() * math.sqrt(x_BTHWC.shape[-1])
        # Frame by frame, because `out` may be a window of a longer buffer whose batch axis is strided.
        for source, target in zip(x_BTHWC.flatten(0, 1).flatten(1, -2), _frames(out), strict=True):
            self._rms(source, gamma_C, target, silu)
            if _is_counted(source):
                break
        return out

    def _rms(self, x_NC: Tensor, gamma_C: Tensor, out_NC: Tensor, silu: bool) -> None:
        for part in self._slices(x_NC):
            y = x_NC[part].to(torch.float32, copy=True)
            norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(1e-12)
            y.mul_(norm.reciprocal_()).mul_(gamma_C)
            out_NC[part].copy_(F.silu(y, inplace=True) if silu else y)

    def _slices(self, x: Tensor, copies: int = 1) -> Iterator[slice]:
        """Rows of `x`; copies: in fp32, at once."""
        return slices(x, self.elements, copies)


class Cpu(Gpu):
    """Here LayerNorm has a kernel for both types; that of the tanh form of GELU is some ten times slower than this."""

    elements = CPU_ELEMENTS

    def gelu(self, x: Tensor) -> Tensor:
        """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), in place."""
        if x.dtype == torch.float32:
            return super().gelu(x)
        flat = x.view(-1)
        for part in self._slices(flat):
            one = flat[part].float()
            gate = torch.square(one).mul_(0.07135481627159805).add_(1.5957691216057308).mul_(one).sigmoid_()
            flat[part] = gate.mul_(one)
        return x

    def _norm(self, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x_NC, x_NC.shape[-1:], weight_C, bias_C, eps)

    def _rms(self, x_NC: Tensor, gamma_C: Tensor, out_NC: Tensor, silu: bool) -> None:
        """In bf16 by a compiled kernel, where there is one: in fp32 the bits are torch's."""
        if not norm_silu_native(x_NC, gamma_C, out_NC, silu):
            super()._rms(x_NC, gamma_C, out_NC, silu)


def _frames(x: Tensor) -> list[Tensor]:
    """`[B, T, H, W, C]` (any stride over B and T) -> B*T views `[H*W, C]`."""
    return [frame.flatten(0, -2) for clip in x.unbind(0) for frame in clip.unbind(0)]
