"""The chains as kernels in Triton: each reads what it is given once and writes once, in fp32 between.

A program has one token, or some where they are narrow, whole: sums over its width stay in registers. See `wan.kernels`
for where they run.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from wan.kernels import operation
from wan.models.ops.reference import Modulated, Norm, Segments
from wan.models.ops.sliced import Gpu, acting_type

_TILE = 4096  # numbers of a program, where a token has no more


class Triton(Gpu):
    def norm(self, x_BLC: Tensor, norm: Norm, segments: Segments) -> Tensor:
        rows = _rows(segments, x_BLC.device)
        return _norm(x_BLC.contiguous(), *_factors(norm, segments), rows, isinstance(norm, Modulated), norm.eps)

    def gated_add(self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor | None, segments: Segments) -> Tensor:
        if gate_RC is None:
            return super().gated_add(x_BLC, y_BLC, None, segments)
        rows = _rows(segments, x_BLC.device)
        return _gated_add(x_BLC.contiguous(), y_BLC.contiguous(), _from_row(gate_RC, segments), rows)

    def gated_add_norm(
        self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor | None, norm: Norm, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        gate_RC = None if gate_RC is None else _from_row(gate_RC, segments)
        rows, is_modulated = _rows(segments, x_BLC.device), isinstance(norm, Modulated)
        factors = _factors(norm, segments)
        return _gated_add_norm(x_BLC.contiguous(), y_BLC.contiguous(), gate_RC, *factors, rows, is_modulated, norm.eps)

    def norm_rope(self, x_BLC: Tensor, weight_C: Tensor, eps: float, head_dim: int, rope_LD: Tensor | None) -> Tensor:
        rope = None if rope_LD is None else torch.view_as_real(rope_LD).flatten(1)
        return _norm_rope_(x_BLC.contiguous(), weight_C, rope, eps).unflatten(-1, (-1, head_dim))

    def linear_gelu(self, linear: nn.Module, x: Tensor) -> Tensor:
        """By the product's epilogue, whose GELU has the tanh form on CUDA (that of a CPU has not)."""
        is_plain = isinstance(linear, nn.Linear) and linear.weight.dtype == x.dtype and linear.bias is not None
        if not is_plain or acting_type(x.device) != "cuda":
            return super().linear_gelu(linear, x)
        y = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])

    def rms_norm(self, x_BTHWC: Tensor, gamma_C: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        out = x_BTHWC.new_empty(x_BTHWC.shape) if out is None else out
        return _rms_norm_(x_BTHWC.contiguous(), gamma_C, out, silu)


# Modulation: a row for each token


def _rows(segments: Segments, device: torch.device) -> Tensor | None:
    """int32 [N], the row of each token; None: all have that of the first."""
    if len({row for row, _ in segments}) <= 1:
        return None
    return _row_of_each(tuple(segments), device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)  # the same for all blocks and steps of a run
def _row_of_each(segments: tuple[tuple[int, int], ...], device: torch.device, inference: bool) -> Tensor:
    rows, counts = (torch.tensor(numbers) for numbers in zip(*segments, strict=True))
    return rows.int().repeat_interleave(counts).to(device)


def _from_row(values_RC: Tensor, segments: Segments) -> Tensor:
    """All rows where tokens differ, else the one that all have."""
    rows = {row for row, _ in segments}
    return values_RC if len(rows) > 1 else values_RC[min(rows, default=0) :]


def _factors(norm: Norm, segments: Segments) -> tuple[Tensor, Tensor]:
    """What a norm is multiplied with, and what is added: `[R, C]`."""
    if isinstance(norm, Modulated):
        return _from_row(norm.scale_RC, segments), _from_row(norm.shift_RC, segments)
    return norm.weight[None], norm.bias[None]


# Kernels. Offsets are 64 bits wide, for tensors of more than 2^31 numbers.


@triton.jit(do_not_specialize=["count"])
def _residual_norm(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    rows_ptr,
    sum_ptr,
    normed_ptr,
    count,
    gate_stride,
    norm_stride,
    eps,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    IS_GATED: tl.constexpr,
    NORMS: tl.constexpr,
    IS_MODULATED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s = x + gate * y, rounded; LayerNorm of s, scaled and shifted."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_token, is_column = token < count, column < C
    here, at = is_token & is_column, token * C + column
    x = tl.load(x_ptr + at, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
    row = tl.load(rows_ptr + token, mask=is_token, other=0) if HAS_ROWS else 0
    if ADDS:
        y = tl.load(y_ptr + at, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if IS_GATED:
            y *= tl.load(gate_ptr + row * gate_stride + column, mask=is_column, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=here)
        x = rounded.to(tl.float32)
    if NORMS:
        centred = tl.where(is_column, x - tl.sum(x, axis=1, keep_dims=True) / C, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)
        norm_row = row if IS_MODULATED else 0
        scale = tl.load(scale_ptr + norm_row * norm_stride + column, mask=is_column, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + norm_row * norm_stride + column, mask=is_column, other=0.0).to(tl.float32)
        scale = 1.0 + scale if IS_MODULATED else scale
        tl.store(normed_ptr + at, (normed * scale + shift).to(normed_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count", "length"])
def _rms_rope(
    x_ptr,
    weight_ptr,
    rope_ptr,
    count,
    length,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: RMS norm times a weight, then (D > 0) pairs turned by the (cos, sin) of their token's place."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < C
    here, at = (token < count) & is_column, token * C + column
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + eps)
    x *= tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if D > 0:
        turn = tl.load(rope_ptr + token % length * D + column % D, mask=here, other=0.0)
        real, imaginary = tl.split(tl.reshape(x, (TOKENS, BLOCK // 2, 2)))
        cos, sin = tl.split(tl.reshape(turn, (TOKENS, BLOCK // 2, 2)))
        turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
        x = tl.reshape(turned, (TOKENS, BLOCK))
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["positions", "frames"])
def _position_norm(
    x_ptr,
    gamma_ptr,
    out_ptr,
    positions,
    frames,
    clip_stride,
    frame_stride,
    root,
    C: tl.constexpr,
    SILU: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the positions of a frame, into a frame that lies anywhere. root: of C."""
    frame = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < C
    here, at = (position < positions) & is_column, position * C + column
    x = tl.load(x_ptr + frame * positions * C + at, mask=here, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True)), 1e-12)
    y = x / norm * (tl.load(gamma_ptr + column, mask=is_column, other=0.0).to(tl.float32) * root)
    if SILU:
        y *= tl.sigmoid(y)
    start = frame // frames * clip_stride + frame % frames * frame_stride
    tl.store(out_ptr + start + at, y.to(out_ptr.dtype.element_ty), mask=here)


# Launches


def _tile(width: int) -> tuple[dict[str, int], int]:
    """How wide a program is, and how many tokens it has; with the options of its launch."""
    block = triton.next_power_of_2(width)
    tokens = max(1, _TILE // block)
    return {"BLOCK": block, "num_warps": 8 if block > _TILE else 4, "enable_fp_fusion": True}, tokens


def _launch_residual(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    is_modulated: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """x, y: contiguous [..., C]; gate, factors: [R, C], neighbours along C."""
    added = None if y is None else torch.empty_like(x)
    normed = None if factors is None else torch.empty_like(x)
    scale, shift = _lined_up(*factors) if factors else (None, None)
    gate = gate if gate is None or gate.stride(-1) == 1 else gate.contiguous()
    C = x.shape[-1]
    tile, tokens = _tile(C)
    count = x.numel() // C
    if count:
        _residual_norm[(triton.cdiv(count, tokens),)](
            *(x, y, gate, scale, shift, rows, added, normed, count),
            0 if gate is None else gate.stride(0),
            0 if scale is None else scale.stride(0),
            eps,
            C=C,
            ADDS=y is not None,
            IS_GATED=gate is not None,
            NORMS=factors is not None,
            IS_MODULATED=is_modulated,
            HAS_ROWS=rows is not None,
            TOKENS=tokens,
            **tile,
        )
    return added, normed


def _lined_up(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, 1 along C."""
    if scale.stride() == shift.stride() and scale.stride(-1) == 1:
        return scale, shift
    return scale.contiguous(), shift.contiguous()


def _like_x(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _like_x_twice(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@operation(
    "norm(Tensor x, Tensor scale, Tensor shift, Tensor? rows, bool is_modulated, float eps) -> Tensor", empty=_like_x
)
def _norm(x, scale, shift, rows, is_modulated, eps):
    return _launch_residual(x, factors=(scale, shift), rows=rows, is_modulated=is_modulated, eps=eps)[1]


@operation("gated_add(Tensor x, Tensor y, Tensor gate, Tensor? rows) -> Tensor", empty=_like_x)
def _gated_add(x, y, gate, rows):
    return _launch_residual(x, y, gate, rows=rows)[0]


@operation(
    "gated_add_norm(Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor shift, Tensor? rows, bool is_modulated, "
    "float eps) -> (Tensor, Tensor)",
    empty=_like_x_twice,
)
def _gated_add_norm(x, y, gate, scale, shift, rows, is_modulated, eps):
    return _launch_residual(x, y, gate, (scale, shift), rows, is_modulated, eps)


@operation("norm_rope_(Tensor(a!) x, Tensor weight, Tensor? rope, float eps) -> Tensor(a!)", empty=lambda x, *_: x)
def _norm_rope_(x, weight, rope, eps):
    """x: contiguous [B, L, C]; rope: fp32 [L, D], the cosine and sine of each pair."""
    B, L, C = x.shape
    tile, tokens = _tile(C)
    if B * L:
        D = 0 if rope is None else rope.shape[1]
        grid = (triton.cdiv(B * L, tokens),)
        _rms_rope[grid](x, weight, rope, B * L, L, eps, C=C, D=D, TOKENS=tokens, **tile)
    return x


@operation(
    "rms_norm_(Tensor x, Tensor gamma, Tensor(a!) out, bool silu) -> Tensor(a!)", empty=lambda x, gamma, out, silu: out
)
def _rms_norm_(x, gamma, out, silu):
    """x: contiguous [B, T, H, W, C]; out: the same with any strides over B and T."""
    B, T, H, W, C = x.shape
    tile, positions = _tile(C)
    if not out[0, 0].is_contiguous():
        raise ValueError(f"the rows of a frame of {list(out.shape)} do not lie together")
    if x.numel():
        _position_norm[(triton.cdiv(H * W, positions), B * T)](
            *(x, gamma, out, H * W, T, *out.stride()[:2], math.sqrt(C)), C=C, SILU=silu, POSITIONS=positions, **tile
        )
    return out
