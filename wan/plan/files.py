"""The files of a run: where they are, how large, and two that contradict each other."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.errors import SwanError, UsageError
from wan.files import open_plain, visible_files
from wan.options import Request
from wan.tasks.kinds import kind_of
from wan.weights.checkpoint import Checkpoint
from wan.weights.source import Source, config_beside


def checkpoint_of(request: Request, spec: EasyDict) -> Checkpoint:
    """The one that the request brings along; else what is here of its files."""
    known = request.load.checkpoint
    if known is not None and known.spec["name"] == spec["name"]:
        return known
    return Checkpoint(request.load.ckpt_dir, spec, request.load.files, partial=True)


def vae_names(request: Request, spec: EasyDict) -> list[str]:
    """The VAE, but where a TAE decodes and nothing is encoded, and the TAE, where there is one."""
    has_tae = checkpoint_of(request, spec).decoder == "tae"
    encodes = kind_of(spec).encodes(request.sample)
    return [*(["vae"] if encodes or not has_tae else []), *(["tae"] if has_tae else [])]


def find_files(request: Request, spec: EasyDict) -> list[dict[str, Any]]:
    """One row a file: component, path, bytes (None if missing), hub (True: a run downloads it).

    LoRAs are rows of the component "lora".
    """
    checkpoint, rows = checkpoint_of(request, spec), []
    for part, official in _official_paths(request, spec).items():
        paths = checkpoint.paths(part)
        hub = checkpoint.hub and part not in request.load.files and not paths
        sizes = {path: size_of(path) for path in paths} or {Path(request.load.ckpt_dir) / official: None}
        rows += [{"component": part, "path": str(path), "bytes": size, "hub": hub} for path, size in sizes.items()]
    loras = dict.fromkeys(path for chosen in request.sample.loras.values() for path, _ in chosen)  # each once, in order
    for path in loras:
        size = size_of(Path(path)) if Path(path).exists() else None
        rows.append({"component": "lora", "path": path, "bytes": size, "hub": False})
    return rows


def missing_files(plan: Mapping[str, Any]) -> list[str]:
    """Paths in the plan that do not exist here. Files of a hub id are not looked for."""
    return [row["path"] for row in plan["files"] if row["bytes"] is None and not row["hub"]]


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with contextlib.suppress(SwanError, OSError), open_plain(path) as file:
        return file.read(4) == b"GGUF"
    return False


def size_of(path: Path) -> int:
    """Bytes of a file, of all files in a folder, or of all shards of an index."""
    if path.is_dir():
        return sum(part.stat().st_size for part in visible_files(path))
    if path.name.endswith(".index.json"):
        shards = visible_files(path.parent, path.name.removesuffix(".safetensors.index.json") + "-*.safetensors")
        return sum(part.stat().st_size for part in shards)
    return path.stat().st_size


def check_one_quantised(request: Request, spec: EasyDict) -> None:
    """Raises UsageError where a GGUF file is given for a DiT that the --ckpt_dir given holds quantised in another way.

    Which of the two is meant cannot be told. A GGUF file in the folder is only one more file to choose from.
    """
    folder = checkpoint_of(request, spec).files.folder or request.load.ckpt_option
    if not request.load.ckpt_option or not Path(folder).is_dir():
        return
    for part in dict(spec.get("experts") or {"dit": ""}):
        path = request.load.files.get(part)
        if not path or not is_gguf(path):
            continue
        others = {other: file for other, file in request.load.files.items() if other != part}
        own = Checkpoint(folder, spec, others, partial=True)
        paths = own.paths(part)
        if paths and not any(map(is_gguf, paths)) and _is_quantised(own.source(part)):
            flag = "--gguf" if part == "dit" else f"--gguf_{part}"
            raise UsageError(
                f"{flag} {path} and --ckpt_dir {request.load.ckpt_option} both hold quantised weights of the same"
                f" network ({paths[0].name}): give a --ckpt_dir that is not quantised, or leave {flag} out"
            )


def _is_quantised(source: Source) -> bool:
    with contextlib.suppress(SwanError):
        return source.is_quantized() or "quantization" in config_beside(source)
    return False


def _official_paths(request: Request, spec: EasyDict) -> dict[str, str]:
    """Component -> its place in the official checkpoint folder; of a TAE, which has none, "tae"."""
    networks = spec.get("experts") or {"dit": "diffusion_pytorch_model*.safetensors"}
    others = [name for name in ("t5", "tokenizer", "wav2vec", "clip") if name in spec.files]
    return {**networks, **{name: spec.files.get(name, name) for name in [*others, *vae_names(request, spec)]}}
