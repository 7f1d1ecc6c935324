"""Dequantisation, and the rounding of activations, as kernels in Triton: see `wan.kernels` for where they run.

Every number is computed in fp32, in the order of `blocks.py` and `schemes.py`, whose bits these give, for no product is
fused with the sum behind it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels import operation
from wan.quant.blocks import IQ4_VALUES
from wan.quant.ggml import BY_NAME
from wan.quant.rounding import LARGEST

_TILE = 2048  # weights of a program


# Parts of a block. b: where blocks begin [n, 1, 1]; group [1, G, 1] and weight [1, G, W]: numbers within the block.


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _signed(byte):
    return (byte ^ 128) - 128


@triton.jit
def _half(at):
    """The fp16 number there, as fp32."""
    bits = _byte(at) | _byte(at + 1) << 8
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _field(b, number, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Number `number` of those cut from runs of WIDTH bytes: see `blocks._fields`."""
    FIELDS: tl.constexpr = 8 // BITS
    byte = _byte(b + number // (WIDTH * FIELDS) * WIDTH + number % WIDTH)
    return byte >> number // WIDTH % FIELDS * BITS & (1 << BITS) - 1


@triton.jit
def _bit(b, number):
    return _byte(b + number // 8) >> number % 8 & 1


# Codes, scales and offsets of a type. Those without an offset give 0, which is not added.


@triton.jit
def _q4_0(b, group, weight):
    return _field(b + 2, weight, 16, 4) - 8, _half(b), 0.0


@triton.jit
def _q4_1(b, group, weight):
    return _field(b + 4, weight, 16, 4), _half(b), _half(b + 2)


@triton.jit
def _q5_0(b, group, weight):
    return (_field(b + 6, weight, 16, 4) | _bit(b + 2, weight) << 4) - 16, _half(b), 0.0


@triton.jit
def _q5_1(b, group, weight):
    return _field(b + 8, weight, 16, 4) | _bit(b + 4, weight) << 4, _half(b), _half(b + 2)


@triton.jit
def _q8_0(b, group, weight):
    return _signed(_byte(b + 2 + weight)), _half(b), 0.0


@triton.jit
def _q2_k(b, group, weight):
    scales = _byte(b + group)
    scale, minimum = _half(b + 80) * (scales & 15).to(tl.float32), _half(b + 82) * (scales >> 4).to(tl.float32)
    return _field(b + 16, weight, 32, 2), scale, -minimum


@triton.jit
def _q3_k(b, group, weight):
    scale = (_field(b + 96, group, 8, 4) | _field(b + 104, group, 4, 2) << 4) - 32
    q = (_field(b + 32, weight, 32, 2) | _field(b, weight, 32, 1) << 2) - 4
    return q, _half(b + 108) * scale.to(tl.float32), 0.0


@triton.jit
def _six_bit_scales(b, group):
    """Scale and minimum of the eight groups of Q4_K and Q5_K."""
    first, second, rest = _byte(b + 4 + group % 4), _byte(b + 8 + group % 4), _byte(b + 12 + group % 4)
    scale = tl.where(group < 4, first & 63, rest & 15 | first >> 6 << 4)
    minimum = tl.where(group < 4, second & 63, rest >> 4 | second >> 6 << 4)
    return _half(b) * scale.to(tl.float32), -(_half(b + 2) * minimum.to(tl.float32))


@triton.jit
def _q4_k(b, group, weight):
    scale, offset = _six_bit_scales(b, group)
    return _field(b + 16, weight, 32, 4), scale, offset


@triton.jit
def _q5_k(b, group, weight):
    scale, offset = _six_bit_scales(b, group)
    return _field(b + 48, weight, 32, 4) | _field(b + 16, weight, 32, 1) << 4, scale, offset


@triton.jit
def _q6_k(b, group, weight):
    q = (_field(b, weight, 64, 4) | _field(b + 128, weight, 32, 2) << 4) - 32
    return q, _half(b + 208) * _signed(_byte(b + 192 + group)).to(tl.float32), 0.0


_IQ4_FIRST, _IQ4_LAST = (  # eight values of a byte each
    tl.constexpr(int.from_bytes((value & 255 for value in part), "little", signed=True))
    for part in (IQ4_VALUES[:8], IQ4_VALUES[8:])
)


@triton.jit
def _iq4(code):
    values = tl.where(code < 8, _IQ4_FIRST, _IQ4_LAST).to(tl.int64)
    return _signed((values >> (code % 8 * 8).to(tl.int64)).to(tl.int32) & 255)


@triton.jit
def _iq4_nl(b, group, weight):
    return _iq4(_field(b + 2, weight, 16, 4)), _half(b), 0.0


@triton.jit
def _iq4_xs(b, group, weight):
    scale = (_field(b + 4, group, 1, 4) | _field(b + 2, group, 1, 2) << 4) - 32
    return _iq4(_field(b + 8, weight, 16, 4)), _half(b) * scale.to(tl.float32), 0.0


# By type: its function, how many groups a block has, and whether there are offsets
_TYPES = {
    "Q4_0": (_q4_0, 1, False),
    "Q4_1": (_q4_1, 1, True),
    "Q5_0": (_q5_0, 1, False),
    "Q5_1": (_q5_1, 1, True),
    "Q8_0": (_q8_0, 1, False),
    "Q2_K": (_q2_k, 16, True),
    "Q3_K": (_q3_k, 16, False),
    "Q4_K": (_q4_k, 8, True),
    "Q5_K": (_q5_k, 8, True),
    "Q6_K": (_q6_k, 16, False),
    "IQ4_NL": (_iq4_nl, 1, False),
    "IQ4_XS": (_iq4_xs, 8, False),
}


@triton.jit(do_not_specialize=["count"])
def _blocks(
    blocks_ptr,
    out_ptr,
    count,
    UNPACK: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    weight = group * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    q, scale, offset = UNPACK(blocks_ptr + tl.minimum(block, count - 1) * BYTES, group, weight)
    value = q.to(tl.float32) * scale
    if HAS_OFFSET:
        value += offset
    here = (block < count) & (weight >= 0)
    tl.store(out_ptr + block * (GROUPS * WIDTH) + weight, value.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _number(code, KIND: tl.constexpr):
    """fp32. A float of 8 bits is one of 16 without its last bits, but for an exponent that counts from elsewhere."""
    if KIND == "int8":
        return _signed(code).to(tl.float32)
    if KIND == "float8_e5m2":
        return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == "float8_e4m3fn":
        half = (code & 128) << 8 | (code & 127) << 7
        number = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(code & 127 == 127, float("nan"), number)
    return code.to(tl.float32)


@triton.jit
def _rows(
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    out_ptr,
    code_stride,
    scale_stride,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < COLUMNS
    code = tl.load(codes_ptr + row * code_stride + column * BITS // 8, mask=here, other=0).to(tl.int32)
    if BITS == 4:
        code = code >> column % 2 * 4 & 15
    group = row * scale_stride + column // GROUP
    value = _number(code, KIND) * tl.load(scales_ptr + group, mask=here, other=0.0).to(tl.float32)
    if HAS_OFFSETS:
        value += tl.load(offsets_ptr + group, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * COLUMNS + column, value.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _tokens(
    x_ptr,
    codes_ptr,
    scales_ptr,
    stride,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    here = column < C
    x = tl.load(x_ptr + token * stride + column, mask=here, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), LARGEST), 1.1754943508222875e-38)
    code = tl.div_rn(x, scale)
    if ROUNDS:  # to whole numbers, ties to even ones: beyond 2^23 there are no others
        code = (code + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    tl.store(codes_ptr + token * C + column, code.to(codes_ptr.dtype.element_ty), mask=here)
    tl.store(scales_ptr + token, scale)


# Launches


@operation(
    "dequantize_blocks_(Tensor blocks, str type, Tensor(a!) out) -> Tensor(a!)", empty=lambda blocks, type, out: out
)
def dequantize_blocks_(blocks, type, out):
    """uint8 [rows, bytes a row] -> [rows, weights a row], all contiguous."""
    unpack, groups, has_offset = _TYPES[type]
    kind = BY_NAME[type]
    count = blocks.numel() // kind.block_bytes
    shape = {"BYTES": kind.block_bytes, "GROUPS": groups, "WIDTH": kind.block_weights // groups}
    shape["BLOCKS"] = step = _TILE // kind.block_weights
    if count:
        _blocks[(triton.cdiv(count, step),)](
            blocks, out, count, UNPACK=unpack, HAS_OFFSET=has_offset, **shape, enable_fp_fusion=False
        )
    return out


@operation(
    "dequantize_rows_(Tensor codes, Tensor scales, Tensor? offsets, str kind, int bits, int group, Tensor(a!) out) "
    "-> Tensor(a!)",
    empty=lambda *args: args[-1],
)
def dequantize_rows_(codes, scales, offsets, kind, bits, group, out):
    """Bytes [rows, n], scales and offsets [rows, groups] with the same strides -> contiguous [rows, columns].

    kind: the torch type of a code; bits: of one, 8 or 4.
    """
    rows, columns = out.shape
    block = min(_TILE, triton.next_power_of_2(columns))
    if rows:
        _rows[(rows, triton.cdiv(columns, block))](
            *(codes, scales, offsets, out, codes.stride(0), scales.stride(0), columns, kind, bits, group),
            HAS_OFFSETS=offsets is not None,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return out


def _empty_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return codes, x.new_empty(len(x), 1, dtype=torch.float32)


@operation("quantize_tokens(Tensor x, str kind) -> (Tensor, Tensor)", empty=_empty_codes)
def quantize_tokens(x, kind):
    """[N, C], neighbours along C -> codes [N, C], fp32 scales [N, 1]; kind: "fp8" or "int8"."""
    codes, scales = _empty_codes(x, kind)
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        _tokens[(len(x),)](
            *(x, codes, scales, x.stride(0), LARGEST[kind], kind == "int8", x.shape[1], block),
            num_warps=min(16, max(4, block // 1024)),
            enable_fp_fusion=False,
        )
    return codes, scales
