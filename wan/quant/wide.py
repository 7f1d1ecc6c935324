"""Layers that keep their weights in fewer bits than they compute in, and widen them at each use, one layer at a time.

For a CPU without units for bf16: there fp32 is several times faster, and bf16 takes half the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.quant.scratch import scratch


class WideLinear(nn.Linear):
    """`nn.Linear` in the type of its input: bit for bit that with the weights widened beforehand.

    The weights are a dense parameter of the usual name, so that LoRAs are merged into it, and it is streamed and shared
    out like any other.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # without making weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features] -> [..., out_features]`, in the type of `x`."""
        return F.linear(x, _widened(self.weight, x.dtype), self.bias)


class WideEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows become fp32 when they are looked up."""

    def __init__(self, layer: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.weight = layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape -> fp32 `[..., embedding_dim]`."""
        return F.embedding(ids, self.weight).float()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def keep_narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model on the meta device, which computes in fp32, the layers above, with weights of `dtype`.

    All but matrices stays as it is, and what the model's `keep_fp32` names.
    """
    stays = getattr(model, "keep_fp32", lambda name: False)
    made: dict[nn.Module, nn.Module] = {}  # a layer that has two places in the model keeps them
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        wide = next((wide for kind, wide in _WIDE.items() if isinstance(layer, kind)), None)
        if wide is None or stays(f"{path}.weight"):
            continue
        if layer not in made:
            made[layer] = wide(layer)
            empty = torch.empty(layer.weight.shape, dtype=dtype, device="meta")
            made[layer].weight = nn.Parameter(empty, requires_grad=False)
        place, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(place), leaf, made[layer])


def is_narrow(model: nn.Module, name: str) -> bool:
    """Whether a parameter is one that `keep_narrow` gave its type."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(path)) in _WIDE.values()


def _widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    if weight.device.type != "cpu" or torch.is_grad_enabled():  # autograd would keep it
        return weight.to(dtype)
    return scratch(*weight.shape, dtype).copy_(weight)


_WIDE = {nn.Linear: WideLinear, nn.Embedding: WideEmbedding}
