"""Weights -> the bytes of a ggml tensor type.

The block formats are written without an importance matrix, by encode.c or by libgguf, the native code of ggml: the
bytes are the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.encode import encode
from wan.quant.ggml import GGMLType

_LARGEST_F16 = 65_504.0  # a block's scale is F16, and no larger than its largest weight


def quantize(tensor: Tensor, kind: GGMLType) -> np.ndarray:
    """Encode `tensor` (any float type, on the CPU) as `kind`: uint8 [rows, bytes a row]; the last axis is the row.

    Raises ValueError for values that are not finite or that the type cannot hold, and for rows that are no whole number
    of blocks.
    """
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    encoded = np.empty((rows.shape[0], kind.row_bytes(rows.shape[1])), dtype=np.uint8)
    package = libgguf() if kind.torch_dtype is None else None  # encode.c is checked against it
    largest = encode(rows, kind, encoded)
    if largest is not None:
        _check(largest, kind)
        return encoded
    values = rows.to(torch.float32)
    _check(_largest(values), kind)
    if package is None:
        encoded[:] = values.to(kind.torch_dtype).view(torch.uint8).numpy()
    else:
        package.quantize_rows_into_raw(kind.id, values.numpy(), encoded, *values.shape)
    return encoded


def _largest(values: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    return float(torch.stack(values.aminmax()).abs().max()) if values.numel() else 0.0


def _check(largest: float, kind: GGMLType) -> None:
    if not largest < float("inf"):  # NaN as well
        raise ValueError("it holds values that are not finite")
    if kind.name not in ("F32", "BF16") and largest > _LARGEST_F16:
        raise ValueError(f"{kind.name} cannot hold its value {largest:g}")


def libgguf():
    """The package; SwanError where it is not installed."""
    try:
        import libgguf
    except ImportError as error:
        raise SwanError(f"libgguf is needed to quantise ({error}); pip install libgguf") from error
    return libgguf
