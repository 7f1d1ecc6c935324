"""A transformer from tensors in memory, quantised or not, as GGUF readers of other projects hold them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan.compat.config import hyperparameters
from wan.compat.transformer import WanTransformerGGUF, build_model
from wan.errors import SwanError, UsageError
from wan.quant.ggml import BY_ID, GGMLType
from wan.quant.packed import PackedTensor
from wan.weights.infer import infer_dit_config
from wan.weights.source import Source, Span, TensorInfo


def create_wan_transformer_gguf(
    config: Mapping[str, Any] | str | os.PathLike,
    state_dict: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    stream: bool = True,
) -> WanTransformerGGUF:
    """The transformer of CineWan, which is called as the official model is, with the tensors of `state_dict`.

    config: hyperparameters, or the path of a JSON or YAML file of them, as official, VideoX-Fun or diffusers; what it
    leaves out is told from the tensors.
    state_dict: official or diffusers names -> tensors: torch's, or quantised ones of the gguf package (ReaderTensor),
    ComfyUI-GGUF and gguf_loader (GGMLTensor) or diffusers (GGUFParameter).
    device, dtype, stream: as for `load_gguf_transformer`. Blocks that stay packed on the CPU are not copied.

    Raises UsageError for a config that cannot be honoured; SwanError, one line, that names the tensors which are
    missing, unexpected, mis-shaped or no tensors at all.
    """
    source = StateDict(state_dict)
    arguments: dict[str, Any] = {}
    with contextlib.suppress(SwanError):  # an incomplete state dict: loading says what is missing
        arguments = infer_dit_config(source)
    return WanTransformerGGUF(*build_model(source, arguments | hyperparameters(config), device, dtype, stream))


class StateDict(Source):
    """A checkpoint in memory."""

    def __init__(self, state_dict: Mapping[str, Any]):
        if not isinstance(state_dict, Mapping) or not state_dict:
            raise UsageError(f"state_dict must map names to tensors, not {type(state_dict).__name__}")
        self._tensors = {name: _stored(name, value) for name, value in state_dict.items()}
        infos = {}
        for name, value in self._tensors.items():
            dtype = torch.float32 if isinstance(value, PackedTensor) else value.dtype
            infos[name] = TensorInfo(tuple(value.shape), dtype)
        super().__init__([], infos)

    def describe(self) -> str:
        return "state_dict"

    def read(self, name: str, rows: Span | None = None) -> Tensor:
        packed = self.packed(name, mapped=True, rows=rows)
        if packed is not None:
            return packed.dequantize()
        value = self._tensors[name]
        return (value if rows is None else value[slice(*rows)]).clone()

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        value = self._tensors[name]
        if not isinstance(value, PackedTensor):
            return None
        if rows is not None:
            shape = (rows[1] - rows[0], *value.shape[1:])
            value = replace(value, shape=shape, blocks=value.blocks[slice(*rows)])
        return value if mapped else replace(value, blocks=value.blocks.clone())

    def block_type(self, name: str) -> GGMLType | None:
        value = self._tensors[name]
        return value.type if isinstance(value, PackedTensor) else None


def _stored(name: str, value: Any) -> Tensor | PackedTensor:
    """What a value of the state dict holds, under one of two types, without a copy."""
    if isinstance(value, PackedTensor):
        return value
    data = _plain(value if isinstance(value, Tensor) else getattr(value, "data", None))
    if data is None:
        raise SwanError(f"state_dict: {name} is no tensor but a {type(value).__name__}")
    number = getattr(value, "tensor_type", getattr(value, "quant_type", None))
    if number is None:
        return data
    kind = BY_ID.get(int(number))
    if kind is None:
        raise SwanError(f"state_dict: {name} has the unknown tensor type {number}")
    shape = _shape(value, data, kind)
    try:
        expected = kind.tensor_bytes(shape)
    except ValueError as error:
        raise SwanError(f"state_dict: {name}: {error}") from None
    data = data.contiguous().reshape(-1).view(torch.uint8)
    if len(data) != expected:
        needs = f"{kind.name} {list(shape)} needs {expected:,} bytes, has {len(data):,}"
        raise SwanError(f"state_dict: {name}: {needs}")
    if kind.torch_dtype is not None:
        return data.view(kind.torch_dtype).reshape(shape)
    return PackedTensor(kind, shape, data.reshape(-1, kind.row_bytes(shape[-1])))


def _plain(data: Any) -> Tensor | None:
    """`data` as a torch.Tensor and no subclass of it; None if it is no array."""
    if isinstance(data, np.ndarray):
        with warnings.catch_warnings():  # gguf maps its files for reading only, and nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(data)
    if not isinstance(data, Tensor):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # subclasses would wrap the result again
        return data.detach().as_subclass(Tensor)


def _shape(value: Any, data: Tensor, kind: GGMLType) -> tuple[int, ...]:
    """The shape of the weights: given by the value, else that of its rows of bytes."""
    given = getattr(value, "tensor_shape", getattr(value, "quant_shape", None))
    if given is not None:
        return tuple(int(size) for size in given)
    if not isinstance(value, Tensor):  # gguf's ReaderTensor has ggml's order, the row first
        return tuple(int(size) for size in reversed(value.shape))
    return (*data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.block_weights)
