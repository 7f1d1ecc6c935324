"""Layers that keep their weights packed and dequantise them at each use, one layer at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.quant.packed import PackedTensor
from wan.quant.products import Rounded, is_product, scaled_product


class _Packed(nn.Module):
    """Holds the blocks of a matrix as a parameter: it moves with `.to(device)`, is shared out among ranks like others,
    and `.to(dtype)` leaves it as it is."""

    def __init__(self, weight: PackedTensor):
        super().__init__()
        self.blocks = nn.Parameter(weight.blocks, requires_grad=False)
        self.type, self.shape, self.guard = weight.type, weight.shape, weight.guard

    @property
    def weight(self) -> PackedTensor:
        return PackedTensor(self.type, self.shape, self.blocks.detach(), self.guard)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.type.name}"


class QuantLinear(_Packed):
    """`nn.Linear` over packed blocks: the product with the weights dequantised to the type of the input.

    It is bit for bit `F.linear` with the dequantised weights, but where `in_8_bits`, see products.py. branches: modules
    whose results are added to that, called with the input and `product`, see `wan.weights.lora_formulas`.
    """

    in_8_bits = False

    def __init__(self, weight: PackedTensor, bias: nn.Parameter | None = None):
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.branches = nn.ModuleList()

    def forward(self, x: Tensor, rounded: Rounded | None = None) -> Tensor:
        """`[..., in_features] -> [..., out_features]`, in the type of `x`; rounded: `x`, which others multiply too."""
        y = self.product(x, self.bias, rounded)
        for branch in self.branches:
            y = y + branch(x, self.product)
        return y

    def product(self, x: Tensor, bias: Tensor | None = None, rounded: Rounded | None = None) -> Tensor:
        """The same without bias and branches."""
        if self.in_8_bits:
            scaled = scaled_product(rounded or Rounded(x), self.weight, bias)
            if scaled is not None:
                return scaled
        weight = self.weight.dequantize(x.dtype, reuse=not torch.is_grad_enabled())  # autograd would keep it
        return F.linear(x, weight, bias)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of one input, which is rounded once for those in 8 bits."""
    rounded = Rounded(x)
    return tuple(layer(x, rounded) if isinstance(layer, QuantLinear) else layer(x) for layer in layers)


def multiply_in_8_bits(model: nn.Module, name: str) -> None:
    """Have the packed layers of a model that can be multiplied as `name`, "fp8" or "int8", multiplied so."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.in_8_bits = is_product(layer.type, layer.shape, name)


class QuantEmbedding(_Packed):
    """`nn.Embedding` over packed rows: only the rows that are looked up are dequantised."""

    like: Tensor  # empty; its type is that of the output

    def __init__(self, weight: PackedTensor, dtype: torch.dtype):
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape -> `[..., embedding_dim]`."""
        weight = self.weight
        if weight.guard:
            weight.guard(weight.blocks)
        rows = PackedTensor(weight.type, (*ids.shape, self.embedding_dim), weight.blocks[ids.flatten()])
        return rows.dequantize(self.like.dtype)
