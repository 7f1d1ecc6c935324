"""Videos of others: told from their headers, decoded one frame at a time, and at most so large.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain
from wan.pictures import MAX_PIXELS, is_picture, most_pixels, read_image

if TYPE_CHECKING:
    import numpy as np
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

STILL_FPS = 16.0  # of pictures and arrays, which have none
MAX_FRAMES = 1_000_000  # four hours at 60 a second
HD_HEIGHT = 720  # from here on players take what is not tagged for BT.709, below for BT.601
# Not all that FFmpeg knows: playlists name other files. Those of sound are known so that they can be told as such.
_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf,nut,ivf,dv,h264,hevc,obu,m4v,mpegvideo,yuv4mpegpipe"
_FORMATS += ",mp3,wav,flac,aac,aiff"
_BUFFER_BYTES = 1 << 18
_MANY_SAMPLES, _SAMPLE_BYTES = 1_000_000, 4  # so many may be claimed, and more where so many bytes stand for each
_MAX_BOXES = 100_000
_UNSPECIFIED = 2  # of FFmpeg's colour spaces


@dataclass(frozen=True)
class Video:
    """A video, or a picture as a video of one frame. Nothing of it is in memory but what it was made of.

    name:     for messages
    starts:   when each frame begins, in seconds; the first at 0
    duration: when the last frame ends, in seconds
    read:     ascending indices of frames -> these frames, uint8 [H, W, 3], as they are decoded
    """

    name: str
    width: int
    height: int
    fps: float
    starts: Sequence[float]
    duration: float
    read: Callable[[Iterable[int]], Iterator[np.ndarray]]

    def __len__(self) -> int:
        return len(self.starts)


def open_video(source: Any) -> Video:
    """A video or picture from its path, an array or a PIL picture, or a list of these as frames.

    Arrays are uint8 or bool, [T, H, W, C] or [H, W, C] with 3 or 4 channels, or [T, H, W] or [H, W]. Alpha is dropped.
    Of a file the packets are listed and the first frame is decoded, no more. Raises UsageError where there is no such
    file, or an array is something else, and SwanError for a file that holds no video or is damaged.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _still(as_frames(source), "the array given")
    if not os.path.isfile(source):
        raise UsageError(f"no video file {printable(source)}")
    return _still(read_image(source)[None], printable(source)) if is_picture(source) else _from_file(Path(source))


def as_frames(source: Any) -> np.ndarray:
    """uint8 [T, H, W, 3] of an array or PIL picture or a list of these, see `open_video`. Raises UsageError."""
    import numpy as np

    if isinstance(source, (list, tuple)) and source:
        parts = [as_frames(part) for part in source]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UsageError("the frames of a list must have one size")
        return np.concatenate(parts)
    pixels = np.asarray(source.convert("RGB") if hasattr(source, "convert") else source)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.ndim in (2, 3) and pixels.shape[-1] not in (3, 4):
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (3, 4) or not pixels.size:
        raise UsageError(f"frames must be uint8 [T, H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels[..., :3]


def _still(frames: np.ndarray, name: str) -> Video:
    count, height, width, _ = frames.shape
    starts = [index / STILL_FPS for index in range(count)]
    return Video(name, width, height, STILL_FPS, starts, count / STILL_FPS, lambda ids: (frames[i] for i in ids))


def _from_file(path: Path) -> Video:
    with _opened(path) as (container, stream):
        stamps, duration, count = [], 0, 0  # in units of the stream's time base
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += 1
            if count > MAX_FRAMES:
                raise SwanError(f"more than {MAX_FRAMES:,} frames: cut it first")
            if packet.is_corrupt:
                raise SwanError(f"damaged or cut off: frame {count} is not whole")
            if not packet.is_discard:
                stamps.append(packet.pts)
                duration = packet.duration or duration
        if stream.frames > count:
            raise SwanError(f"cut off: it claims {stream.frames} frames and holds {count}")
        if not stamps:
            raise SwanError("it holds no frame")
        timed = None not in stamps  # some hold frames without times
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        unit, average = float(stream.time_base), rate or STILL_FPS
        stamps = sorted(stamps) if timed else []
        starts = [(stamp - stamps[0]) * unit for stamp in stamps] if timed else [i / average for i in range(count)]
        duration = starts[-1] + (duration * unit if timed and duration else 1 / average)
    with _opened(path) as (container, stream):
        _, first = next(_decoded(container, stream, stamps), (0, None))
        if first is None:
            raise SwanError("it holds no frame that can be decoded")
        height, width = first.height, first.width
        turned = first.rotation % 180 != 0

    def read(ids: Iterable[int]) -> Iterator[np.ndarray]:
        with _opened(path) as (container, stream):
            yield from _chosen(_decoded(container, stream, stamps), ids, width, height, len(starts))

    size = (height, width) if turned else (width, height)
    return Video(printable(path), *size, rate or len(starts) / duration, starts, duration, read)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Container and video stream of a file, its sizes checked. What goes wrong within is a SwanError with its name."""
    import av

    with open_plain(path) as file:
        try:
            _check_claims(file)
            options = {"format_whitelist": _FORMATS, "max_pixels": str(MAX_PIXELS)}
            with av.open(file, options=options, metadata_errors="replace", buffer_size=_BUFFER_BYTES) as container:
                cover = av.stream.Disposition.attached_pic  # of an album
                streams = [one for one in container.streams.video if not one.disposition & cover]
                if not streams:
                    raise SwanError("it has sound, but no picture" if container.streams.audio else "it has no video")
                stream, size = streams[0], os.fstat(file.fileno()).st_size
                if stream.width * stream.height > most_pixels(size):
                    raise SwanError(f"{stream.width}x{stream.height} are more than {most_pixels(size):,} pixels")
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                stream.thread_type = "AUTO"
                yield container, stream
        except SwanError as error:
            raise type(error)(f"cannot read video {printable(path)}: {error}") from error
        except av.FFmpegError as error:
            why = "damaged, cut off, or of a format that is not known"
            raise SwanError(f"cannot read video {printable(path)}: {why} ({error.strerror})") from error
        except (MemoryError, ValueError, OSError) as error:
            raise SwanError(f"cannot read video {printable(path)}: {one_line(error)}") from error


def _decoded(container: InputContainer, stream: VideoStream, stamps: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """(index, frame) of the frames of a stream, by their time where frames have one."""
    for count, frame in enumerate(container.decode(stream)):
        yield (bisect.bisect_right(stamps, frame.pts) - 1 if stamps and frame.pts is not None else count), frame


def _chosen(
    frames: Iterator[tuple[int, VideoFrame]], ids: Iterable[int], width: int, height: int, count: int
) -> Iterator[np.ndarray]:
    """The frames with these indices. Where a packet shows none, as some of VP8, the one before stays, as in players."""
    before = index = frame = None
    for wanted in ids:
        while frame is None or index < wanted:
            before = frame
            index, frame = next(frames, (None, None))
            if frame is None:
                raise SwanError(f"damaged or cut off: frame {wanted + 1} of {count} cannot be decoded")
        shown = frame if index == wanted or before is None else before
        if shown.is_corrupt:
            raise SwanError(f"damaged or cut off: frame {wanted + 1} of {count} is not whole")
        yield _upright(shown, width, height)


def _upright(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3], turned as the file says. Alpha is dropped, more than 8 bits are rounded."""
    import numpy as np

    matrix = "ITU709" if frame.colorspace == _UNSPECIFIED and height >= HD_HEIGHT else None
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, src_colorspace=matrix)
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90 % 4))


def _check_claims(file: BinaryIO) -> None:
    """Refuses an mp4 that claims samples without end: a table of one size for all takes a few bytes in the file, and in
    FFmpeg's reader some 70 for each of them. Raises SwanError, and leaves the file at its beginning.

    Source: ISO/IEC 14496-12, 4.2 (boxes), 8.7.3 (stsz, stz2), 8.8.8 (trun).
    """
    size = os.fstat(file.fileno()).st_size
    claimed = sum(_claimed_samples(file, 0, size))
    if claimed > _MANY_SAMPLES and claimed * _SAMPLE_BYTES > size:
        raise SwanError(f"it claims {claimed:,} frames in {size:,} bytes")
    file.seek(0)


def _claimed_samples(file: BinaryIO, start: int, end: int) -> Iterator[int]:
    """How many samples each table claims, of the boxes from `start` to `end` and of those inside of them."""
    for _ in range(_MAX_BOXES):
        if end - start < 8:
            return
        file.seek(start)
        head = file.read(28)
        size, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - start
        if size < header:
            return
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"):
            yield from _claimed_samples(file, start + header, min(end, start + size))
        elif kind in (b"stsz", b"stz2", b"trun"):
            at = header + (4 if kind == b"trun" else 8)
            yield int.from_bytes(head[at : at + 4], "big")
        start += size
    raise SwanError("it has boxes without end")
