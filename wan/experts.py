"""Which network of a task runs at a step, and which ones are in memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

_PIECE_BYTES = 512 << 10  # the kernel reads no more than some MB for each request


class Experts:
    """The networks of a task by name ("model", or "high" and "low"), each loaded when it is first asked for.

    `keep_all` False: asking for one lets go of the other first, so that two experts never share the memory.
    """

    def __init__(self, load: Callable[[str], nn.Module], keep_all: bool):
        self._load, self._keep_all = load, keep_all
        self._models: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._models:
            if not self._keep_all:
                self._models.clear()
            self._models[name] = self._load(name)
        return self._models[name]

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def release(self) -> None:
        self._models.clear()


def read_ahead(paths: Sequence[Path]) -> threading.Thread:
    """Has the system read files into its cache, in the background. They take no memory of this process."""

    def advise() -> None:
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:  # whoever needs the file will say what is wrong
                for start in range(0, os.fstat(file.fileno()).st_size, _PIECE_BYTES):
                    os.posix_fadvise(file.fileno(), start, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=advise if hasattr(os, "posix_fadvise") else lambda: None, daemon=True)
    thread.start()
    return thread
