"""What all processes that make one video must have been given alike, for `World.agree`. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan import __version__
from wan.files import open_plain
from wan.request import Request
from wan.request.options import CACHE_FILES, FIELD_OF

# Each machine may have its own: paths (what lies there is compared by `file_fact`), memory, patience, a random seed.
_OWN = (
    *("ckpt_dir", "ckpt_option", "files", "image", "image_option", "last_image", "save_file", "warnings"),
    *("vram_bytes", "ram_bytes", "dist_timeout", "seed", "device"),
)
_FLAGS = {field: flag for flag, field in FIELD_OF.items()} | {
    "guide_scale": "sample_guide_scale",
    "width": "size",
    "height": "size",
    "grid": "ulysses_size, --ring_size or --cfg_parallel",
    "image_sha256": "image",
}
_START_BYTES, _SAMPLES, _SAMPLE_BYTES = 4 << 20, 64, 4096


def request_facts(request: Request, spec: EasyDict, device_type: str, seeded: bool) -> dict[str, str]:
    """What decides the video and what ranks send each other, by flags. seeded: whether the seed was asked for."""
    told: dict[str, list[Any]] = {"version of swan-video": [__version__], "--device": [device_type]}
    told["--seed"] = [request.seed if seeded else None]
    for field, value in vars(request).items():
        if field in _OWN:
            continue
        if field == "loras":  # which files they are is told by what is in them
            told |= {f"--{flag}": [strength for _, strength in chosen] for flag, chosen in value.items()}
        elif field == "cache":
            told |= {f"--{name}": [choice] for name, choice in value.items() if name not in CACHE_FILES}
        else:
            told.setdefault(f"--{_FLAGS.get(field, field)}", []).append(value)
    told["--task"].append(spec)
    return {name: repr(values) for name, values in told.items()}


def file_fact(paths: Iterable[Path]) -> str:
    """Files by their sizes, their beginnings (with the headers, or most of these) and samples of the rest, not by their
    names. Raises SwanError, or OSError, for what cannot be read."""
    return " ".join(sorted(map(_file_digest, paths)))


def _file_digest(path: Path) -> str:
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode() + file.read(_START_BYTES))
        for index in range(1, _SAMPLES + 1):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
