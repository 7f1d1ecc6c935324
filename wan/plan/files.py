"""The files of a run: where they are, how large, and two that contradict each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.errors import SwanError, UsageError
from wan.files import open_plain, read_json, visible_files
from wan.request import Request
from wan.weights.locate import in_cache, locate
from wan.weights.safetensors_header import read_index
from wan.weights.source import open_source


def find_files(request: Request, spec: EasyDict) -> list[dict[str, Any]]:
    """One row a file: component, path, bytes (None if missing), hub (True: a run downloads it).

    LoRAs are rows of the component "lora".
    """
    in_hub = _is_in_hub(request)
    rows = []
    for part, official in _official_paths(spec).items():
        paths = component_files(request, spec, part)
        hub = in_hub and part not in request.files and not paths
        sizes = {path: size_of(path) for path in paths} or {Path(request.ckpt_dir) / official: None}
        rows += [{"component": part, "path": str(path), "bytes": size, "hub": hub} for path, size in sizes.items()]
    loras = dict.fromkeys(path for chosen in request.loras.values() for path, _ in chosen)  # each once, in order
    for path in loras:
        size = size_of(Path(path)) if Path(path).exists() else None
        rows.append({"component": "lora", "path": path, "bytes": size, "hub": False})
    return rows


def missing_files(plan: Mapping[str, Any]) -> list[str]:
    """Paths in the plan that do not exist here. Files of a hub id are not looked for."""
    return [row["path"] for row in plan["files"] if row["bytes"] is None and not row["hub"]]


def component_files(request: Request, spec: EasyDict, part: str) -> list[Path]:
    """The files of "dit" (or "high", "low"), "t5", "tokenizer", "clip" or "vae"; [] if there are none here.

    Of a hub id those that are in its cache, whole.
    """
    ckpt_dir = request.ckpt_dir
    is_in_hub = _is_in_hub(request) and part not in request.files
    if is_in_hub:
        ckpt_dir = in_cache(request.ckpt_option)
        if ckpt_dir is None:
            return []
    # `locate` stops at the first component that is missing, and a plan lists them all: so each is located alone, with
    # any existing file standing in for the others.
    stand_ins = {other: __file__ for other in _official_paths(spec) if other != part}
    own = {part: request.files[part]} if part in request.files else {}
    try:
        found = locate(ckpt_dir, spec, {**stand_ins, **own})
    except SwanError:
        return []
    if part == "tokenizer":
        return [found.tokenizer]
    paths = found.dit["model" if part == "dit" else part] if part in ("dit", "high", "low") else getattr(found, part)
    if is_in_hub and not all(map(_has_all_shards, paths or [])):
        return []  # the rest will be downloaded
    return paths or []


def _has_all_shards(path: Path) -> bool:
    if not path.name.endswith(".index.json"):
        return True
    with contextlib.suppress(SwanError):
        return all(os.path.isfile(path.parent / name) for name in set(read_index(path).values()))
    return True  # and is refused by whoever opens it


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
    if not request.ckpt_option or not Path(request.ckpt_option).is_dir():
        return
    for part in dict(spec.get("experts") or {"dit": ""}):
        path = request.files.get(part)
        if not path or not is_gguf(path):
            continue
        others = {name: file for name, file in request.files.items() if name != part}
        own = component_files(_Without(request, others), spec, part)
        if own and not any(map(is_gguf, own)) and _is_quantised(own):
            flag = "--gguf" if part == "dit" else f"--gguf_{part}"
            raise UsageError(
                f"{flag} {path} and --ckpt_dir {request.ckpt_option} both hold quantised weights of the same network"
                f" ({own[0].name}): give a --ckpt_dir that is not quantised, or leave {flag} out"
            )


class _Without:
    """A request as `component_files` reads it, with other files."""

    def __init__(self, request: Request, files: dict[str, str]):
        self.ckpt_dir, self.ckpt_option, self.files = request.ckpt_dir, request.ckpt_option, files


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with contextlib.suppress(SwanError, OSError), open_plain(path) as file:
        return file.read(4) == b"GGUF"
    return False


def _is_quantised(paths: list[Path]) -> bool:
    with contextlib.suppress(SwanError):
        if open_source(paths).is_quantized():
            return True
    with contextlib.suppress(SwanError):
        config = read_json(paths[0].parent / "config.json")
        return isinstance(config, dict) and "quantization" in config
    return False


def _is_in_hub(request: Request) -> bool:
    return request.ckpt_option is not None and not Path(request.ckpt_dir).exists()


def _official_paths(spec: EasyDict) -> dict[str, str]:
    """Component -> its place in the official checkpoint folder."""
    networks = spec.get("experts") or {"dit": "diffusion_pytorch_model*.safetensors"}
    return {**networks, **{name: spec.files[name] for name in ("t5", "tokenizer", "clip", "vae") if name in spec.files}}
