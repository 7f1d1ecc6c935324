"""Attention in bf16 on a CPU, by attention.c: the accuracy of torch's kernel in less than half of its time.

On CPUs with AVX512-BF16 and a C compiler. Those with AMX have units of their own, which torch's kernel uses: they keep
it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wan.quant.native import cpu_flags, library_of

SOURCE = Path(__file__).with_name("attention.c")
_WIDTHS = (64, 128, 192, 256)  # of heads
_TOLERANCE, _LSE_TOLERANCE = 0.006, 1e-4  # relative, of the whole, 0.0023 for random numbers; absolute


class Attended(NamedTuple):
    """out_BLHD, and the log of the sum of the exponentials, fp32 [B, L, H]."""

    out: Tensor
    lse: Tensor


class _Shape(ctypes.Structure):
    """As in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "queries", "keys", "heads", "width")),
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        ("scale", ctypes.c_float),
    ]


def attend(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Attended | None:
    """softmax(q k^T / sqrt(D)) v; None where this is not for these tensors or this machine."""
    given = (q_BLHD, k_BMHD, v_BMHD)
    if any(one.device.type != "cpu" or one.dtype != torch.bfloat16 or one.stride(-1) != 1 for one in given):
        return None
    if any(type(one) is not Tensor for one in given):  # fake ones have no memory
        return None
    if q_BLHD.shape[-1] not in _WIDTHS or (torch.is_grad_enabled() and any(one.requires_grad for one in given)):
        return None
    library = _library()
    return None if library is None else _attend(library, *given)


def _attend(library: ctypes.CDLL, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Attended | None:
    B, L, H, D = q_BLHD.shape
    out, most, total = q_BLHD.new_empty(B, L, H, D), *(torch.empty(B, L, H, device="cpu") for _ in range(2))
    strides = [(ctypes.c_int64 * 3)(*one.stride()[:3]) for one in (q_BLHD, k_BMHD, v_BMHD, out)]
    shape = _Shape(B, L, k_BMHD.shape[1], H, D, *strides, D**-0.5)
    pointers = [ctypes.c_void_p(one.data_ptr()) for one in (q_BLHD, k_BMHD, v_BMHD, out, most, total)]
    if not library.attend(ctypes.byref(shape), *pointers):
        return None
    return Attended(out, most.mul_(math.log(2)).add_(total.log_()))


@functools.cache
def _library() -> ctypes.CDLL | None:
    flags = cpu_flags()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        return None
    functions = {"attend": ((ctypes.POINTER(_Shape), *[ctypes.c_void_p] * 6), ctypes.c_int)}
    return library_of(SOURCE, functions, _is_right, "attention in bf16 is torch's, slower")


def _is_right(library: ctypes.CDLL) -> bool:
    """By the formula, in fp64."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), torch.device("cpu"):
        q, k, v = (torch.randn(1, count, 2, 64, generator=generator).bfloat16() for count in (55, 300, 300))
        made = _attend(library, q, k, v)
        scores = torch.einsum("blhd,bmhd->blhm", q.double(), k.double()) / 8
        wanted = torch.einsum("blhm,bmhd->blhd", scores.softmax(-1), v.double())
        if made is None or not (made.out - wanted).norm() < _TOLERANCE * wanted.norm():
            return False
        return bool((made.lse - scores.logsumexp(-1)).abs().max() <= _LSE_TOLERANCE)
