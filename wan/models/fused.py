"""Chains of elementwise operations, each as about one pass over the hidden states.

A compiler would fuse these. Without one, a chain runs over one slice of rows at a time, in fp32 and in place, and
rounds once at the end. On a CPU a slice is small enough that all but its first and last step stay in the L2 cache; on a
GPU the slices are large and keep the fp32 copy small beside the hidden states. With autograd, for the training of the
tiny model, the same formulas run on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_counted_for: ContextVar[str | None] = ContextVar("counted_for", default=None)


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """While memory and work are counted: tensors on the meta device go the way of those on `device_type`, and of the
    slices of a chain, which are alike, the first one alone is run."""
    token = _counted_for.set(device_type)
    try:
        yield
    finally:
        _counted_for.reset(token)


def _is_on_cpu(x: Tensor) -> bool:
    return (_counted_for.get() if x.device.type == "meta" else x.device.type) == "cpu"


def slices(x: Tensor, held: int = 1) -> Iterator[slice]:
    """The rows of `x` `[N, ...]` that a chain handles at a time: 512 KiB in fp32 on a CPU, else 64 MiB, of all that it
    holds, which is `held` times as much as a slice."""
    elements = 1 << 17 if _is_on_cpu(x) else 1 << 24
    rows = max(1, elements // max(1, x[0].numel()) // held)
    stop = rows if x.device.type == "meta" and _counted_for.get() else len(x)
    return (slice(start, start + rows) for start in range(0, stop, rows))


def _in_slices(x: Tensor, chain: Callable[..., Tensor], *rowwise: Tensor) -> Tensor:
    """`chain(x, *rowwise)` over the rows of `x` `[N, ...]`, in fp32; in place where autograd is off."""
    if torch.is_grad_enabled():
        return chain(x.float(), *rowwise).to(x.dtype)
    for part in slices(x):
        x[part] = chain(x[part].float(), *(other[part] for other in rowwise))
    return x


def norm_rope(x_BLC: Tensor, weight_C: Tensor, eps: float, head_dim: int, rope_LD: Tensor | None) -> Tensor:
    """RMS norm over the full width, times `weight`, then (with a table) rotary embedding. May overwrite `x`.

    Args: `rope_LD` complex `[L, head_dim / 2]` or None. Returns `[B, L, H, D]`.
    """
    B, L, C = x_BLC.shape
    weight_C = weight_C.float()

    def chain(x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_C
        if rope is None:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, head_dim // 2, 2)))
        return torch.view_as_real(pairs * rope[:, None]).flatten(-3)

    def inplace_chain(x: Tensor, rope: Tensor | None = None) -> Tensor:  # the same on a copy of a slice
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x.mul_(norm.square_().div_(C).add_(eps).rsqrt_()).mul_(weight_C)
        if rope is not None:
            torch.view_as_complex(x.view(x.shape[0], -1, head_dim // 2, 2)).mul_(rope[:, None])
        return x

    is_copied = x_BLC.dtype != torch.float32
    rows = () if rope_LD is None else (rope_LD if B == 1 else rope_LD.repeat(B, 1),)
    use = inplace_chain if is_copied and not torch.is_grad_enabled() else chain
    return _in_slices(x_BLC.flatten(0, 1), use, *rows).view(B, L, -1, head_dim)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form. May overwrite `x`. torch's own bf16 kernel on a CPU is some ten times slower than this."""
    if torch.is_grad_enabled() or not _is_on_cpu(x) or x.dtype == torch.float32:
        return F.gelu(x, approximate="tanh")

    def chain(x: Tensor) -> Tensor:  # x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
        gate = torch.square(x).mul_(0.07135481627159805).add_(1.5957691216057308).mul_(x).sigmoid_()
        return gate.mul_(x)

    return _in_slices(x.view(-1), chain).view_as(x)


def modulated_norm(x_BLC: Tensor, shift_RC: Tensor, scale_RC: Tensor, segments: list[tuple[int, int]], eps: float):
    """LayerNorm without weights, times (1 + scale) plus shift; all in fp32, rounded once.

    `segments` is a list of (row of `shift`/`scale`, number of tokens) along the flattened `B*L` tokens.
    The scale rides on the norm's own weight and bias, so this is one fused kernel a segment.
    """
    weight_RC, bias_RC = 1 + scale_RC.float(), shift_RC.float()
    has_kernel = x_BLC.dtype == torch.float32 or _is_on_cpu(x_BLC)  # GPUs have none for bf16 beside fp32
    norm = _norm if has_kernel else norm_in_slices
    parts = [
        norm(part, weight_RC[row], bias_RC[row], eps)
        for part, row in zip(_split(x_BLC, segments), (row for row, _ in segments), strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(x_BLC)


def _norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_NC, x_NC.shape[-1:], weight_C, bias_C, eps)


def norm_in_slices(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """LayerNorm with fp32 weights in fp32, in the type of `x`, where no kernel takes both."""
    out = torch.empty_like(x_NC)
    for part in slices(x_NC, held=2):  # and its norm
        out[part] = _norm(x_NC[part].float(), weight_C, bias_C, eps)
    return out


def gated_add(x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    """`x + gate * y` in fp32, rounded once; the gate by segment as in `modulated_norm`."""
    parts = [
        _gated(x, y, gate_RC[row].float())
        for x, y, (row, _) in zip(_split(x_BLC, segments), _split(y_BLC, segments), segments, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(x_BLC)


def _gated(x_NC: Tensor, y_NC: Tensor, gate_C: Tensor) -> Tensor:
    if x_NC.dtype == torch.float32:
        return torch.addcmul(x_NC, y_NC, gate_C)
    out = torch.empty_like(x_NC)
    for part in slices(x_NC, held=2):  # of x and of y
        out[part] = x_NC[part].float().addcmul_(y_NC[part].float(), gate_C)
    return out


def _split(x_BLC: Tensor, segments: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return x_BLC.flatten(0, 1).split([count for _, count in segments])
