"""Fill a model that was built on the meta device, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

import torch
from torch import nn

from wan.errors import SwanError
from wan.quant.blocks import UNPACK
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.quant.packed import PackedTensor
from wan.weights.infer import looks_like, tensor_info
from wan.weights.names import Rows, official_names
from wan.weights.source import Source


def load_weights(
    model: nn.Module,
    source: Source,
    component: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    stream: bool = False,
) -> nn.Module:
    """Replace every parameter and persistent buffer of `model` by the tensor of its name in `source`.

    component: "dit", "vae", "t5" or "clip", see `official_names`. Parameters become `dtype` (None: as in the file),
    except where the model has a method `keep_fp32(name) -> bool` that says True. Buffers keep their own dtype, and
    buffers that are not in files must hold their values already (build them with device="cpu"). Quantised tensors are
    dequantised; with `stream`, those of linear layers and embeddings stay packed and the layers become QuantLinear and
    QuantEmbedding. At most one tensor is in memory beside the model. All checks come before the first read.
    Returns `model`, frozen.

    Raises SwanError, one line, naming the tensors that are missing, unexpected or mis-shaped.
    """
    names = official_names(source.keys(), component)
    slots = _slots(model)
    _check(model, slots, names, source)
    keep_fp32 = getattr(model, "keep_fp32", lambda name: False)
    for aliases in slots:
        name = next(alias for alias in aliases if alias in names)
        old = _get(model, name)
        is_parameter = isinstance(old, nn.Parameter)
        target = old.dtype
        if is_parameter and old.is_floating_point():
            target = torch.float32 if keep_fp32(name) else dtype
        packed = None
        if isinstance(names[name], str):
            # On a CPU, weights that stay packed can stay in the file.
            packed = source.packed(names[name], mapped=stream and torch.device(device).type == "cpu")
        if packed is not None:
            packed = replace(packed, shape=tuple(old.shape), blocks=packed.blocks.to(device))
        layer = _packed_layer(model, name, packed, dtype) if stream and packed and not keep_fp32(name) else None
        if layer is not None:
            for path in {alias.rpartition(".")[0] for alias in aliases}:
                _set(model, path, layer)
            continue
        tensor = packed.dequantize(target or torch.float32) if packed is not None else _read(source, names[name])
        tensor = tensor.reshape(old.shape).to(device=device, dtype=target)
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for alias in aliases:
            _set(model, alias, value)
    _place_other_buffers(model, device)
    return model


def check_weights(model: nn.Module, source: Source, component: str) -> None:
    """The checks of `load_weights` alone: nothing is read. Raises SwanError, one line."""
    _check(model, _slots(model), official_names(source.keys(), component), source)


def _slots(model: nn.Module) -> list[list[str]]:
    """Names of the tensors to fill; tied ones share a slot."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _set(model: nn.Module, name: str, value: nn.Module | torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _packed_layer(model: nn.Module, name: str, weight: PackedTensor, dtype: torch.dtype | None) -> nn.Module | None:
    """The layer that computes with packed weights in place of the one that holds parameter `name`, if there is one."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf != "weight" or weight.type.name not in UNPACK:  # other types are slow to dequantise
        return None
    if isinstance(layer, nn.Linear):
        return QuantLinear(weight, layer.bias)
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(weight, dtype or torch.float32)
    return None


def _read(source: Source, name: str | Rows) -> torch.Tensor:
    if isinstance(name, str):
        return source.read(name)
    return source.read(name.name).chunk(name.count, dim=0)[name.index].clone()


def _check(model: nn.Module, slots: list[list[str]], names: dict[str, str | Rows], source: Source) -> None:
    known = {alias for aliases in slots for alias in aliases}
    missing = [aliases[0] for aliases in slots if not any(alias in names for alias in aliases)]
    unexpected = [name for name in names if name not in known]
    wrong = []
    for name in known & names.keys():
        info, slot = tensor_info(source, names[name]), _get(model, name)
        if not _fits(info.shape, slot.shape):
            wrong.append(f"{name} {list(info.shape)} for {list(slot.shape)}")
        elif slot.is_floating_point() and not info.dtype.is_floating_point:
            wrong.append(f"{name} {str(info.dtype).removeprefix('torch.')} for a float")
    problems = [_report("missing", missing), _report("unexpected", unexpected), _report("mis-shaped", sorted(wrong))]
    if any(problems):
        problem = "; ".join(filter(None, problems))
        looks = looks_like(source)
        raise SwanError(f"{source.describe()}: does not fit {type(model).__name__}: {problem}{looks}")


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Equal up to axes of size 1, which some exporters drop, and to axes of a convolution, which some fold."""
    stored, slot = ([size for size in sizes if size != 1] for sizes in (shape, wanted))
    if stored == slot or len(wanted) < 4:
        return stored == slot
    # Folded: where an axis of the file ends, one of the slot ends as well.
    return math.prod(stored) == math.prod(slot) and set(accumulate(stored, mul)) <= set(accumulate(slot, mul))


def _report(problem: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {problem} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"


def _place_other_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Move the buffers that are in no file, such as tables computed by the constructor."""
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                raise RuntimeError(f"buffer {path}.{leaf} has no values: build it with device='cpu'")
            module._buffers[leaf] = buffer.to(device)
