"""The jobs of a batch: where they are read from, what tells them apart, which of them are done. No torch."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError, printable
from wan.files import atomic, open_plain, parse_json, read_json, visible_files
from wan.options import FLAGS, PART_OF
from wan.options.alike import file_fact
from wan.options.names import LORA_FLAGS
from wan.options.values import of_kind

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MOST_JOBS = 100_000
_MOST_BYTES = 100_000_000
_MOST_NAME_BYTES = 200  # with an ending and what a film adds to it, 255 are the most of usual file systems
_NAME = re.compile(r"[\w][\w .=,()+-]{0,150}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Job:
    """name: of its files, without the ending; options: by flags, each of its kind; told: those of its grid's cell."""

    name: str
    options: Mapping[str, Any]
    told: Mapping[str, Any]

    @property
    def load(self) -> str:
        """What must be loaded for it: jobs that are alike in this come one after another."""
        named = {flag: one for flag, one in self.options.items() if PART_OF[flag] == "load" or flag in LORA_FLAGS}
        return json.dumps(named, sort_keys=True, default=str)

    def digest(self) -> str:
        """Of the settings, with what input files hold. Raises SwanError for a file that cannot be read."""
        told: dict[str, Any] = {}
        for flag, value in sorted(self.options.items()):
            told[flag] = [str(value), *(file_fact([path]) for path in _files(flag, value))]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _files(flag: str, value: Any) -> list[Path]:
    """The plain files that an option names."""
    if FLAGS[flag].kind not in ("file", "picture", "pictures", "path", "loras"):
        return []
    parts = value if isinstance(value, (list, tuple)) else [value]
    named = [str(part[0]) if isinstance(part, (list, tuple)) else str(part) for part in parts]
    named += [one.rpartition(":")[0] for one in named]
    return [Path(one) for one in named if one and os.path.isfile(one)]


def read_jobs(source: str | None, common: Mapping[str, Any], grid: str | None) -> list[Job]:
    """The jobs of a file or folder, in its order, each with the `common` options where it has none of its own.

    source: a .jsonl file (an object a line), a .csv file (flags in its first line), a folder of pictures (each a first
    frame; a .txt of the same name beside it is the prompt), or None, where `common` alone is one. An object may have a
    "name", which its files get. grid: see `read_grid`; each job is made with each of its combinations.

    Raises UsageError, with the line, for what is no job, SwanError for files that cannot be read.
    """
    rows = [("", {})] if source is None else list(_rows(source))
    cells = read_grid(grid) if grid else [{}]
    if not rows:
        raise UsageError(f"{printable(source)} has no jobs")
    if len(rows) * len(cells) > MOST_JOBS:
        raise UsageError(f"{len(rows) * len(cells):,} jobs; at most {MOST_JOBS:,} are allowed")
    jobs, names = [], set()
    for number, (where, row) in enumerate(rows, 1):
        given = {key: value for key, value in row.items() if value is not None and value != ""}
        name = _name(given.pop("name", f"{number:04}"), where)
        for at, cell in enumerate(cells, 1):
            options = {**common, **given, **cell}
            for flag in options:
                if PART_OF.get(flag) not in ("load", "sample"):
                    raise UsageError(f"{where}unknown option {printable(str(flag))[:100]}; see generate.py --help")
            try:
                options = {flag: of_kind(value, flag, FLAGS[flag].kind) for flag, value in options.items()}
            except UsageError as error:
                raise UsageError(f"{where}{error}") from error
            job = Job(f"{name}-{at:03}" if grid else name, options, cell)
            if job.name in names:
                raise UsageError(f"{where}two jobs are called {job.name}")
            names.add(job.name)
            jobs.append(job)
    return jobs


def _name(value: Any, where: str) -> str:
    is_name = isinstance(value, str) and _NAME.fullmatch(value) and len(os.fsencode(value)) <= _MOST_NAME_BYTES
    if not is_name or value.endswith((" ", ".")) or value == "sheet":
        told = "a file name of letters, digits and .=,()+-, of at most 200 bytes, but not sheet"
        raise UsageError(f"{where}name must be {told}, not {str(value)[:100]!r}")
    return value


def _rows(source: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where it stands, for messages, and its options) of each job."""
    path, name = Path(source), printable(source)
    if path.is_dir():
        for picture in visible_files(path):
            if picture.suffix.lower() in PICTURES:
                told = picture.with_suffix(".txt")
                prompt = {"prompt": _text(told).strip()} if told.is_file() else {}
                stem = re.sub(r"[^\w.=,()+-]+", "_", picture.stem).strip("._") or "picture"
                stem = "sheet_" if stem == "sheet" else stem
                yield f"{printable(picture)}: ", {"name": stem, "image": str(picture), **prompt}
        return
    if not path.is_file():
        raise UsageError(f"no file or folder {name}")
    text = _text(path)
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text), restkey="", strict=True)
        try:
            if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
                raise UsageError(f"{name}, line 1: a flag is there twice")
            for row in rows:
                if row.pop("", None):
                    raise UsageError(f"{name}, line {rows.line_num}: more values than flags in the first line")
                yield f"{name}, line {rows.line_num}: ", row
        except csv.Error as error:
            raise UsageError(f"{name}, line {rows.line_num}: not CSV ({error})") from error
        return
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(f"{name} must be a .jsonl or .csv file, or a folder of pictures")
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts within strings too
        if line.strip():
            where = f"{name}, line {number}: "
            try:
                row = parse_json(line, unique=True)
            except ValueError as error:
                raise UsageError(f"{where}not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UsageError(f"{where}a job must be an object of options")
            yield where, row


def _text(path: Path) -> str:
    with open_plain(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{printable(path)} is larger than {_MOST_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{printable(path)} is not UTF-8 text") from error


def read_grid(text: str) -> list[dict[str, str]]:
    """Combinations of 'seed=1..8 sample_guide_scale=3,4,5': values with commas between, whole numbers also as a range;
    the last flag varies fastest. Raises UsageError."""
    axes: dict[str, list[str]] = {}
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--grid: {error}") from error
    for part in parts:
        flag, equals, values = part.partition("=")
        if not equals or PART_OF.get(flag) not in ("load", "sample"):
            raise UsageError(f"--grid: {part[:100]!r} must be FLAG=VALUE,VALUE,..., with a flag of generate.py")
        if flag in axes:
            raise UsageError(f"--grid: {flag} is there twice")
        axes[flag] = [one for value in values.split(",") for one in _range(value)]
        if not all(axes[flag]):
            raise UsageError(f"--grid: {flag} has an empty value")
    if not axes:
        raise UsageError("--grid is empty: give FLAG=VALUE,VALUE,...")
    size = 1
    for values in axes.values():
        size *= len(values)
        if size > MOST_JOBS:
            raise UsageError(f"--grid has more than {MOST_JOBS:,} combinations")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _range(value: str) -> list[str]:
    match = _RANGE.fullmatch(value)
    if not match:
        return [value]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_JOBS:
        raise UsageError(f"--grid: {value} is no range of 1 to {MOST_JOBS:,} numbers")
    return [str(one) for one in range(first, last + 1)]


@dataclass(frozen=True)
class Record:
    """What DIR/NAME.json says of a job. status: "done" or "failed"; file: of the result, beside it."""

    status: str
    digest: str
    file: str = ""
    error: str = ""
    report: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None


def read_record(folder: Path, name: str) -> Record | None:
    """None where there is none, or it is not ours."""
    try:
        told = read_json(folder / f"{name}.json")
        return Record(**told["batch"], report=told.get("report"), options=told.get("options"))
    except (SwanError, KeyError, TypeError):
        return None


def write_record(folder: Path, name: str, record: Record) -> None:
    """Raises SwanError; atomic."""
    about = {"status": record.status, "digest": record.digest, "file": record.file, "error": record.error}
    told = {"batch": about, "options": record.options, "report": record.report}
    path = folder / f"{name}.json"
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
