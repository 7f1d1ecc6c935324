"""Low-rank factors beside the linear weights of a transformer's blocks, and their file in ComfyUI's key format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wan.models.dit import WanModel
from wan.weights.assign import load_weights
from wan.weights.source import open_source

LAYERS = [f"{attention}.{one}" for attention in ("self_attn", "cross_attn") for one in "qkvo"] + ["ffn.0", "ffn.2"]


def load_dit(paths: list[Path], spec) -> WanModel:
    """The transformer of these files, in fp32."""
    with torch.device("meta"):
        model = WanModel(**spec.dit)
    return load_weights(model, open_source(paths), "dit", device="cpu", dtype=torch.float32)


class LowRank(nn.Module):
    """weight [O, I] -> weight + up [O, R] @ down [R, I]; up begins as zeros, so nothing is changed at first."""

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_factors(dit: WanModel, rank: int) -> list[nn.Parameter]:
    """Give every linear layer of the blocks factors, in place; returns them. All else is frozen."""
    dit.requires_grad_(False)
    for _, layer in _layers(dit):
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape, rank))
    return [weight for weight in dit.parameters() if weight.requires_grad]


def _layers(dit: WanModel) -> Iterator[tuple[str, nn.Linear]]:
    for index, block in enumerate(dit.blocks):
        for name in LAYERS:
            yield f"blocks.{index}.{name}", block.get_submodule(name)


def save_factors(dit: WanModel, file: Path) -> None:
    """Those of `add_factors`, in bf16. Without an alpha, so that strength 1 is what was trained."""
    tensors = {}
    for name, layer in _layers(dit):
        factors = layer.parametrizations.weight[0]
        for part in ("down", "up"):
            tensor = getattr(factors, part).detach().to(torch.bfloat16).contiguous()
            tensors[f"diffusion_model.{name}.lora_{part}.weight"] = tensor
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
