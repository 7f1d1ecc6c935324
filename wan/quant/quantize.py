"""Weights -> the bytes of a ggml tensor type.

The block formats are written by libgguf, the native code of ggml, without an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from wan.errors import SwanError
from wan.quant.ggml import GGMLType

# Quantised at once by one thread. The fp32 copy of a chunk is all the memory that is needed beside input and output.
_CHUNK_WEIGHTS = 1 << 20
_LARGEST_F16 = 65_504.0  # a block's scale is F16, and no larger than its largest weight


def quantize(
    tensor: Tensor, kind: GGMLType, pool: Executor | None = None, on_progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Encode `tensor` (any float type, on the CPU) as `kind`: uint8 [rows, bytes a row]; the last axis is the row.

    pool: threads to share the rows; the result does not depend on it. on_progress: called in this thread with the
    bytes made so far; what it raises ends the work. Raises ValueError for values that are not finite or that the type
    cannot hold, and for rows that are no whole number of blocks.
    """
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    count, width = rows.shape
    encoded = np.empty((count, kind.row_bytes(width)), dtype=np.uint8)
    encode = _encode_native if kind.torch_dtype is None else _encode_typed
    if kind.torch_dtype is None:
        _native()  # a missing package is reported by this thread

    def work(first: int) -> int:
        last = min(first + step, count)
        values = rows[first:last].to(torch.float32).contiguous()
        _check_values(values, kind)
        encode(values, kind, encoded[first:last])
        return last

    step = max(_CHUNK_WEIGHTS // width, 1)
    run: Callable[..., Iterable[int]] = pool.map if pool else map
    for rows_done in run(work, range(0, count, step)):
        if on_progress:
            on_progress(rows_done * encoded.shape[1])
    return encoded


def _check_values(values: Tensor, kind: GGMLType) -> None:
    largest = float(values.abs().max())
    if not largest < float("inf"):  # NaN as well
        raise ValueError("it holds values that are not finite")
    if kind.name not in ("F32", "BF16") and largest > _LARGEST_F16:
        raise ValueError(f"{kind.name} cannot hold its value {largest:g}")


def _encode_typed(values: Tensor, kind: GGMLType, out: np.ndarray) -> None:
    out[:] = values.to(kind.torch_dtype).view(torch.uint8).numpy()


def _encode_native(values: Tensor, kind: GGMLType, out: np.ndarray) -> None:
    _native().quantize_rows_into_raw(kind.id, values.numpy(), out, *values.shape)


def _native():
    try:
        import libgguf
    except ImportError as error:
        raise SwanError(f"libgguf is needed to quantise ({error}); pip install libgguf") from error
    return libgguf
