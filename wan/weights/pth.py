"""PyTorch checkpoints (`.pth`, `.pt`, `.bin`), as data only: a pickle that would run code is refused."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from wan.errors import SwanError
from wan.weights.source import Source, Span, TensorInfo

_REMAP_BYTES = 64 << 20  # pages of a mapping stay resident, so it is renewed after this much


class PthSource(Source):
    """One file written by `torch.save`. It is mapped; the format before torch 1.6 has to be read whole."""

    def __init__(self, path: Path):
        self._path = path
        self._tensors: dict[str, torch.Tensor] | None = _tensors_of(path, _load(path))
        self._bytes_read = 0
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self._tensors.items()}
        super().__init__([path], infos)

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        if self._tensors is None:
            self._tensors = _tensors_of(self._path, _load(self._path))
        tensor = self._tensors[name].detach()
        tensor = (tensor if rows is None else tensor[slice(*rows)]).clone(memory_format=torch.contiguous_format)
        self._bytes_read += tensor.numel() * tensor.element_size()
        if self._bytes_read >= _REMAP_BYTES and _is_zip(self._path):
            self._tensors, self._bytes_read = None, 0
        return tensor


def _load(path: Path) -> object:
    is_zip = _is_zip(path)
    if path.suffix == ".safetensors":  # torch.load goes by this suffix
        raise SwanError(f"{path}: a PyTorch checkpoint under a safetensors name; rename it to {path.stem}.pth")
    if is_zip:
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found.group(1)}" if found else "its pickle holds more than tensors"
        raise SwanError(f"{path}: refused, {what}, which could run code; convert it to safetensors") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SwanError(f"{path}: damaged or truncated ({path.stat().st_size:,} bytes): {reason}") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """A zip archive keeps its directory at the end, so a partial download has none."""
    size_bytes = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise SwanError(f"{path}: truncated, the archive's directory is not within its {size_bytes:,} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise SwanError(f"{path}: damaged archive of {size_bytes:,} bytes ({error})") from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise SwanError(f"{path}: a zip archive, but not a PyTorch checkpoint")


def _tensors_of(path: Path, content: object) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, or of the one state dict inside a training checkpoint."""
    direct = _only_tensors(content)
    if direct:
        return direct
    inner = {}
    if isinstance(content, dict):
        inner = {key: tensors for key, value in content.items() if (tensors := _only_tensors(value))}
    for key in ("state_dict", "model"):
        if key in inner:
            return inner[key]
    if len(inner) == 1:
        return next(iter(inner.values()))
    if inner:
        raise SwanError(f"{path}: holds several state dicts ({', '.join(map(str, inner))}); save the one to use")
    raise SwanError(f"{path}: holds no named tensors (a {type(content).__name__})")


def _only_tensors(content: object) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
