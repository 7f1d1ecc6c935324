"""Rows of a run as JSON files of a folder, one each, so that a run can end at any time and go on later. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wan.files import atomic, read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
# States of a row: "running" is left where a process ended in its middle.
RUNNING, DONE, FAILED, NOT_RUN = "running", "done", "failed", "not run"


def write_row(folder: Path, name: str, state: str, reason: str = "", **more: Any) -> None:
    """One row, whole or not at all. reason: one line, of a row that failed or was not run."""
    row = {"row": name, "state": state, "reason": reason, **more}
    with atomic(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def read_row(folder: Path, name: str) -> dict[str, Any]:
    """What is known of a row; {} where it is not there, or the file is another benchmark's."""
    path = folder / f"{name}.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) and found.get("row") == name else {}


def has_rows(folder: Path, names: Sequence[str]) -> bool:
    return any(read_row(folder, name) for name in names)


def has_files(folder: Path, names: Sequence[str]) -> bool:
    """Whether there are files of these names, of whatever they are."""
    return any((folder / f"{name}.json").exists() for name in names)


def folders(names: Sequence[str], root: Path = RESULTS) -> Iterator[Path]:
    """Those of `root` that hold such rows."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and has_rows(folder, names):
            yield folder


def slug(gpu: str) -> str:
    """The name of a GPU as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
