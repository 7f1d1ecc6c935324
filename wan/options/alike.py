"""What all processes that make one video must have been given alike, for `World.agree`. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan import __version__
from wan.files import open_plain
from wan.options import Request
from wan.options.names import FILE_FLAGS, LORA_FLAGS, VIDEO_FLAGS
from wan.options.schema import flag_of

# Each machine may have its own: paths (what lies there is compared by `file_fact`), memory, patience, a random seed.
_OWN = {
    *("ckpt_dir", "ckpt_option", *FILE_FLAGS, *LORA_FLAGS, "cache"),
    *("image", "image_option", "last_frame", *VIDEO_FLAGS, "src_ref_images"),
    *("vram_bytes", "ram_bytes", "dist_timeout", "seed", "device", *("ulysses_size", "ring_size", "cfg_parallel")),
    *("checkpoint", "task_told"),
}
_FLAGS = {"width": "size", "height": "size", "image_sha256": "image", "coefficients": "cache_coefficients"}
_FLAGS |= {"film_frames": "src_pose"}
_FLAGS |= {"grid": "ulysses_size, --ring_size or --cfg_parallel"}
_START_BYTES, _SAMPLES, _SAMPLE_BYTES = 4 << 20, 64, 4096


def request_facts(request: Request, spec: EasyDict, device_type: str, seeded: bool) -> dict[str, str]:
    """What decides the video and what ranks send each other, by flags. seeded: whether the seed was asked for."""
    told: dict[str, list[Any]] = {"version of swan-video": [__version__], "--device": [device_type]}
    told["--seed"] = [request.sample.seed if seeded else None]
    load, sample = request.load, request.sample
    for part in (load, sample):
        for one in fields(part):
            if one.name not in _OWN:
                flag = _FLAGS.get(one.name, flag_of(one))
                told.setdefault(f"--{flag}", []).append(getattr(part, one.name))
    # Which files they are is told by what is in them.
    told |= {f"--{flag}": [strength for _, strength in chosen] for flag, chosen in sample.loras.items()}
    told |= {f"--{name}": [value] for name, value in sample.cache.items() if name != "cache_coefficients"}
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
