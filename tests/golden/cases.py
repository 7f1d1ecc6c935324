"""Reading golden cases: NAME.json + NAME.safetensors, or a tokenizer folder with samples.json."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from wan.weights.source import Source, TensorInfo


@dataclass
class Case:
    """``meta`` is the JSON; ``tensors`` is read on first use, with the compact storage forms expanded."""

    name: str
    meta: dict
    folder: Path
    tensors_path: Path | None = None

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        if self.tensors_path is None:
            return {}
        tensors = load_file(self.tensors_path)
        for key, shape in self.meta.get("tiled", {}).items():
            tensors[key] = _untile(tensors.pop(f"tiled/{key}"), shape)
        for key, spec in self.meta.get("tensors_spec", {}).items():
            if isinstance(spec.get("scale"), (int, float)):  # one without a scale is built by the model itself
                tensors[f"weights/{key}"] = hash_tensor(key, spec["shape"], spec["scale"], self.meta["seed"])
        return tensors

    @property
    def config(self) -> dict:
        return self.meta.get("config", {})

    @cached_property
    def keys(self) -> set[str]:
        """Names of inputs and outputs, without reading any tensor where the JSON lists them."""
        return set(self.meta["tensors"]) if "tensors" in self.meta else set(self.tensors)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under ``prefix/``, without it; for example ``group("weights")``."""
        return {key[len(prefix) + 1 :]: value for key, value in self.tensors.items() if key.startswith(prefix + "/")}

    def listed(self, prefix: str) -> list[torch.Tensor] | None:
        """The list argument stored as prefix.0, prefix.1, ...; None if there is none."""
        values = []
        while f"{prefix}.{len(values)}" in self.tensors:
            values.append(self.tensors[f"{prefix}.{len(values)}"])
        return values or None

    def tags(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the keys that start with it, sorted."""
        return sorted(key[len(prefix) :] for key in self.keys if key.startswith(prefix))


class MemorySource(Source):
    """The weights of a case, offered as a checkpoint file would be."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        super().__init__([Path("golden case")], infos)
        self._tensors = tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if rows is None else tensor[slice(*rows)]).clone()


def load_cases(folder: str | Path) -> list[Case]:
    """Every case of a folder, by name. Tensors are not read yet."""
    folder = Path(folder)
    cases = []
    for path in sorted(folder.glob("*.json")):
        tensors_path = path.with_suffix(".safetensors")
        cases.append(Case(path.stem, _read(path), folder, tensors_path if tensors_path.exists() else None))
    for path in sorted(folder.glob("*/samples.json")):
        cases.append(Case(path.parent.name, _read(path), path.parent))
    return cases


def hash_tensor(key: str, shape: list[int], scale: float, seed: int) -> torch.Tensor:
    """Weights that are not stored but follow from their key: a 32-bit murmur3 finaliser of the element's index."""
    count = int(np.prod(shape))
    offset = (zlib.crc32(key.encode()) + seed * 0x9E3779B1) % 2**32
    h = np.arange(count, dtype=np.uint32) + np.uint32(offset)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    values = ((h.astype(np.float64) / 2**32 - 0.5) * scale).astype(np.float32)
    return torch.from_numpy(values).reshape(shape)


def _untile(period: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """flat[i] = period[i mod len(period)]"""
    count = int(np.prod(shape))
    return period.repeat(-(-count // period.numel()))[:count].reshape(shape)


def _read(path: Path) -> dict:
    meta = json.loads(path.read_text(encoding="utf-8"))
    return meta if isinstance(meta, dict) else {}
