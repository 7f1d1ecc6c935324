"""Files of others and files of ours: opened only if they are plain files, listed without hidden ones, written whole or
not at all. No torch.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wan.errors import SwanError, one_line, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 100_000_000
_MANY_VALUES = 250_000


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, opened for reading, unbuffered. Raises SwanError for what is none or cannot be opened: a folder, a
    pipe, a device, a link to one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # looked at first: to open a device can have effects
            raise SwanError(f"{printable(path)}: not a plain file")
        # Without O_NONBLOCK, opening a pipe (put there meanwhile) waits for a writer.
        file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb", 0)
    except FileNotFoundError as error:
        raise SwanError(f"{printable(path)}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SwanError(f"{printable(path)}: cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise SwanError(f"{printable(path)}: not a plain file")
    return file


def visible_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Plain files of a folder whose names fit, sorted, but for hidden ones: macOS puts a `._NAME` beside each NAME.

    None where there is no such folder. Raises SwanError for one that cannot be read."""
    names = fnmatch.filter(visible_names(folder), pattern)
    return [folder / name for name in names if os.path.isfile(folder / name)]


def visible_names(folder: Path) -> list[str]:
    """Names of all that is in a folder, sorted, but for hidden ones; none where there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SwanError(f"{printable(folder)}: cannot be read: {error.strerror or one_line(error)}") from error


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES, unique: bool = False) -> Any:
    """The contents of a JSON file, with or without a byte order mark. Raises SwanError that names the file.

    unique: see `parse_json`.
    """
    with open_plain(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size  # memory is taken for as much as is asked for
        if size_bytes > max_bytes:
            raise SwanError(f"{printable(path)}: more than {max_bytes:,} bytes of JSON")
        try:
            data = file.read(size_bytes)
        except OSError as error:
            raise SwanError(f"{printable(path)}: cannot be read: {error.strerror or one_line(error)}") from error
    try:
        return parse_json(data, unique)
    except ValueError as error:
        raise SwanError(f"{printable(path)}: not a JSON file ({one_line(error)})") from error


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """json.loads, for text of others: all that it can raise is a ValueError. unique: no name may be there twice."""
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    # What is read may take much more memory than its text: 56 bytes for "[],".
    if sum(map(text.count, ",[{")) > _MANY_VALUES + len(text) // 16:
        raise ValueError(f"too many values for {len(text):,} letters")
    collects = gc.isenabled()
    gc.disable()  # what is collected where the recursion ends could not be closed
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if collects:
            gc.enable()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"duplicate name {twice[:200]}")
    return result


# Writing. What a killed run left behind is removed by the next run that writes there: each temporary file or folder is
# locked by its writer, and the lock ends with the process. Another machine's locks may not be seen here.

_HERE = hashlib.sha256(socket.gethostname().encode(errors="surrogateescape")).hexdigest()[:8]
_STALE_S = 24 * 3600  # of another machine, and not touched for so long: its writer is gone


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that is moved there on success and removed on any failure or Ctrl-C."""
    with _writing(path), temporary_name(path.parent) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place on success and is removed on any failure or Ctrl-C."""
    with _writing(path), temporary_name(path.parent, is_folder=True) as temporary:
        yield temporary
        # Not a temporary name: were this process killed between the two, it would be all that is left.
        old = path.with_name(_drawn_name(".old"))
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        finally:
            if old.exists():
                os.replace(old, temporary if path.exists() else path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """OSError becomes SwanError that names `path`."""
    try:
        yield
    except OSError as error:
        raise SwanError(f"cannot write {printable(path)}: {error.strerror or one_line(error)}") from error


@contextlib.contextmanager
def temporary_name(folder: Path, is_folder: bool = False) -> Iterator[Path]:
    """A new file or folder, locked, and removed at the end if it is still there."""
    _remove_stale(folder)
    path, lock = _create_locked(folder, is_folder)
    try:
        yield path
    finally:
        if lock is not None:
            os.close(lock)
        _remove(path)


def _drawn_name(end: str) -> str:
    return f".swan-{_HERE}-{secrets.token_hex(8)}{end}"


def _create_locked(folder: Path, is_folder: bool) -> tuple[Path, int | None]:
    while True:
        path = folder / _drawn_name(".tmp")
        path.mkdir() if is_folder else path.touch(exist_ok=False)
        lock = _lock(path, wait=True)
        # Another run may have taken it for stale before it was locked.
        if lock is None or _is_same(path, lock):
            return path, lock
        os.close(lock)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders whose writers are gone. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".swan-*.tmp"):
            with contextlib.suppress(OSError):
                is_ours = path.name.startswith(f".swan-{_HERE}-")
                if (is_ours or time.time() - path.lstat().st_mtime > _STALE_S) and _is_abandoned(path):
                    _remove(path)


def _is_abandoned(path: Path) -> bool:
    if fcntl is None:  # Windows: a file that is open cannot be removed, and of a folder nothing is known
        return not path.is_dir()
    lock = _lock(path, wait=False)
    if lock is None:
        return False
    os.close(lock)  # nobody else takes it up: its name is drawn anew by each writer
    return True


def _lock(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock, till it is closed; None where there is none to be had."""
    if fcntl is None:
        return None
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR  # of a network's file systems, some lock only what is writable
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by its writer; or the file system has no locks, and then nothing is taken for stale
        os.close(descriptor)
        return None
    return descriptor


def hold_folder(path: Path) -> int | None:
    """A descriptor that keeps others from holding the folder till it is closed; None where there are no locks.

    Raises BlockingIOError where another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _is_same(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
