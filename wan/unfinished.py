"""A film that is written clip by clip: a folder beside its file, from which a run that has ended early goes on.

It holds an mp4 a clip, what the next clip needs, and the settings of the run. Each file appears whole or not at all, so
a run may end at any moment; the clip at which it ended is made again. At last the clips are joined, not encoded again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import media
from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import hold_folder, parse_json
from wan.video import open_video

if TYPE_CHECKING:
    import numpy as np

    from wan.conditioning.film import Made
    from wan.engine import Clip, Video

SUFFIX = ".unfinished"
_STATE, _CLIPS = "state.safetensors", "clip-[0-9][0-9][0-9][0-9]*.mp4"


class Unfinished:
    """The folder of a film that goes to `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + SUFFIX)
        self._held: int | None = None

    def begin(self) -> None:
        """Make the folder, or take over what a run has left that kept no clip.

        Raises UsageError where clips lie there, or another run is at work, and SwanError if it cannot be made.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise SwanError(f"cannot write {printable(self.folder)}: {error.strerror or one_line(error)}") from error
        self.hold()
        if (self.folder / _STATE).exists():
            name = printable(self.folder)
            self.let_go()
            raise UsageError(f"{name} is left of another run: go on with --resume {name}, or delete it")

    def hold(self) -> None:
        """Keep other runs out of the folder. Raises UsageError where one is at work there."""
        try:
            self._held = hold_folder(self.folder)
        except BlockingIOError as error:
            told = f"{printable(self.folder)} belongs to a run that is at work: wait for its end"
            raise UsageError(f"{told}, or give another --save_file") from error
        except OSError as error:
            raise SwanError(f"cannot read {printable(self.folder)}: {error.strerror or one_line(error)}") from error

    def let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def discard(self) -> None:
        """The files of the run, and the folder where there are no others."""
        with contextlib.suppress(OSError):
            for path in [self.folder / _STATE, *self.folder.glob(_CLIPS)]:
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def add(self, frames: np.ndarray, made: Made, fps: int, settings: Mapping[str, Any]) -> None:
        """Keep the frames, uint8 [T, H, W, 3], of the last clip of those that are `made`. Raises SwanError."""
        media.write_video(self._clip(made.clips - 1), frames, fps, {"task": settings["task"]})
        told = {"settings": settings, "clips": made.clips, "frames": made.frames, "sha256": made.sha256}
        media.save_tensors(self.folder / _STATE, made.state, {"swan": json.dumps(told)})

    def finish(self, made: Made, fps: int, settings: Mapping[str, Any], sound: media.Sound | None = None) -> None:
        """Join the clips to the film; the folder is gone then. Raises SwanError."""
        clips = [self._clip(at) for at in range(made.clips)]
        media.join_videos(self.path, clips, made.frames / fps, settings, sound)
        self.discard()

    def _clip(self, number: int) -> Path:
        return self.folder / f"clip-{number + 1:04}.mp4"


class FilmFile:
    """Takes the clips of a film as they are made, on their way to its file; see `Engine.make`.

    made: what there is of it already; is_writer: of several processes, whether this one writes
    """

    def __init__(self, path: str | Path, made: Made | None = None, is_writer: bool = True):
        self.file, self.made, self.is_writer = Unfinished(path), made, is_writer

    def __enter__(self) -> FilmFile:
        if self.is_writer:
            self.file.begin() if self.made is None else self.file.hold()
        return self

    def __call__(self, clip: Clip) -> None:
        if self.is_writer:
            self.file.add(clip.frames, clip.made, clip.request.sample.fps, clip.request.settings())
        self.made = clip.made

    def kept(self) -> str | None:
        """For the message of a failure."""
        if self.made is None:
            return None
        return f"{self.made.clips} clips are kept: go on with --resume {shlex.quote(str(self.file.folder))}"

    def finish(self, video: Video) -> None:
        """Join the clips of the video that was returned."""
        self.file.finish(self.made, video.request.sample.fps, video.request.settings(), video.sound)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.file.let_go()
        if self.is_writer and self.made is None:
            self.file.discard()
        elif self.is_writer and kind is not None and not issubclass(kind, Exception):  # a signal
            print(self.kept(), file=sys.stderr)


def read_unfinished(folder: str | Path) -> tuple[dict[str, Any], Made]:
    """The settings of the run that left a folder, and what it made.

    Raises UsageError where there is no such folder, and SwanError for one that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from wan.conditioning.film import Made

    folder, name = Path(folder), printable(folder)
    if not folder.name.endswith(f".mp4{SUFFIX}"):
        raise UsageError(f"--resume: {name} must be the folder of a film that is not finished: NAME.mp4{SUFFIX}")
    if not (folder / _STATE).is_file():
        raise UsageError(f"--resume: {name} is no folder of a film that is not finished (NAME.mp4{SUFFIX})")
    try:
        with safe_open(folder / _STATE, "pt") as file:
            told = parse_json((file.metadata() or {}).get("swan", ""))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings, clips, frames, sha256 = (told[key] for key in ("settings", "clips", "frames", "sha256"))
        right = isinstance(settings, dict) and type(clips) is type(frames) is int and 0 < clips <= frames
        right = right and isinstance(sha256, list) and len(sha256) == clips
        if not right or not all(isinstance(digest, str) for digest in sha256):
            raise ValueError("its settings are not what Swan writes there")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SwanError(f"--resume: {name} is damaged: {one_line(error)}") from error
    found = 0
    for at in range(clips):
        clip = folder / f"clip-{at + 1:04}.mp4"
        if not clip.is_file():
            raise SwanError(f"--resume: {name} is damaged: {clip.name} is gone")
        found += len(open_video(clip))
    if found != frames:
        raise SwanError(f"--resume: {name} is damaged: its clips have {found} frames, and {frames} were made")
    return settings, Made(clips, frames, tuple(sha256), state)
