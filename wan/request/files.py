"""Files that are read, and the one that is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.errors import UsageError
from wan.request.options import FILE_FLAGS, GGUF_FLAGS, LORA_FLAGS, MAX_STRENGTH, LoraChoice
from wan.request.values import absolute, is_number
from wan.tasks import embedded_checkpoint


def check_ckpt_dir(spec: EasyDict, value: str | None) -> str:
    if not value:
        embedded = embedded_checkpoint(spec)
        if embedded is None:
            where = " or ".join(spec.hub)
            raise UsageError(f"{spec.name} needs --ckpt_dir: a folder with the files of {where}, or that hub id itself")
        return str(embedded)
    if not os.path.exists(value) and not _is_hub_id(value):
        raise UsageError(f"--ckpt_dir: no folder {value}")
    if os.path.isfile(value):
        raise UsageError(f"--ckpt_dir takes a folder or a hub id; for the single file {value} use --dit, --vae or --t5")
    return absolute(value)


def _is_hub_id(value: str) -> bool:
    """OWNER/NAME or OWNER/NAME@REVISION, and not a path below a folder that exists here (that is a mistyped path)."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", value)) and not os.path.exists(value.split("/")[0])


def check_files(spec: EasyDict, get: Mapping[str, Any]) -> dict[str, str]:
    """Single files in place of the checkpoint's own, by component, absolute."""
    allowed = ["vae", "t5", "tokenizer", *(["high", "low"] if "experts" in spec else ["dit"])] + ["clip"] * (
        "clip" in spec.files
    )
    files: dict[str, str] = {}
    for flag in (*FILE_FLAGS, *GGUF_FLAGS):
        part, path = GGUF_FLAGS.get(flag, flag), get[flag]
        if not path:
            continue
        if part not in allowed:
            flags = (one for one in (*FILE_FLAGS, *GGUF_FLAGS) if GGUF_FLAGS.get(one, one) in allowed)
            usable = ", ".join(f"--{one}" for one in flags)
            raise UsageError(f"--{flag} has no meaning for {spec.name}; single files it takes: {usable}")
        if not os.path.exists(path):
            raise UsageError(f"--{flag}: no file {path}")
        if flag == "tokenizer" and not os.path.isdir(path):
            raise UsageError(f"--tokenizer takes a folder, and {path} is a file")
        if part in files:
            raise UsageError(f"--{part} and --{flag} both name a file for the same component; give one")
        if flag in GGUF_FLAGS and not _is_gguf(path):
            raise UsageError(f"--{flag}: {path} is not a GGUF file; for other formats use --{part}")
        files[part] = absolute(path)
    return files


def check_loras(spec: EasyDict, get: Mapping[str, Any]) -> dict[str, LoraChoice]:
    """What `get` has under the flags of LORA_FLAGS, where it has something.

    A LoRA is PATH or PATH:STRENGTH, or a pair of both; a flag takes one or a list. Raises UsageError, also for a file
    that is not there; what is in the files is not looked at.
    """
    loras: dict[str, LoraChoice] = {}
    for flag, expert in LORA_FLAGS.items():
        value = get.get(flag)
        if not value:
            continue
        if expert and "experts" not in spec:
            raise UsageError(f"--{flag} is for tasks with two experts; {spec.name} has one: use --lora")
        is_one = isinstance(value, str) or (len(value) == 2 and isinstance(value[1], (int, float)))
        loras[flag] = tuple(_lora(one, flag) for one in ([value] if is_one else value))
    return loras


def _lora(value: str | tuple[str, float], flag: str) -> tuple[str, float]:
    """(absolute path, strength). A path that exists is meant as it is, colons and all."""
    path, strength = (value, 1.0) if isinstance(value, str) else value
    path = os.path.expanduser(path)
    if isinstance(value, str) and not os.path.exists(path):
        head, colon, tail = path.rpartition(":")
        if colon and (os.path.exists(head) or is_number(tail)):
            path, strength = head, tail
    if not os.path.exists(path):
        raise UsageError(f"--{flag}: no file {path}")
    if not is_number(strength):
        raise UsageError(f"--{flag} {path}: the strength must be a number, not {strength!r}")
    if abs(float(strength)) > MAX_STRENGTH:
        allowed = f"a number from -{MAX_STRENGTH} to {MAX_STRENGTH}"
        raise UsageError(f"--{flag} {path}: the strength must be {allowed}, not {strength}")
    return str(Path(path).resolve()), float(strength)


def _is_gguf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def check_save_file(value: str | None, frame_num: int, stem: str, prompt: str) -> str:
    """Absolute path of the output, in a folder that can be written to."""
    if not value:
        slug = re.sub(r"[^\w-]+", "_", prompt)[:40].strip("_")
        extension = "png" if frame_num == 1 else "mp4"
        value = "_".join(filter(None, (stem, slug, time.strftime("%Y%m%d-%H%M%S")))) + f".{extension}"
    path = Path(value).absolute()
    if path.suffix.lower() not in (".mp4", ".png"):
        raise UsageError(f"--save_file must end in .mp4 (or .png for one frame), not {path.name!r}")
    if path.suffix.lower() == ".png" and frame_num != 1:
        raise UsageError(f"--save_file: a PNG holds one frame, and {frame_num} are asked; use .mp4 or --frame_num 1")
    if os.path.isdir(path):
        raise UsageError(f"--save_file: {path} is a folder")
    if not os.path.isdir(path.parent):
        raise UsageError(f"--save_file: no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent), contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails where the name itself is too long
    except OSError as error:
        raise UsageError(f"--save_file: cannot write to {path.parent}: {error.strerror}") from error
    return str(path)


def sha256_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
