"""encode.c, compiled by native.py: weights -> blocks of ggml, with the bytes of libgguf and some ten times as fast."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wan.quant.ggml import BY_NAME, GGMLType
from wan.quant.native import library_of

SOURCE = Path(__file__).with_name("encode.c")
TYPES = ("Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # libgguf is quick at the others
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FUNCTIONS = {
    "encode": ((ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p), ctypes.c_uint32)
}
_lock = threading.Lock()


def encode(weights: Tensor, kind: GGMLType, out: np.ndarray) -> float | None:
    """Write the blocks of contiguous CPU `weights`, whole ones, to `out`: uint8, contiguous. Returns the largest
    magnitude of the weights, NaN if one of them is; None, and nothing is done, where there is no kernel for this.

    Blocks mean nothing where the magnitude is not finite, or more than fp16 holds.
    """
    if kind.name not in TYPES or weights.dtype not in _FORMATS or (library := _kernels()) is None:
        return None
    if not (weights.is_contiguous() and out.flags.c_contiguous and out.nbytes == kind.row_bytes(weights.numel())):
        raise ValueError("weights and blocks must be contiguous and of the same number")
    return _call(library, weights, kind, out)


def _call(library: ctypes.CDLL, weights: Tensor, kind: GGMLType, out: np.ndarray) -> float:
    bits = library.encode(
        kind.id, weights.data_ptr(), _FORMATS[weights.dtype], weights.numel(), out.ctypes.data_as(ctypes.c_void_p)
    )
    return struct.unpack("f", struct.pack("I", bits))[0]


def _kernels() -> ctypes.CDLL | None:
    with _lock:  # threads that quantise ask at the same time
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    return library_of(SOURCE, _FUNCTIONS, _is_exact, "weights are quantised by libgguf, slower")


def _is_exact(library: ctypes.CDLL) -> bool:
    """Whether every type gives the bytes of libgguf, for weights of several kinds."""
    import libgguf

    weights = torch.randn(5, 768, generator=torch.Generator().manual_seed(0))
    weights[1] = weights[1] ** 3
    weights[2, ::3] = 0
    weights[3] = weights[3].abs() * 1e-4
    weights[4, :256] = weights[4, 0]
    for name in TYPES:
        kind = BY_NAME[name]
        for values in (weights, weights.bfloat16(), weights.half()):
            expected, found = (np.empty((5, kind.row_bytes(768)), dtype=np.uint8) for _ in range(2))
            libgguf.quantize_rows_into_raw(kind.id, values.float().numpy(), expected, *values.shape)
            _call(library, values, kind, found)
            if not np.array_equal(expected, found):
                return False
    return True
