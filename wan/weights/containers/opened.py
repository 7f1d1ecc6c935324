"""A file of weights that is read in pieces, and has to stay what it was when it was opened. No torch."""

from __future__ import annotations

import contextlib
import io
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wan.errors import SwanError, one_line
from wan.files import open_plain

State = tuple[int, int, int, int]


class OpenedFile:
    """A plain file. What its header said holds only for that file: another under its name, or a change, is an error.

    Read with plain reads: a file that is cut while it is mapped ends the process with SIGBUS.
    """

    def __init__(self, path: Path):
        self.path = path
        first = open_plain(path)  # stays open, so that no other file can have its number
        weakref.finalize(self, first.close)
        self._state = state(first)

    @property
    def size_bytes(self) -> int:
        return self._state[0]

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file, opened anew. Raises SwanError where it has changed, before or within, or cannot be read."""
        if not os.path.exists(self.path):
            raise SwanError(f"{self.path}: cannot be read any more: it was removed after it was opened")
        with io.BufferedReader(open_plain(self.path)) as file:
            self._check_unchanged(file)
            try:
                yield file
            except OSError as error:
                raise SwanError(f"{self.path}: cannot be read: {error.strerror or one_line(error)}") from error
            self._check_unchanged(file)

    def fill(self, view: memoryview, start: int, tensor: str) -> None:
        """Read bytes of a tensor from byte `start` of the file."""
        with self.open() as file:
            file.seek(start)
            filled = 0
            while filled < len(view):  # one call reads at most 2 GiB
                count = file.readinto(view[filled:])
                if not count:
                    raise SwanError(f"{self.path}: the file ended inside tensor {tensor}; it changed while being read")
                filled += count

    def _check_unchanged(self, file: BinaryIO) -> None:
        if state(file) != self._state:
            raise SwanError(f"{self.path}: the file changed after it was opened")


def state(file: BinaryIO) -> State:
    """Size, time of the last change, and which file it is."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino
