"""Files of others and files of ours: opened only if they are plain files, listed without hidden ones, written whole or
not at all. No torch.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wan.errors import SwanError, one_line, printable

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
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"duplicate name {twice[:200]}")
    return result


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that is moved there on success and removed on any failure or Ctrl-C."""
    temporary = path.with_name(f".swan-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SwanError(f"cannot write {printable(path)}: {error.strerror or one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
