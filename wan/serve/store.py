"""The jobs of a server: rows in SQLite, and a folder of files for each. No torch.

A job is queued, in_progress, completed or failed. It is completed when its file is there and the row says so, in this
order: a server that is killed at any moment and started again has every job, and what ran is queued again. Rows survive
the end of the process at any moment (WAL); of the last ones before a power cut, some may be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wan.errors import SwanError, printable
from wan.files import hold_folder

STATES = ("queued", "in_progress", "completed", "failed")
_ID = re.compile(r"video_[0-9a-f]{32}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL, created_at REAL NOT NULL,
    completed_at REAL, key TEXT UNIQUE, deaths INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    about TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
"""
_COLUMNS = "number, id, state, created_at, completed_at, key, deaths, bytes, about"


@dataclass(frozen=True)
class Job:
    """number: its place in the order of acceptance; key, digest: of an idempotent request; bytes: of its files.

    model: as the server calls it; options: of the video, by flag, without files; files: names in `inputs` by flag, one
    or a list; facts: what was found when it was checked (width, height, frames, fps, seconds, steps, ...)
    error: {code, message} of one that failed; file: the name of the result; report: of the engine
    """

    id: str
    model: str
    options: Mapping[str, Any]
    files: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    remixed_from: str | None = None
    preview_every: int = 0
    digest: str = ""
    error: Mapping[str, str] | None = None
    file: str = ""
    report: Mapping[str, Any] | None = None
    number: int = 0
    state: str = "queued"
    created_at: float = 0.0
    completed_at: float | None = None
    key: str | None = None
    deaths: int = 0
    bytes: int = 0

    @property
    def is_over(self) -> bool:
        return self.state in ("completed", "failed")


_IN_ROW = {"number", "id", "state", "created_at", "completed_at", "key", "deaths", "bytes"}
_ABOUT = [one.name for one in fields(Job) if one.name not in _IN_ROW]


class KeyTaken(Exception):
    """A job with this idempotency key is there."""

    def __init__(self, job: Job):
        super().__init__(job.id)
        self.job = job


class NotWritten(SwanError):
    """A row was not written, for want of space most often."""


class Store:
    """The jobs in a folder, which one server uses at a time. Used by one thread.

    Raises SwanError, one line, where the folder cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder, self._jobs = folder, folder / "jobs"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for one in (folder, self._jobs):
                one.mkdir(mode=0o700, exist_ok=True)  # inputs and prompts are nobody else's
            self._lock = hold_folder(folder)
            self._rows = sqlite3.connect(folder / "jobs.db", isolation_level=None)
            self._rows.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;" + _SCHEMA
            )
            self._begin()
        except BlockingIOError as error:
            raise SwanError(f"--data: another server uses {printable(folder)}") from error
        except (OSError, sqlite3.Error) as error:
            raise SwanError(f"--data: {printable(folder)} cannot be used: {error}") from error

    def _begin(self) -> None:
        """What a server that was killed has left: jobs that ran are queued again, files of no job are removed."""
        self._rows.execute("UPDATE jobs SET state='queued' WHERE state='in_progress'")
        known = {id for (id,) in self._rows.execute("SELECT id FROM jobs")}
        for name in os.listdir(self._jobs):
            if name not in known and _ID.fullmatch(name):
                shutil.rmtree(self._jobs / name, ignore_errors=True)
        for job in self._select("WHERE state='completed'"):
            if not self.result(job).is_file():
                self._end(job, "failed", error={"code": "file_gone", "message": "the file of this video is gone"})

    def checkpoint(self) -> None:
        """Bring what was written into the main file of the database. From any thread: it waits for the disk."""
        with contextlib.closing(sqlite3.connect(self.folder / "jobs.db")) as own, contextlib.suppress(sqlite3.Error):
            own.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        self._rows.close()
        if self._lock is not None:
            os.close(self._lock)

    # Files

    def new_folder(self) -> tuple[str, Path]:
        """The id of a job to be, and the folder of its inputs, which is there."""
        id = f"video_{secrets.token_hex(16)}"
        inputs = self._jobs / id / "inputs"
        inputs.mkdir(parents=True)
        return id, inputs

    def folder_of(self, id: str) -> Path:
        return self._jobs / id

    def result(self, job: Job) -> Path:
        return self._jobs / job.id / job.file

    def options(self, job: Job) -> dict[str, Any]:
        """What the engine is told: its options, and the paths of its files."""
        inputs = self._jobs / job.id / "inputs"

        def path(name: str | list[str]) -> Any:
            return [str(inputs / one) for one in name] if isinstance(name, list) else str(inputs / name)

        return {**job.options, **{flag: path(name) for flag, name in job.files.items()}}

    def remove_folder(self, id: str) -> None:
        """From any thread."""
        shutil.rmtree(self._jobs / id, ignore_errors=True)

    # Rows

    def add(self, job: Job) -> Job:
        """Queue a job. Raises KeyTaken."""
        about = json.dumps({name: getattr(job, name) for name in _ABOUT})
        try:
            size = _bytes_in(self._jobs / job.id)
            self._write(
                "INSERT INTO jobs (id, state, created_at, key, bytes, about) VALUES (?, 'queued', ?, ?, ?, ?)",
                *(job.id, time.time(), job.key, size, about),
            )
        except sqlite3.IntegrityError:
            if job.key is None or (there := self.by_key(job.key)) is None:
                raise
            raise KeyTaken(there) from None
        return self.get(job.id)

    def get(self, id: str) -> Job | None:
        return next(self._select("WHERE id=?", id), None)

    def by_key(self, key: str) -> Job | None:
        return next(self._select("WHERE key=?", key), None)

    def page(self, after: str | None, limit: int, order: str) -> list[Job]:
        """Jobs by acceptance, order "asc" or "desc", behind the one called `after`. KeyError: there is none."""
        sign, where, values = (">", "", []) if order == "asc" else ("<", "", [])
        if after is not None:
            if (job := self.get(after)) is None:
                raise KeyError(after)
            where, values = f"WHERE number {sign} ?", [job.number]
        return list(self._select(f"{where} ORDER BY number {order} LIMIT ?", *values, limit))

    def first_queued(self) -> Job | None:
        return next(self._select("WHERE state='queued' ORDER BY number LIMIT 1"), None)

    def ids(self, state: str) -> list[str]:
        return [id for (id,) in self._rows.execute("SELECT id FROM jobs WHERE state=? ORDER BY number", (state,))]

    def count(self, state: str, before: int | None = None) -> int:
        """Jobs in a state; before: those of a smaller number."""
        limit = 1 << 62 if before is None else before
        [(count,)] = self._rows.execute("SELECT count(*) FROM jobs WHERE state=? AND number<?", (state, limit))
        return count

    def total_bytes(self) -> int:
        [(total,)] = self._rows.execute("SELECT coalesce(sum(bytes), 0) FROM jobs")
        return total

    def _write(self, statement: str, *values: Any) -> None:
        """Raises NotWritten."""
        try:
            self._rows.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise NotWritten(f"--data: what becomes of jobs cannot be written ({error})") from error

    def start(self, job: Job) -> None:
        self._write("UPDATE jobs SET state='in_progress' WHERE id=?", job.id)

    def queue_again(self, id: str, died: bool = False) -> None:
        """What ran is to run again, in its old place; died: the process that made it has, of itself."""
        self._write("UPDATE jobs SET state='queued', deaths=deaths+? WHERE id=? AND state='in_progress'", int(died), id)

    def finish(self, id: str, file: str, report: Mapping[str, Any]) -> Job | None:
        """Its file is there. None: the job is not any more."""
        job = self.get(id)
        return job and self._end(job, "completed", file=file, report=dict(report))

    def fail(self, id: str, code: str, message: str) -> Job | None:
        job = self.get(id)
        return job and self._end(job, "failed", error={"code": code, "message": message})

    def _end(self, job: Job, state: str, **more: Any) -> Job | None:
        about = {name: getattr(job, name) for name in _ABOUT} | more
        size = _bytes_in(self._jobs / job.id)
        self._write(
            "UPDATE jobs SET state=?, completed_at=?, bytes=?, about=? WHERE id=?",
            *(state, time.time(), size, json.dumps(about), job.id),
        )
        return self.get(job.id)

    def delete(self, id: str) -> None:
        """The row; its files are removed by `remove_folder`, or when the server starts again."""
        self._write("DELETE FROM jobs WHERE id=?", id)

    def outdated(self, before: float | None, most_bytes: int | None) -> list[str]:
        """Ids of jobs to be deleted: those that ended before a time, then the oldest ones that ended while all take
        more bytes than allowed."""
        ended = list(self._rows.execute("SELECT id, completed_at, bytes FROM jobs WHERE completed_at NOT NULL"))
        ended.sort(key=lambda one: one[1])
        left, found = self.total_bytes(), []
        for id, at, size in ended:
            if (before is not None and at < before) or (most_bytes is not None and left > most_bytes):
                found.append(id)
                left -= size
        return found

    def _select(self, how: str, *values: Any) -> Iterable[Job]:
        for row in self._rows.execute(f"SELECT {_COLUMNS} FROM jobs {how}", values).fetchall():
            yield Job(**dict(zip(_COLUMNS.split(", "), row[:-1])), **json.loads(row[-1]))


def _bytes_in(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
