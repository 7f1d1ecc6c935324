"""The table of docs/gpu.md, from the JSON of all machines and from nothing else. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.results import DONE, RESULTS, folders, read_row
from benchmarks.gpu.rows import NAMES, ROWS, Row
from wan.errors import SwanError
from wan.files import atomic

PAGE = Path(__file__).resolve().parents[2] / "docs/gpu.md"
_BEGIN, _END = "<!-- python -m benchmarks.gpu --table -->\n", "<!-- end of the table -->\n"


def table(root: Path = RESULTS) -> str:
    """A row for each measurement, a column for each GPU that has results in `root`, or one where none has."""
    found = list(folders(NAMES, root))
    lines = [_line(["", *(_title(folder) for folder in found)] if found else ["", "any GPU"])]
    lines.append(_line(["---"] * (1 + max(1, len(found)))))
    for row in ROWS:
        lines.append(_line([row.title, *([_cell(folder, row) for folder in found] or ["not run"])]))
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(folder: Path) -> str:
    machines = (read_row(folder, name).get("machine") or {} for name in NAMES)
    names = {f"{one.get('gpu', one['cpu'])}{', TINY SHAPES' if one['tiny'] else ''}" for one in machines if one}
    return " / ".join(sorted(names)) or folder.name


def _cell(folder: Path, row: Row) -> str:
    found = read_row(folder, row.name)
    if found.get("state") == DONE:
        return row.figure(found["result"])
    if not found or found["state"] == "running":
        return "not run"
    return f"{found['state']}: {found['reason']}".replace("|", "/")


def write_table(page: Path = PAGE, root: Path = RESULTS) -> str:
    """Puts the table in its place on the page. Returns it."""
    text, made = page.read_text(encoding="utf-8"), table(root)
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise SwanError(f"{page}: the lines that stand around the table are missing")
    with atomic(page) as temporary:
        temporary.write_text(before + begin + "\n" + made + "\n" + end + after, encoding="utf-8")
    return made
