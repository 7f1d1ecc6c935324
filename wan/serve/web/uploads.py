"""What browsers have sent for a video that is not asked for yet: a folder of gradio's, which is kept small."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

from wan.serve.inputs import link

_KEPT_S = 24 * 3600.0
_SWEEP_S = 600.0


class Uploads:
    """Empty when a server begins. most_bytes: of all; the oldest go first.

    What is asked for has a link to its files, so that nothing here is needed any more once a job is accepted.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self._most_bytes = folder, most_bytes
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)

    def holds(self, path: str) -> bool:
        """Whether a path is that of a file here."""
        return os.path.isabs(path) and Path(os.path.normpath(path)).is_relative_to(self.folder)

    def add(self, path: Path) -> str:
        """A file of a job, as if it were sent again."""
        own = self.folder / secrets.token_hex(16)
        own.mkdir()
        link(path, own / path.name)
        return str(own / path.name)

    def make_room(self) -> None:
        """Waits for the disk: not for the thread of an event loop."""
        found = []
        for one in self.folder.iterdir():
            with contextlib.suppress(OSError):
                size = sum(part.lstat().st_size for part in (one.rglob("*") if one.is_dir() else [one]))
                found.append((one.lstat().st_mtime, size, one))
        left, now = sum(size for _, size, _ in found), time.time()
        for at, size, one in sorted(found):
            if left > self._most_bytes or now - at > _KEPT_S:
                shutil.rmtree(one, ignore_errors=True) if one.is_dir() else one.unlink(missing_ok=True)
                left -= size

    async def sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await asyncio.to_thread(self.make_room)
