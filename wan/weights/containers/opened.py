"""A file of weights that is read in pieces, and has to stay what it was when it was opened. No torch."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from wan.errors import SwanError, one_line
from wan.files import open_plain

State = tuple[int, int, int, int]
Work = Callable[[int, int], None]
PIECE_BYTES = 8 << 20
READERS = min(4, os.cpu_count() or 1)
_seeking = threading.Lock()


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

    def fill(
        self, view: memoryview, start: int, tensor: str, then: Work | None = None, step: int = PIECE_BYTES
    ) -> None:
        """Read bytes of a tensor from byte `start` of the file straight into `view`, by several threads if it is large.

        step: bytes of a piece; then: called with the first byte of each piece and the one after its last, while the
        cache holds it.
        """

        def read(first: int, last: int) -> None:
            filled = first
            while filled < last:
                count = _read_at(file, view[filled:last], start + filled)
                if not count:
                    raise SwanError(f"{self.path}: the file ended inside tensor {tensor}; it changed while being read")
                filled += count
            if then is not None:
                then(first, last)

        with self.open() as file:
            in_pieces(read, len(view), step)

    def _check_unchanged(self, file: BinaryIO) -> None:
        if state(file) != self._state:
            raise SwanError(f"{self.path}: the file changed after it was opened")


def in_pieces(work: Work, size_bytes: int, step: int) -> None:
    """`work(first byte, the one after the last)` on pieces of `step` bytes; by several threads if there are several."""
    pieces = [(first, min(first + step, size_bytes)) for first in range(0, size_bytes, step)]
    if len(pieces) <= 1 or READERS == 1:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(min(READERS, len(pieces)), thread_name_prefix="reader") as pool:
        for _ in pool.map(lambda piece: work(*piece), pieces):
            pass


def _read_at(file: BinaryIO, view: memoryview, place: int) -> int:
    """How many bytes from `place` of the file were read into `view`."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], place)
    data = os.pread(file.fileno(), len(view), place) if hasattr(os, "pread") else _seek_and_read(file, view, place)
    view[: len(data)] = data
    return len(data)


def _seek_and_read(file: BinaryIO, view: memoryview, place: int) -> bytes:
    with _seeking:  # Windows: a file has one place
        file.seek(place)
        return file.read(len(view))


def state(file: BinaryIO) -> State:
    """Size, time of the last change, and which file it is."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino
