"""The user's folder of compiled kernels. A library is code that this process runs, so only what nobody else can have
written, and what is whole, is taken from there.

The folder and its files have to be the user's own, closed to others and no links. The name of a file holds the SHA-256
of its contents: one file, that appears whole or not at all and speaks for itself. Contents are handed out, not paths: a
library that is cut while it is mapped ends the process. Where there is no such folder, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

_MAX_BYTES = 16 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def kept(prefix: str) -> bytes | None:
    """The contents of a whole file that was kept under `prefix`; None if there is none that can be trusted."""
    with contextlib.suppress(OSError), _folder() as folder:
        for name in os.listdir(folder):
            if name.startswith(prefix) and (data := _read(folder, name, prefix)) is not None:
                return data
    return None


def keep(prefix: str, data: bytes) -> None:
    """Keep contents under `prefix`, in place of all others, if there is a folder for it."""
    name, temporary = _name(prefix, data), f"{prefix}{secrets.token_hex(8)}.tmp"
    with contextlib.suppress(OSError), _folder() as folder:
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder), "wb") as file:
                file.write(data)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            # Another process that writes at the same time loses its temporary file: it keeps nothing, one is enough.
            for other in os.listdir(folder):
                if other.startswith(prefix) and other != name:
                    os.unlink(other, dir_fd=folder)


def _name(prefix: str, data: bytes) -> str:
    return f"{prefix}{hashlib.sha256(data).hexdigest()}.so"


def _read(folder: int, name: str, prefix: str) -> bytes | None:
    with contextlib.suppress(OSError):
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
            seen = os.fstat(file.fileno())
            is_ours = stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS_WRITE
            data = file.read(_MAX_BYTES + 1) if is_ours else b""
        if is_ours and len(data) <= _MAX_BYTES and _name(prefix, data) == name:
            return data
    return None


@contextlib.contextmanager
def _folder() -> Iterator[int]:
    """A descriptor of the folder: its path could be made to lead elsewhere after the checks. Raises OSError."""
    home = _cache_home()
    if home is None or not hasattr(os, "geteuid"):
        raise FileNotFoundError("no folder for caches")
    path = home / "swan"
    if not path.exists():
        there = next(one for one in path.parents if one.exists())
        if there.stat().st_uid not in (0, os.geteuid()):  # with sudo, HOME may still be that of the caller
            raise PermissionError(f"{there} belongs to another user")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        seen = os.fstat(folder)
        if seen.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user")
        if stat.S_IMODE(seen.st_mode) & 0o077:
            os.fchmod(folder, 0o700)  # what others may have put there is not ours
        yield folder
    finally:
        os.close(folder)


def _cache_home() -> Path | None:
    """By the rules of https://specifications.freedesktop.org/basedir-spec: a relative path is as none."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        home = Path(os.environ["HOME"] if "HOME" in os.environ else Path.home())
    except RuntimeError:  # no HOME, and a user that the system does not know
        return None
    return home / ".cache" if home.is_absolute() and home.is_dir() else None
