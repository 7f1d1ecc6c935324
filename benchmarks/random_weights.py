"""Transformers of random weights: of the shape of released ones, where these are not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.peers_gguf import random_data
from wan.models.dit import WanModel
from wan.quant.ggml import GGMLType
from wan.quant.packed import PackedTensor
from wan.quant.rounding import quantize_channels
from wan.quant.schemes import Scheme, pack_rows
from wan.weights.source import Source, TensorInfo
from wan.weights.write.export import Planned

TEXT_LEN = 512
_PACKED_ROWS = 64  # that are drawn of a packed matrix


class RandomSource(Source):
    """bf16 weights for every parameter of a model: the same noise over and over, made on `device`. kind: how matrices
    of the blocks are stored, else in bf16 too."""

    def __init__(
        self, model: torch.nn.Module, device: torch.device | str = "cpu", kind: GGMLType | Scheme | None = None
    ):
        infos = {name: TensorInfo(tuple(one.shape), torch.bfloat16) for name, one in model.state_dict().items()}
        super().__init__([], infos)
        noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        self._noise, self._device, self._kind = noise.to(device), device, kind
        self._rows: dict[int, torch.Tensor] = {}  # some packed ones, by their length

    def read(self, name: str, rows=None) -> torch.Tensor:
        shape = self.info(name).shape
        count = torch.Size(shape).numel()
        return self._noise.repeat(-(-count // len(self._noise)))[:count].view(shape)

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        is_matrix = name.startswith("blocks.") and name.endswith("weight") and len(self.info(name).shape) == 2
        return self._kind if is_matrix else None

    def packed(self, name: str, mapped: bool = False, rows=None) -> PackedTensor | None:
        if (kind := self.block_type(name)) is None:
            return None
        height, width = self.info(name).shape
        if width not in self._rows:
            self._rows[width] = _packed_rows(kind, width).to(self._device)
        blocks = self._rows[width].repeat(-(-height // _PACKED_ROWS), 1)[:height]
        return PackedTensor(kind, (height, width), blocks)

    def describe(self) -> str:
        return "random weights"


def _packed_rows(kind: GGMLType | Scheme, width: int) -> torch.Tensor:
    """uint8 [rows, bytes a row] of random weights."""
    if isinstance(kind, Scheme):
        noise = torch.randn(_PACKED_ROWS, width, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        return pack_rows(kind, width, *quantize_channels(noise, kind.name))
    return random_data(Planned("x", (_PACKED_ROWS, width), kind, "x"), 0).view(_PACKED_ROWS, -1)


def on_meta(config: dict[str, Any]) -> WanModel:
    with torch.device("meta"):
        return WanModel(**config)


def inputs(config: dict[str, Any], latent: Sequence[int], device: torch.device) -> tuple:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, *latent, generator=generator).to(device)
    text = torch.randn(TEXT_LEN, config["text_dim"], generator=generator).to(device)
    return noise, torch.tensor([500]), [text[: config["text_len"]]]
