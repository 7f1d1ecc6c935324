"""What is taken from a video that is made again. It may come from anybody, so it chooses how to sample, but not which
files of this machine are opened, what is downloaded or where anything is written."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError, printable
from wan.options import FLAGS, STORED
from wan.options.beside import beside
from wan.options.names import DEFAULT_TASK, LORA_FLAGS, STORED_FILES, STORED_PICTURES
from wan.options.values import of_kind
from wan.pictures import image_sha256
from wan.tasks import embedded_checkpoint, load_task

MOST_SHOWN = 4
_NETWORK = ("//", "\\\\")  # where Windows asks another machine


def replay_options(
    settings: Mapping[str, Any], given: Mapping[str, Any], *, files: bool = False, warnings: list[str] | None = None
) -> dict[str, Any]:
    """Options of a stored run, overridden by those `given` now (not None).

    files: whether files that the settings name are used. Without it they are if they lie in the folder of the task's
    embedded checkpoint, and pictures also if the settings have their hashes. A hub id must always be given.
    warnings: lines to show are added to it.

    Raises SwanError for settings that are damaged or a picture that changed since then, and UsageError, which says what
    to add to the command line, for files that are not given.
    """
    options, hashes = _stored(settings, warnings)
    if "dtype" in options:  # of a video made when the text encoder had the type of the DiT
        options.setdefault("t5_dtype", options["dtype"])
    given = {name: value for name, value in given.items() if value is not None}
    if "first_frame" in given:
        given.setdefault("image", given.pop("first_frame"))
    spec = load_task(given.get("task", options.get("task", DEFAULT_TASK)))
    options, given = beside(options, given, spec)
    if lost := [name for name in settings.get("in_memory", []) if name not in given]:
        raise UsageError(f"the video was made from a picture in memory, which is in no file: give it with --{lost[0]}")
    named = {name: value for name, value in options.items() if name not in given}
    home = embedded_checkpoint(spec)
    _check_files(named, hashes, str(home) if home else None, files)
    for flag in STORED_PICTURES:
        if flag in named and flag in hashes:
            _check_picture(flag, named[flag], hashes[flag])
    return {**options, **given}


def _stored(settings: Mapping[str, Any], warnings: list[str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The options and the hashes of pictures that settings hold, each of the kind that it should be."""
    unused = sorted(
        printable(name) for name in set(settings) - {*STORED, "swan", "image_sha256", "in_memory", "extended_from"}
    )
    if unused and warnings is not None:
        warnings.append(f"not taken from the video: {', '.join(unused)[:200]}")
    options = {name: settings[name] for name in STORED if settings.get(name) is not None}
    try:
        options = {name: of_kind(value, name, FLAGS[name].kind) for name, value in options.items()}
    except UsageError as error:
        raise SwanError(f"the settings in the video are damaged: {error}") from error
    hashes, memory = settings.get("image_sha256", {}), settings.get("in_memory", [])
    wrong = [flag for flag in LORA_FLAGS if not all(isinstance(pair, list) for pair in options.get(flag, []))]
    wrong += [] if isinstance(hashes, dict) else ["image_sha256"]
    wrong += [] if isinstance(memory, list) and all(one in STORED for one in memory) else ["in_memory"]
    if wrong:
        raise SwanError(f"the settings in the video are damaged: {wrong[0]} is not what Swan writes there")
    return options, hashes


def _check_files(named: Mapping[str, Any], hashes: Mapping[str, str], home: str | None, allowed: bool) -> None:
    """Refuse what only the video names. home: the folder of the task's embedded checkpoint; allowed: files are used.

    A hub id is one however that is: it would be downloaded.
    """
    missing: list[tuple[str, str, bool]] = []  # path, flag to add, whether it is a hub id
    for flag in (*STORED_FILES, *STORED_PICTURES):
        value = named.get(flag)
        for path, *strength in _parts(flag, value) if value else []:
            is_hub = flag == "ckpt_dir" and not os.path.isabs(path)
            proven = flag in STORED_PICTURES and flag in hashes and not path.startswith(_NETWORK)
            if is_hub or not (allowed or proven or _is_inside(path, home)):
                text = shlex.quote(printable(":".join([path, *map(str, strength)])))
                missing.append((printable(path.split(",")[0]), f"--{flag} {text}", is_hub))
    if missing:
        flags = " ".join(flag for _, flag, _ in missing[:MOST_SHOWN]) + " ..." * (len(missing) > MOST_SHOWN)
        also = "" if all(is_hub for *_, is_hub in missing) else ", or --replay_files to use all files that it names"
        raise UsageError(f"the video was made from {missing[0][0]}: add {flags}{also}")


def _parts(flag: str, value: Any) -> list[list[Any]]:
    """[path] or [path, strength] of each file that an option names, as the flag takes it."""
    if flag == "src_ref_images":
        return [[",".join(value)]]
    return value if flag in LORA_FLAGS else [[value]]


def _is_inside(path: str, folder: str | None) -> bool:
    """Told from the names alone: what a stranger names is not even looked for."""
    return folder is not None and Path(os.path.normpath(path)).is_relative_to(folder)


def _check_picture(flag: str, path: str, digest: str) -> None:
    if not os.path.isfile(path):
        raise UsageError(f"the image of the stored run is gone: {printable(path)}; give it with --{flag}")
    if image_sha256(path) != digest:
        where = printable(path)
        raise SwanError(f"the image changed since the stored run: {where}; give --{flag} to use it all the same")
