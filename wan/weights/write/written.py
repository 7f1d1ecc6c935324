"""Folders that the converter wrote, and their replacement: what it did not write is never deleted.

Each weight file that is written tells in its header, under `swan_files`, what was written beside it: place in the
folder -> "" for weight files, which speak for themselves, or else size and SHA-256 of the start; and under
`swan_tensors` a digest of its own tensors' names, shapes and places. All other files in a folder, or other contents
under these names, are somebody's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain, parse_json
from wan.weights.containers.safetensors_header import read_header

_KEY = "swan_files"
_TENSORS_KEY = "swan_tensors"
_OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # who write them again
_START_BYTES = 1 << 20  # of a file are looked at: some hold gigabytes


def list_files(folder: Path, weights: Collection[str]) -> dict[str, str]:
    """What goes into the metadata of each weight file: of `weights`, which are written next, and what is there."""
    others = {name: _contents(folder / name) for name in _walk(folder)}
    return {_KEY: json.dumps(others | dict.fromkeys(weights, ""), sort_keys=True)}


def name_tensors(header: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the metadata of a weight file of these tensors: others may save it again with theirs."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {_TENSORS_KEY: hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()}


def check_output(output: Path, replace: bool) -> None:
    """Raises UsageError where the folder `output` holds anything that is not to be replaced."""
    if not output.parent.is_dir():
        raise UsageError(f"--output-dir: no folder {printable(output.parent)}")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output-dir: {printable(output)} is a file")
    try:
        there = _walk(output) if output.exists() else []
        if there and not replace:
            raise UsageError(f"--output-dir: {printable(output)} is not empty; --overwrite replaces it")
        others = sorted(set(there) - _written(output, there))
    except OSError as error:
        raise SwanError(f"--output-dir: cannot read {printable(output)}: {one_line(error)}") from error
    if others:
        held = f"holds other things as well ({printable(others[0])}), which this converter did not write"
        raise UsageError(f"--output-dir: {printable(output)} {held}: not replaced")


def check_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError where an input lies in `output`, by whatever names and links, or a folder of inputs around
    it."""
    inputs = list(inputs)
    for path in (one for given in inputs for one in (given, *given.rglob("*"))):
        real = Path(os.path.realpath(path))
        if any(_is_same(one, output) for one in (real, *real.parents)):
            raise UsageError(f"--output-dir {printable(output)} holds the input {printable(path)}")
    for path in inputs:
        if any(_is_same(one, path) for one in (output, *output.parents)):
            raise UsageError(f"--output-dir {printable(output)} lies in the input {printable(path)}")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def _walk(folder: Path) -> list[str]:
    """Places of all files, links and empty folders below. Raises OSError for a folder that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for path, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        files = [name for name in files if name not in _OF_FILE_MANAGERS]
        is_empty = not folders and not files and Path(path) != folder
        found += [Path(path, name).relative_to(folder).as_posix() for name in (*files, *links, *[""] * is_empty)]
    return found


def _written(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the files that the converter wrote."""
    weights, beside = set(), {}
    for name in names:
        told = _told(folder / name) if name.endswith(".safetensors") else {}
        if told.get(name) == "":
            weights.add(name)
            beside |= told
    return weights | {name for name in names if beside.get(name) and beside[name] == _contents(folder / name)}


def _told(path: Path) -> Mapping[str, str]:
    """What the header of a weight file says was written with it."""
    if path.is_symlink():
        return {}
    with contextlib.suppress(SwanError, OSError, ValueError):
        open_plain(path).close()
        header, _ = read_header(path)
        metadata = header.get("__metadata__", {})
        is_ours = metadata.get(_TENSORS_KEY) == name_tensors(header)[_TENSORS_KEY]
        told = parse_json(metadata[_KEY]) if is_ours and _KEY in metadata else {}
        return told if isinstance(told, dict) else {}
    return {}


def _contents(path: Path) -> str:
    """Of a plain file: its size, and a digest of how it begins; of anything else what it is."""
    if path.is_symlink() or not path.is_file():
        return "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
    try:
        with open_plain(path) as file:
            return f"{os.fstat(file.fileno()).st_size} {hashlib.sha256(file.read(_START_BYTES)).hexdigest()}"
    except SwanError:
        return "unreadable"
