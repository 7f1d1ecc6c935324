"""Videos in: looked into by their packets, and decoded frame by frame; a film is never in memory as a whole.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain
from wan.pictures import MAX_PIXELS, frames_of_image, is_picture, most_pixels, read_image

if TYPE_CHECKING:
    import numpy as np
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_FRAMES = 1_000_000  # packets that are looked at: nine hours
HD_HEIGHT = 720  # from here on players take what is not tagged for BT.709, below for BT.601
# Not all that FFmpeg knows: playlists name other files. Those of sound are there to be told as such.
_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf,nut,ivf,dv,h264,hevc,obu,m4v,mpegvideo,yuv4mpegpipe"
_FORMATS += ",mp3,wav,flac,aac,aiff"
_BUFFER_BYTES = 1 << 18
_SAMPLE_BYTES = 4  # more than MAX_FRAMES may be claimed where the file has so many bytes for each
_MAX_BOXES = 100_000
_UNTAGGED = 2  # of FFmpeg's colour spaces
# Containers that say which frames are key frames, and decoders that begin anew with one.
_INDEXED = ("mov", "matroska")
_BEGIN_ANEW = ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1")
_USUAL_FPS = 16.0  # where a stream says nothing


@dataclass(frozen=True)
class VideoFile:
    """A video, or a picture, which may be one in memory, as a video of one frame.

    path: absolute; width, height: px, upright; times: when its frames begin, in seconds, rising from 0; end: when the
    last one ends; fps: frames a second as the file has them; stamps: the times as it gives them, none where it does not
    """

    path: Any
    width: int
    height: int
    times: tuple[float, ...]
    end: float
    fps: float
    stamps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] of each of these frames; `ids` do not fall. Alpha is dropped, more than 8 bits are rounded.

        Raises SwanError where one cannot be decoded.
        """
        if not isinstance(self.path, str) or is_picture(self.path):
            yield from [read_image(self.path)] * len(ids)
            return
        with _opened(self.path) as (container, stream):
            decoded = self._decoded(container, stream, ids[0] if len(ids) else 0)
            before, (at, frame) = None, (-1, None)
            for wanted in ids:
                while at < wanted:
                    before, (at, frame) = frame, next(decoded, (len(self), None))
                # Some packets, as of VP8, show nothing: then the frame before stays, as in players.
                shown = before if before is not None and (at > wanted or frame is None) else frame
                if shown is None or frame is None or shown.is_corrupt:
                    raise SwanError(f"damaged or cut off: frame {wanted + 1} of {len(self)} cannot be decoded")
                yield self._upright(shown)

    def _decoded(self, container: InputContainer, stream: VideoStream, first: int) -> Iterator[tuple[int, VideoFrame]]:
        """(which frame it is, frame), by its time where it has one; from the start, or a key frame that leads to
        `first`."""
        has_index = container.format.name.startswith(_INDEXED) and stream.codec_context.name in _BEGIN_ANEW
        if first and self.stamps and has_index:
            container.seek(self.stamps[first], stream=stream)
            decoded = self._numbered(container, stream)
            begin = next(decoded, None)
            if begin is not None and begin[0] <= first:
                return itertools.chain([begin], decoded)
            container.seek(self.stamps[0], stream=stream)  # what the file says of its key frames is wrong
        return self._numbered(container, stream)

    def _numbered(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
        for count, frame in enumerate(container.decode(stream)):
            yield bisect_right(self.stamps, frame.pts) - 1 if self.stamps and frame.pts is not None else count, frame

    def _upright(self, frame: VideoFrame) -> np.ndarray:
        """As players show it; should the size change within the file, it is that of the first frame."""
        import numpy as np

        turns = _turns(frame)
        width, height = (self.height, self.width) if turns % 2 else (self.width, self.height)
        matrix = "ITU709" if frame.colorspace == _UNTAGGED and height >= HD_HEIGHT else None
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, src_colorspace=matrix)
        return np.ascontiguousarray(np.rot90(pixels, turns))


def open_video(path: Any) -> VideoFile:
    """Look into a video or a picture. Of a video only the first frame is decoded.

    Raises UsageError where there is no such file and SwanError where it holds no video, or none that can be read.
    """
    if isinstance(path, (str, Path)):
        if not os.path.isfile(path):
            raise UsageError(f"no video file {printable(path)}")
        path = str(Path(path).resolve())
    if not isinstance(path, str) or is_picture(path):
        height, width, _ = read_image(path).shape
        if isinstance(path, str) and (count := frames_of_image(path)) > 1:
            told = f"{printable(path)}: an animated picture of {count} frames, of which only the first would be seen"
            raise SwanError(f"{told}: make it a video, or save that frame alone")
        return VideoFile(path, width, height, (0.0,), 1 / _USUAL_FPS, _USUAL_FPS)
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise SwanError("no frame of it can be decoded")
        width, height = (first.height, first.width) if _turns(first) % 2 else (first.width, first.height)
    with _opened(path) as (container, stream):
        stamps, duration = _packets(container, stream)
        unit, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or _USUAL_FPS)
    if None in stamps:  # of raw streams
        times = tuple(index / rate for index in range(len(stamps)))
        return VideoFile(path, width, height, times, len(stamps) / rate, rate)
    times = tuple((stamp - stamps[0]) * unit for stamp in stamps)
    return VideoFile(path, width, height, times, times[-1] + (duration * unit or 1 / rate), rate, tuple(stamps))


def _packets(container: InputContainer, stream: VideoStream) -> tuple[list[Any], int]:
    """The times of all frames in order, in units of the stream, and how long the last one read is shown."""
    stamps, duration, count = [], 0, 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        if count > MAX_FRAMES:
            raise SwanError(f"more than {MAX_FRAMES:,} frames: cut it")
        if packet.is_corrupt:
            raise SwanError(f"damaged or cut off: frame {count} is not whole")
        if not packet.is_discard:
            stamps.append(packet.pts)
            duration = packet.duration or duration
    if stream.frames > count:
        raise SwanError(f"cut off: it claims {stream.frames:,} frames and holds {count:,}")
    if not stamps:
        raise SwanError("it holds no frame")
    return stamps if None in stamps else sorted(stamps), duration


@contextlib.contextmanager
def opened_container(path: str, what: str, formats: str = "") -> Iterator[InputContainer]:
    """A file of pictures or sound, opened by FFmpeg. What goes wrong within is a SwanError that names the file.

    what: it should be, in words; formats: that are read besides those of videos
    """
    import av

    with open_plain(path) as file:
        try:
            _check_claims(file)
            allowed = f"{_FORMATS},{formats}"
            options = {"format_whitelist": allowed, "max_pixels": str(MAX_PIXELS)}
            with av.open(file, options=options, metadata_errors="replace", buffer_size=_BUFFER_BYTES) as container:
                yield container
        except SwanError as error:
            raise type(error)(f"cannot read {what} {printable(path)}: {error}") from error
        except av.FFmpegError as error:
            why = "damaged, cut off, or of a format that is not known"
            raise SwanError(f"cannot read {what} {printable(path)}: {why} ({error.strerror})") from error
        except (MemoryError, ValueError, OSError) as error:
            raise SwanError(f"cannot read {what} {printable(path)}: {one_line(error)}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """(container, its first video stream), sizes checked."""
    import av

    with opened_container(path, "video") as container:
        cover = av.stream.Disposition.attached_pic  # of an album
        streams = [one for one in container.streams.video if not one.disposition & cover]
        if not streams:
            raise SwanError("it has sound, but no picture" if container.streams.audio else "it has no picture")
        if streams[0].codec_context is None:
            raise SwanError("how its pictures are coded is not known")
        stream, most = streams[0], most_pixels(os.path.getsize(path))
        if stream.width * stream.height > most:
            raise SwanError(f"{stream.width}x{stream.height} are more than {most:,} pixels")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for what the stream itself claims
        stream.thread_type = "AUTO"
        yield container, stream


def _turns(frame: VideoFrame) -> int:
    """Quarters of a circle, counterclockwise, by which players turn it."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _check_claims(file: BinaryIO) -> None:
    """Refuses an mp4 that claims samples without end: a table of one size for all takes a few bytes in the file, and
    some 70 for each sample in FFmpeg's reader. Leaves the file at its beginning.

    Source: ISO/IEC 14496-12, 4.2 (boxes), 8.7.3 (stsz, stz2), 8.8.8 (trun).
    """
    size = os.fstat(file.fileno()).st_size
    claimed = sum(_claimed_samples(file, 0, size))
    if claimed > MAX_FRAMES and claimed * _SAMPLE_BYTES > size:
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
