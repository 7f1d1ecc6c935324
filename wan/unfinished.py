"""A film that is written clip by clip: a folder beside its file, from which a run that has ended early goes on.

It holds an mp4 a clip, what the next clip needs, and the settings of the run. Each file appears whole or not at all, so
a run may end at any moment; the clip at which it ended is made again. At last the clips are joined, not encoded again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import atomic, parse_json

if TYPE_CHECKING:
    import numpy as np

    from wan.conditioning.film import Made

SUFFIX = ".unfinished"
_STATE = "state.safetensors"


class Unfinished:
    """The folder of a film that goes to `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + SUFFIX)

    def begin(self) -> None:
        """Raises UsageError where the folder of another run lies, and SwanError if it cannot be made."""
        try:
            self.folder.mkdir()
        except FileExistsError as error:
            name = printable(self.folder)
            raise UsageError(f"{name} is left of another run: go on with --resume {name}, or delete it") from error
        except OSError as error:
            raise SwanError(f"cannot write {printable(self.folder)}: {error.strerror or one_line(error)}") from error

    def discard(self) -> None:
        """The folder of a run that has made nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, frames: np.ndarray, made: Made, fps: int, settings: Mapping[str, Any]) -> None:
        """Keep the frames, uint8 [T, H, W, 3], of the last clip of those that are `made`. Raises SwanError."""
        from safetensors.torch import save_file

        media.write_video(self._clip(made.clips - 1), frames, fps, {"task": settings["task"]})
        told = {"settings": settings, "clips": made.clips, "frames": made.frames, "sha256": made.sha256}
        with atomic(self.folder / _STATE) as temporary:
            save_file(
                {name: one.contiguous() for name, one in made.state.items()}, temporary, {"swan": json.dumps(told)}
            )

    def finish(self, made: Made, fps: int, settings: Mapping[str, Any], sound: media.Sound | None = None) -> None:
        """Join the clips to the film; the folder is gone then. Raises SwanError."""
        clips = [self._clip(at) for at in range(made.clips)]
        media.join_videos(self.path, clips, made.frames / fps, settings, sound)
        self.discard()

    def _clip(self, number: int) -> Path:
        return self.folder / f"clip-{number + 1:04}.mp4"


def read_unfinished(folder: str | Path) -> tuple[dict[str, Any], Made]:
    """The settings of the run that left a folder, and what it made.

    Raises UsageError where there is no such folder, and SwanError for one that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from wan.conditioning.film import Made

    folder, name = Path(folder), printable(folder)
    if not (folder / _STATE).is_file():
        raise UsageError(f"--resume: {name} is no folder of a film that is not finished (NAME.mp4{SUFFIX})")
    try:
        with safe_open(folder / _STATE, "pt") as file:
            told = parse_json((file.metadata() or {}).get("swan", ""))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings, clips, frames, sha256 = (told[key] for key in ("settings", "clips", "frames", "sha256"))
        right = isinstance(settings, dict) and type(clips) is type(frames) is int and 0 < clips <= frames
        if not (right and isinstance(sha256, list) and len(sha256) == clips and all(map(_is_text, sha256))):
            raise ValueError("its settings are not what Swan writes there")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SwanError(f"--resume: {name} is damaged: {one_line(error)}") from error
    for at in range(clips):
        if not os.path.isfile(folder / f"clip-{at + 1:04}.mp4"):
            raise SwanError(f"--resume: {name} is damaged: clip-{at + 1:04}.mp4 is gone")
    return settings, Made(clips, frames, tuple(sha256), state)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
