"""The files that travel with a job: what its video is made from, there, and what comes of it, back. No torch.

What is loaded (checkpoints, LoRAs) does not: it is found at the same path on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.files import open_plain, visible_files
from wan.options import FLAGS
from wan.options.names import FILE_KINDS

_FOLDER = "src_root_path"  # the one option that names a folder of inputs


@dataclass(frozen=True)
class Piece:
    """What an option names. files: (path below its own folder, how settings call it, contents) each."""

    value: str
    files: Sequence[tuple[str, str, bytes]]


def pack(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[Piece]]:
    """The options of a video as another machine can have them, and the files that go with them.

    What is not here does not travel: the other machine has it, or says that it is missing. Raises SwanError for a file
    that cannot be read.
    """
    pieces = {}
    for flag, value in options.items():
        for path in _named(flag, value):
            if path not in pieces and (piece := _piece(flag, path)).files:
                pieces[path] = piece
    return {flag: _absolute(flag, value) for flag, value in options.items()}, list(pieces.values())


def unpack(
    options: Mapping[str, Any], pieces: Sequence[Piece], folder: Path
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The options with the files where they are put now, below `folder`; how settings call these files (`called` of a
    Request); and how the user did. Raises OSError."""
    placed, called = {}, {}
    for number, piece in enumerate(pieces):
        own = folder.resolve() / str(number)
        for name, told, data in piece.files:
            path = own / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            called[str(path)] = told
        placed[piece.value] = str(own / os.path.basename(os.path.abspath(piece.value)))
    moved = dict(options)
    for flag, value in options.items():
        if _named(flag, value):
            is_one = isinstance(value, str)
            moved[flag] = placed.get(value, value) if is_one else [placed.get(one, one) for one in value]
    return moved, called, {there: here for here, there in placed.items()}


def _named(flag: str, value: Any) -> list[str]:
    """Paths of inputs."""
    if value is None or (FLAGS[flag].kind not in FILE_KINDS and flag != _FOLDER):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _piece(flag: str, value: str) -> Piece:
    path = Path(value)
    if not path.exists() or (path.is_dir() and flag != _FOLDER):
        return Piece(value, ())
    paths = visible_files(path) if path.is_dir() else [path]
    base = Path(os.path.abspath(value)).parent
    files = []
    for one in paths:
        with open_plain(one) as file:
            told = value if flag == "cache_coefficients" else str(one.resolve())
            files.append((os.path.relpath(os.path.abspath(one), base), told, file.readall()))
    return Piece(value, files)


def _absolute(flag: str, value: Any) -> Any:
    """What is loaded may be named from the folder that this process works in, where others do not."""
    if FLAGS[flag].kind == "path" and flag != _FOLDER:
        return os.path.abspath(value) if os.path.exists(value) else value
    if FLAGS[flag].kind == "loras" and value:
        return _absolute_lora(value)
    return value


def _absolute_lora(value: Any) -> Any:
    """FILE, FILE:STRENGTH, [FILE, STRENGTH], or a list of these."""
    if isinstance(value, str):
        return os.path.abspath(os.path.expanduser(value))
    return [_absolute_lora(one) if isinstance(one, (str, list, tuple)) else one for one in value]
