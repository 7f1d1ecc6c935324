"""Videos in: looked into by their packets, and decoded frame by frame; a film is never in memory as a whole.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain
from wan.pictures import MAX_PIXELS, read_image

if TYPE_CHECKING:
    import numpy as np

MAX_FRAMES = 1_000_000  # packets that are looked at: nine hours
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class VideoFile:
    """path: absolute; width, height: px, upright; times: seconds of its frames, rising. A picture, which may be one in
    memory, is a video of one frame."""

    path: Any
    width: int
    height: int
    times: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] of each of these frames; `ids` do not fall. Raises SwanError where one cannot be decoded."""
        if _is_picture(self.path):
            yield from [read_image(self.path)] * len(ids)
            return
        wanted = iter(ids)
        at = next(wanted, None)
        with _opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if at is None:
                    return
                if index < at:
                    continue
                pixels = _upright(frame)
                while at == index:
                    yield pixels
                    at = next(wanted, None)
        if at is not None:
            raise SwanError(f"{printable(self.path)}: its frame {at + 1} of {len(self)} cannot be decoded")


def open_video(path: Any) -> VideoFile:
    """Look into a video or a picture. Of a video only the first frame is decoded.

    Raises UsageError where there is no such file and SwanError where it holds no video, or none that can be read.
    """
    path = os.path.abspath(path) if isinstance(path, (str, Path)) else path
    if _is_picture(path):
        height, width, _ = read_image(path).shape
        return VideoFile(path, width, height, (0.0,))
    with open_plain(path):  # says what is no plain file
        pass
    with _opened(path) as (container, stream):
        if stream.width * stream.height > MAX_PIXELS:
            raise SwanError(f"{printable(path)}: {stream.width}x{stream.height} are more than {MAX_PIXELS:,} pixels")
        times = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(None if packet.pts is None else float(packet.pts * packet.time_base))
            if len(times) > MAX_FRAMES:
                raise SwanError(f"{printable(path)}: more than {MAX_FRAMES:,} frames: cut it")
    if None in times:  # of raw streams
        times = list(range(len(times)))
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None or not times:
            raise SwanError(f"{printable(path)}: no frame of it can be decoded")
        height, width, _ = _upright(first).shape
    return VideoFile(path, width, height, tuple(sorted(times)))


def _is_picture(path: Any) -> bool:
    return not isinstance(path, str) or Path(path).suffix.lower() in PICTURES


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream)."""
    import av

    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if not container.streams.video:
                raise SwanError(f"{printable(path)} holds no video")
            yield container, container.streams.video[0]
    except FileNotFoundError:
        raise UsageError(f"no file {printable(path)}") from None
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise SwanError(f"{printable(path)} cannot be read as a video: {one_line(error)}") from error


def _upright(frame: Any) -> np.ndarray:
    import numpy as np

    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise, as players show it
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
