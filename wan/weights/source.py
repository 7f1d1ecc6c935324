"""A checkpoint as a set of named tensors that are read one at a time.

`open_source` looks at the bytes of a file, not at its name, and refuses what is not a checkpoint with one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.errors import SwanError
from wan.files import read_json, visible_files, visible_names
from wan.weights.containers.opened import OpenedFile

if TYPE_CHECKING:
    import torch

    from wan.quant.ggml import GGMLType
    from wan.quant.packed import PackedTensor
    from wan.quant.schemes import Scheme
    from wan.weights.containers.mapped import Extent

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
# What trainers put beside the weights, and PEFT and accelerate among them.
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "random_states", "rng_state", "scaler")
INDEX_SUFFIX = ".safetensors.index.json"
MAX_BYTES = 2**63 - 1  # what a size or an offset may be
Span = tuple[int, int]  # some rows, which lie along the first axis: from, to


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of one stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source:
    """Named tensors of one checkpoint. Subclasses supply `read`.

    replaces: tensors of files before this one that it has in their place
    """

    replaces: frozenset[str] = frozenset()

    def __init__(self, paths: Sequence[Path], infos: dict[str, TensorInfo]):
        self.paths = list(paths)
        self._infos = infos

    def keys(self) -> list[str]:
        """Tensor names, as the file spells them."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of `name`; KeyError if there is no such tensor."""
        return self._infos[name]

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        """Read one tensor, or some of its rows, to the CPU. It owns its memory: the file may change or vanish."""
        raise NotImplementedError

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        """Read bytes of one tensor as they are stored, from byte `start` on (where a block begins), into `out`,
        contiguous on the CPU. False, and nothing is done, where the file does not have them in one piece."""
        return False

    def extent(self, name: str) -> Extent | None:
        """Where one tensor lies in a file as it is, in one piece, quantised or not; else None."""
        return None

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        """What is stored of a quantised tensor (of some rows), else None. mapped: it may stay in the file, which must
        last."""
        return None

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        """How a quantised tensor is stored, else None."""
        return None

    def is_quantized(self) -> bool:
        """Whether some of the tensors are quantised."""
        return any(self.block_type(name) for name in self.keys())

    def parts(self) -> list[Source]:
        """The single files, each with its own metadata."""
        return [self]

    def describe(self) -> str:
        """The file, or `folder (n files)`, for messages."""
        if len(self.paths) == 1:
            return str(self.paths[0])
        return f"{self.paths[0].parent} ({len(self.paths)} files)"


class MergedSource(Source):
    """Several files that together hold one checkpoint."""

    def __init__(self, parts: Sequence[Source]):
        self._owner: dict[str, Source] = {}
        for part in parts:
            for name in part.keys():
                if name in self._owner and name not in part.replaces:
                    first = self._owner[name].describe()
                    raise SwanError(f"tensor {name} is in both {first} and {part.describe()}: give one copy of it")
                self._owner[name] = part
        self._parts = [one for part in parts for one in part.parts()]
        paths = [path for part in parts for path in part.paths]
        super().__init__(paths, {name: part.info(name) for name, part in self._owner.items()})

    def parts(self) -> list[Source]:
        return self._parts

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        return self._owner[name].read(name, rows)

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        return self._owner[name].read_into(name, out, start)

    def extent(self, name: str) -> Extent | None:
        return self._owner[name].extent(name)

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        return self._owner[name].packed(name, mapped, rows)

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        return self._owner[name].block_type(name)


def open_source(path_or_paths: str | PathLike | Iterable[str | PathLike]) -> Source:
    """Open a weight file, a `.safetensors.index.json`, a folder of weight files, or a list of files.

    Matrices that are stored with scales beside them are one tensor, see `scaled`; files of mlx-video have official
    names, see `mlx`; what diffusers has in two is one tensor, see `joined`.

    Raises SwanError, one line, for what cannot be a checkpoint: missing, empty, truncated, a Git-LFS pointer, a web
    page, an unknown container, missing shards, the same tensor in two files, or scales that do not fit.
    """
    from wan.weights.joined import join_halves
    from wan.weights.mlx import translate_mlx
    from wan.weights.scaled import join_scales

    paths = [path_or_paths] if isinstance(path_or_paths, (str, PathLike)) else list(path_or_paths)
    if not paths:
        raise SwanError("no weight files were given")
    parts = [_open_path(Path(path)) for path in paths]
    return join_halves(translate_mlx(join_scales(parts[0] if len(parts) == 1 else MergedSource(parts))))


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint in `folder`: its index, else all files of the first kind found."""
    indexes = visible_files(folder, "*" + INDEX_SUFFIX)
    if len(indexes) > 1:
        raise SwanError(f"{folder} holds several checkpoints ({_names(indexes)}): name the file to use")
    if indexes:
        return indexes
    for suffix in WEIGHT_SUFFIXES:
        files = [path for path in visible_files(folder, "*" + suffix) if not path.name.startswith(_OF_TRAINING)]
        if files:
            return [path for path in files if path.stem == "adapter_model"] or files
    return []


def config_beside(source: Source) -> dict[str, Any]:
    """The config.json next to the weights; empty if there is none. It may belong to another component.

    Raises SwanError for one that cannot be read.
    """
    path = source.paths[0].parent / "config.json" if source.paths else None
    if path is None or not os.path.lexists(path):
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise SwanError(f"{path}: no JSON object; repair it, or take it away")
    return config


def truncated(path: Path, expected: int, actual: int, qualifier: str = "") -> SwanError:
    """The error for a file that ends too early."""
    return SwanError(f"{path}: truncated, expected {qualifier}{expected:,} bytes, has {actual:,}; download it again")


def _open_path(path: Path) -> Source:
    if not os.path.isdir(path):
        return open_container(path)
    files = weight_files(path)
    if not files:
        found = _names([path / name for name in visible_names(path)]) or "nothing"
        raise SwanError(f"{path}: no weight files (looked for {', '.join(WEIGHT_SUFFIXES)}; found {found})")
    return open_source(files)


def open_container(path: Path) -> Source:
    """One file, as its container has it."""
    kind = sniff(path)
    if kind == "index":
        from wan.weights.containers.safetensors_file import open_index

        return open_index(path)
    if kind == "pth":
        from wan.weights.containers.pth import PthSource

        return PthSource(path)
    if kind == "gguf":
        from wan.weights.containers.gguf import GGUFSource

        return GGUFSource(path)
    from wan.weights.containers.safetensors_file import SafetensorsSource

    return SafetensorsSource(path)


def sniff(path: Path) -> str:
    """Container of a file by its first bytes: "safetensors", "index", "pth" or "gguf"."""
    with OpenedFile(path).open() as file:
        head = file.read(512)
    if not head:
        raise SwanError(f"{path}: the file is empty (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise SwanError(f"{path}: a Git-LFS pointer{_lfs_size(head)}, not the weights; run `git lfs pull`")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise SwanError(f"{path}: a web page, not weights; the download was an error or login page")
    if head.startswith(b"GGUF"):
        return "gguf"
    # Before pickles: a header's length may begin as they do.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= os.path.getsize(path):
        return "safetensors"
    # torch.save: a zip archive since 1.6, a row of pickles before.
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "pth"
    if path.name.endswith(INDEX_SUFFIX):
        return "index"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    raise SwanError(f"{path}: not a safetensors, PyTorch or GGUF file (it begins with {head[:8]!r})")


def _lfs_size(head: bytes) -> str:
    for line in head.splitlines():
        if line.startswith(b"size ") and line[5:].isdigit():
            return f" to a file of {int(line[5:]):,} bytes"
    return ""


def _names(paths: Sequence[Path], limit: int = 8) -> str:
    names = [path.name for path in paths[:limit]]
    return ", ".join(names) + (f" and {len(paths) - limit} more" if len(paths) > limit else "")
