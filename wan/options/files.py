"""Files that are read, and the one that is written."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.errors import UsageError, printable
from wan.files import open_plain
from wan.options.names import DEFAULT_TASK, FILE_FLAGS, GGUF_FLAGS, LORA_FLAGS, MAX_STRENGTH, LoraChoice
from wan.options.schema import Asked
from wan.options.values import absolute, is_number, of_kind, shown
from wan.tasks import embedded_checkpoint
from wan.weights.infer_task import infer_task

# Names by which folders of weights are read: these are not written to, even inside of a folder that holds videos too.
_OF_CHECKPOINTS = re.compile(r".*\.(safetensors|gguf|pth|pt|bin|ckpt|model)|(.*config|.*index|.*_map|tokenizer)\.json")


def told_task(get: Mapping[str, Any], among: Sequence[str] = ()) -> tuple[str, str]:
    """The task of the transformer that is given, by flags, and how it was told; else the default. among: see
    `infer_task`."""
    files = {part: path for part in ("dit", "high", "low") if (path := _file(get, part))}
    folder = get["ckpt_dir"] or ""
    if files or os.path.isdir(folder) or _is_hub_id(folder):
        return infer_task(folder, files, among)
    return DEFAULT_TASK, ""


def check_ckpt_dir(at: Asked, value: str | None) -> str:
    spec = at.spec
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


def check_file(spec: EasyDict, get: Mapping[str, Any], part: str) -> str | None:
    """The single file in place of the checkpoint's own for a component, absolute, by the flag of either name."""
    flag = next((flag for flag in _flags(part) if get[flag] is not None), None)
    parts = ["vae", "tae", "t5", "tokenizer", *(["high", "low"] if "experts" in spec else ["dit"]), *spec.files]
    if flag and part not in parts:
        usable = (one for one in (*FILE_FLAGS, *GGUF_FLAGS) if GGUF_FLAGS.get(one, one) in parts)
        usable = ", ".join(f"--{one}" for one in usable)
        raise UsageError(f"--{flag} has no meaning for {spec.name}; single files it takes: {usable}")
    return _file(get, part)


def _flags(part: str) -> list[str]:
    """That name a file for a component."""
    return [part, *(name for name, its in GGUF_FLAGS.items() if its == part)]


def _file(get: Mapping[str, Any], part: str) -> str | None:
    """`check_file`, whatever the task."""
    flags = {flag: get[flag] for flag in _flags(part) if get[flag] is not None}
    if not flags:
        return None
    flag, path = next(iter(flags.items()))
    if not os.path.exists(path):
        raise UsageError(f"--{flag}: no file {path or repr(path)}")
    if flag == "tokenizer" and not os.path.isdir(path):
        raise UsageError(f"--tokenizer takes a folder, and {path} is a file")
    if len(flags) > 1:
        raise UsageError(f"--{' and --'.join(flags)} both name a file for the same component; give one")
    if flag in GGUF_FLAGS and not _is_gguf(path):
        others = f"is not a GGUF file; for other formats use --{part}"
        raise UsageError(f"--{flag}: {path} {others if os.path.getsize(path) else 'is empty: download it again'}")
    return absolute(path)


def check_lora(spec: EasyDict, flag: str, value: Any) -> LoraChoice:
    """LoRAs of one flag: PATH or PATH:STRENGTH, or a pair of both; one or a list.

    Raises UsageError, also for a file that is not there; what is in the files is not looked at.
    """
    if not value:
        return ()
    if LORA_FLAGS[flag] and "experts" not in spec:
        raise UsageError(f"--{flag} is for tasks with two experts; {spec.name} has one: use --lora")
    is_one = isinstance(value, str) or (len(value) == 2 and isinstance(value[1], (int, float)))
    return tuple(_lora(one, flag) for one in ([value] if is_one else value))


def relighting_lora(spec: EasyDict, ckpt_dir: str) -> LoraChoice:
    """The LoRA that a checkpoint has beside its transformer, for a character that takes the light of its background.

    Source: behaviour of the official `--use_relighting_lora` (rank = alpha, so its strength is 1).
    """
    name = spec.files.get("relighting")
    if name is None:
        raise UsageError(f"--use_relighting_lora: {spec.name} has no relighting LoRA")
    path = Path(ckpt_dir) / name
    if not path.is_file():
        raise UsageError(f"--use_relighting_lora: no {name} in {ckpt_dir}; download it, and give it with --lora FILE")
    return ((str(path.resolve()), 1.0),)


def check_loras(spec: EasyDict, asked: Mapping[str, Any]) -> dict[str, LoraChoice]:
    """LoRAs by flag, where there are any, of values as the flags take them."""
    found = {flag: check_lora(spec, flag, of_kind(asked.get(flag), flag, "loras")) for flag in LORA_FLAGS}
    return {flag: chosen for flag, chosen in found.items() if chosen}


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
        raise UsageError(f"--{flag} {path}: the strength must be a number, not {shown(strength)}")
    if abs(float(strength)) > MAX_STRENGTH:
        allowed = f"a number from -{MAX_STRENGTH} to {MAX_STRENGTH}"
        raise UsageError(f"--{flag} {path}: the strength must be {allowed}, not {shown(strength)}")
    return str(Path(path).resolve()), float(strength)


def _is_gguf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open_plain(path) as file:
        return file.read(4) == b"GGUF"


def check_save_file(value: str | None, frame_num: int, stem: str = "", prompt: str = "") -> str:
    """Absolute path of the output, in a folder that can be written to."""
    if not value:
        slug = re.sub(r"[^\w-]+", "_", prompt)[:40].strip("_")
        extension = "png" if frame_num == 1 else "mp4"
        # The last part tells apart runs that start in the same second.
        parts = (stem, slug, time.strftime("%Y%m%d-%H%M%S"), secrets.token_hex(3))
        value = f"{'_'.join(filter(None, parts))}.{extension}"
    path = Path(value).absolute()
    if path.suffix.lower() not in (".mp4", ".png"):
        raise UsageError(f"--save_file must end in .mp4 (or .png for one frame), not {path.name!r}")
    if path.suffix.lower() == ".png" and frame_num != 1:
        raise UsageError(f"--save_file: a PNG holds one frame, and {frame_num} are asked; use .mp4 or --frame_num 1")
    check_writable(str(path), "save_file")
    return str(path)


def check_writable(path: str, flag: str) -> None:
    """That a file can be written at `path`. Nothing is left there."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise UsageError(f"--{flag}: {printable(path)} is a folder")
    if not os.path.isdir(folder):
        raise UsageError(f"--{flag}: no folder {printable(folder)}")
    try:
        with tempfile.TemporaryFile(dir=folder), contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails where the name itself is too long
    except OSError as error:
        raise UsageError(f"--{flag}: cannot write to {printable(folder)}: {error.strerror}") from error


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[tuple[str, str | None]]) -> None:
    """That no output, by its flag, takes the place of an input or of another output. inputs: (flag, file or folder)."""
    written = [(flag, path) for flag, path in outputs.items() if path]
    for index, (flag, path) in enumerate(written):
        for other, there in [*written[:index], *inputs]:
            if there and _same_file(path, there):
                raise UsageError(f"--{flag} and --{other} both name {printable(path)}: it would be overwritten")
            if there and _is_part_of(path, there):
                raise UsageError(f"--{flag} {printable(path)} is a file of --{other}: it would be overwritten")


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.realpath(one) == os.path.realpath(other) or os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _is_part_of(path: str, folder: str) -> bool:
    """Whether a file that is there belongs to a checkpoint or another folder that is read, by its place and name."""
    if folder.endswith(".index.json"):  # the folder of its shards
        folder = os.path.dirname(folder)
    if not os.path.isfile(path) or not os.path.isdir(folder):
        return False
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    return inside and bool(_OF_CHECKPOINTS.fullmatch(os.path.basename(os.path.realpath(path))))
