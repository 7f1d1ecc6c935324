"""ggml's block formats in torch: the definition that every faster way is checked against.

Each function takes blocks uint8 [n, bytes a block] and returns `(q, scale, offset)`: integer codes [n, G, W] and, for
each of the G groups of W weights, fp32 [n, G, 1]; a weight is scale * q + offset. `offset` may be None. Every step is
in fp32, in the order of the `gguf` package, with whose results they agree bit for bit.

Source: the block structs of ggml (ggml-common.h) and the numpy code of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Unpacked = tuple[Tensor, Tensor, "Tensor | None"]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize_blocks(blocks: Tensor, name: str) -> Tensor:
    """uint8 [n, bytes a block] of type `name` ("Q4_K", ...) -> fp32 [n, weights a block]."""
    q, scale, offset = UNPACK[name](blocks)
    weights = q.float() * scale
    if offset is not None:
        weights = weights + offset
    return weights.flatten(1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of each block, as fp32 [n, 1, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()[:, :, None]


def _fields(packed: Tensor, width: int, shifts: Sequence[int]) -> Tensor:
    """Cuts bytes [n, m * width] into bit fields of 8 / len(shifts) bits: [n, m * len(shifts), width].

    Field k of byte j of a run of `width` bytes is number j of row k.
    """
    shift = torch.tensor(shifts, dtype=torch.uint8, device=packed.device)[:, None]
    mask = (1 << 8 // len(shifts)) - 1
    return ((packed.unflatten(1, (-1, 1, width)) >> shift) & mask).flatten(1, 2)


def _bits(packed: Tensor) -> Tensor:
    """Bit k of byte j is number 8 j + k: [n, m] -> [n, 1, 8 m]."""
    return _fields(packed, 1, range(8)).transpose(1, 2)


def _q4_0(b: Tensor) -> Unpacked:
    return _fields(b[:, 2:], 16, (0, 4)).flatten(1)[:, None].to(torch.int8) - 8, _half(b, 0), None


def _q4_1(b: Tensor) -> Unpacked:
    return _fields(b[:, 4:], 16, (0, 4)).flatten(1)[:, None], _half(b, 0), _half(b, 2)


def _q5(low: Tensor, high: Tensor) -> Tensor:
    return _fields(low, 16, (0, 4)).flatten(1)[:, None] | _bits(high) << 4


def _q5_0(b: Tensor) -> Unpacked:
    return _q5(b[:, 6:], b[:, 2:6]).to(torch.int8) - 16, _half(b, 0), None


def _q5_1(b: Tensor) -> Unpacked:
    return _q5(b[:, 8:], b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor) -> Unpacked:
    return b[:, 2:].view(torch.int8)[:, None], _half(b, 0), None


def _q2_k(b: Tensor) -> Unpacked:
    scales = b[:, :16, None]
    q = _fields(b[:, 16:80], 32, (0, 2, 4, 6)).reshape(-1, 16, 16)
    return q, _half(b, 80) * (scales & 15).float(), -(_half(b, 82) * (scales >> 4).float())


def _q3_k(b: Tensor) -> Unpacked:
    low, high = _fields(b[:, 96:104], 8, (0, 4)).flatten(1), _fields(b[:, 104:108], 4, (0, 2, 4, 6)).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    q = _fields(b[:, 32:96], 32, (0, 2, 4, 6)) | _fields(b[:, :32], 32, range(8)) << 2
    return q.reshape(-1, 16, 16).to(torch.int8) - 4, _half(b, 108) * scales.float()[:, :, None], None


def _six_bit_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the eight groups of Q4_K and Q5_K, [n, 8, 1]."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    minimum = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)
    return scale.float()[:, :, None], minimum.float()[:, :, None]


def _q4_k(b: Tensor) -> Unpacked:
    scale, minimum = _six_bit_scales(b)
    return _fields(b[:, 16:], 32, (0, 4)), _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q5_k(b: Tensor) -> Unpacked:
    scale, minimum = _six_bit_scales(b)
    q = _fields(b[:, 48:], 32, (0, 4)) | _fields(b[:, 16:48], 32, range(8)) << 4
    return q, _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q6_k(b: Tensor) -> Unpacked:
    low = _fields(b[:, :128], 64, (0, 4)).reshape(-1, 8, 32)
    q = (low | _fields(b[:, 128:192], 32, (0, 2, 4, 6)) << 4).reshape(-1, 16, 16).to(torch.int8) - 32
    scales = b[:, 192:208].view(torch.int8)
    return q, _half(b, 208) * scales.float()[:, :, None], None


def _iq4(packed: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.int8, device=packed.device)
    return values[_fields(packed, 16, (0, 4)).int()]


def _iq4_nl(b: Tensor) -> Unpacked:
    return _iq4(b[:, 2:]).flatten(1)[:, None], _half(b, 0), None


def _iq4_xs(b: Tensor) -> Unpacked:
    low, high = _fields(b[:, 4:8], 1, (0, 4)).flatten(1), _fields(b[:, 2:4], 1, (0, 2, 4, 6)).flatten(1)
    scales = (low | high << 4).to(torch.int8) - 32
    return _iq4(b[:, 8:]).reshape(-1, 8, 32), _half(b, 0) * scales.float()[:, :, None], None


UNPACK: dict[str, Callable[[Tensor], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
