"""Videos and latents out, the settings inside a video in. Every write is atomic.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import atomic, open_plain, parse_json, temporary_name
from wan.pictures import read_image

__all__ = ["Sound", "join_videos", "read_image", "read_settings", "save_latents", "write_video"]

if TYPE_CHECKING:
    import numpy as np
    import torch

# x264 splits its work by thread, which changes the bits: a fixed number gives one file on every machine.
X264_OPTIONS = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-threads", "4", "-movflags", "+faststart")
# Players take what is not tagged for BT.709 in HD, for BT.601 below. `setparams` tags what the filters hand on, which
# newer versions of ffmpeg go by; older ones go by the options.
BT709_OPTIONS = (
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
    *("-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
)
SOUND_OPTIONS = ("-c:a", "aac", "-b:a", "192k", "-fflags", "+bitexact", "-flags:a", "+bitexact")
_ESCAPED, _BACKSLASH = re.compile(r"[\\=;#\n]"), r"\\\g<0>"  # in a metadata file of ffmpeg
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_COMMENT_BYTES = 1 << 20  # two prompts of 10,000 letters take 240 kB at most
_MAX_PARTS = 10_000  # boxes or chunks looked at


class Sound(NamedTuple):
    """What is heard beside a video: the first sound of a file, from so many seconds on."""

    path: str
    start: float = 0.0


def write_video(
    path: str | Path, frames: np.ndarray, fps: int, settings: dict[str, Any], sound: Sound | None = None
) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264 mp4, or one frame as PNG, by the extension of `path`.

    `settings` is stored as JSON (the mp4 `comment` tag, a PNG text chunk). The file appears whole or not at
    all; the same frames and settings give the same bytes. Raises SwanError when it cannot be written.
    """
    import numpy as np

    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise SwanError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    comment = json.dumps(settings, sort_keys=True)  # ASCII, so it survives any locale
    with atomic(path) as temporary:
        if path.suffix.lower() == ".png":
            if len(frames) != 1:
                raise SwanError(f"{path}: a PNG holds one frame, not {len(frames)}; use .mp4")
            _write_png(temporary, frames[0], comment)
        else:
            _write_mp4(temporary, frames, fps, comment, sound)


def join_videos(
    path: str | Path, clips: Sequence[Path], seconds: float, settings: Mapping[str, Any], sound: Sound | None = None
) -> None:
    """One mp4, so long, of those that `write_video` wrote, which are not encoded again. Atomic; raises SwanError."""
    path = Path(path)
    # The list lies beside them, so that it needs no more than their own names, whatever the folder is called.
    with atomic(path) as temporary, temporary_name(clips[0].parent) as listed:
        names = "".join(f"file {clip.name}\n" for clip in clips)
        listed.write_text(f"ffconcat version 1.0\n{names}", encoding="ascii", newline="\n")
        source = ("-f", "concat", "-safe", "0", "-i", f"file:{listed}")
        codec = ("-c:v", "copy", "-movflags", "+faststart")
        _mux(temporary, source, codec, json.dumps(settings, sort_keys=True), sound, seconds)


def _write_png(path: Path, frame: np.ndarray, comment: str) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", comment)
    Image.fromarray(frame).save(path, format="PNG", pnginfo=info)


def _write_mp4(path: Path, frames: np.ndarray, fps: int, comment: str, sound: Sound | None = None) -> None:
    import numpy as np

    _, height, width, _ = frames.shape
    if width % 2 or height % 2:
        raise SwanError(f"an mp4 needs an even width and height, not {width}x{height}")
    pixels = memoryview(np.ascontiguousarray(frames)).cast("B")
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    _mux(path, source, (*BT709_OPTIONS, *X264_OPTIONS), comment, sound, len(frames) / fps, pixels)


def _mux(
    path: Path,
    source: Sequence[str],
    codec: Sequence[str],
    comment: str,
    sound: Sound | None,
    seconds: float,
    pixels: memoryview | None = None,
) -> None:
    """An mp4 of what ffmpeg's `source` shows, so long, with the comment and the sound. Raises OSError."""
    import imageio_ffmpeg

    # In a file, for a command line holds some 100 kB, which two long prompts exceed.
    with temporary_name(path.parent) as metadata:
        metadata.write_text(
            f";FFMETADATA1\ncomment={_ESCAPED.sub(_BACKSLASH, comment)}\n", encoding="utf-8", newline="\n"
        )
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source]
        # "file:", for a name with a colon is a protocol to ffmpeg
        command += ["-f", "ffmetadata", "-i", f"file:{metadata}"]
        if sound is not None:  # silence after its end: the picture says how long the video is
            command += ["-ss", f"{sound.start:.6f}", "-i", f"file:{sound.path}"]
            command += ["-map", "2:a:0", "-af", "apad", "-t", f"{seconds:.6f}", *SOUND_OPTIONS]
        command += ["-map", "0:v", "-map_metadata", "1", *codec, "-f", "mp4", f"file:{path}"]
        # Run directly rather than through imageio_ffmpeg's writer, which does not look at ffmpeg's exit status:
        # a disk that fills up while the index is written would pass unnoticed.
        # In a session of its own, for the terminal's Ctrl-C would end it with an error before this process has heard.
        done = subprocess.run(command, input=pixels, capture_output=True, start_new_session=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(reason[-1] if reason else f"ffmpeg ended with status {done.returncode}")


def save_latents(path: str | Path, latents: torch.Tensor) -> None:
    """Write latents [C, F, H, W] to a safetensors file under the name `latents`. Raises SwanError."""
    save_tensors(path, {"latents": latents.detach().cpu()})


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file. Raises SwanError; atomic."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(Path(path)) as temporary:
        try:
            save_file({name: one.contiguous() for name, one in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings stored by `write_video` in an mp4 or PNG. Nothing else of the file is read, and nothing decoded.

    Raises UsageError where there is no such file and SwanError where it holds no settings.
    """
    if not os.path.isfile(path):
        raise UsageError(f"no file {printable(path)} to read settings from")
    with open_plain(path) as file:
        try:
            is_png = file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
            settings = parse_json(_png_comment(file) if is_png else _mp4_comment(file))
        except (OSError, ValueError) as error:
            raise SwanError(f"{printable(path)} holds no Swan settings: {one_line(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise SwanError(f"{printable(path)} holds no Swan settings: its comment is something else")
    return settings


def _png_comment(file: BinaryIO) -> str | bytes:
    """Of a file that stands behind the signature. Source: the PNG specification, 5.3 and 11.3.3."""
    for _ in range(_MAX_PARTS):
        head = file.read(8)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or kind == b"IEND":
            break
        start = file.tell()
        if kind in (b"tEXt", b"iTXt", b"zTXt") and file.read(8) == b"comment\0":
            text = _read(file, size - 8)
            if kind == b"tEXt":
                return text.decode("latin-1")
            if kind == b"zTXt" or text[:1] != b"\0":
                raise ValueError("its comment is compressed")
            return text[2:].split(b"\0", 2)[-1]  # behind the language and the keyword in it
        file.seek(start + size + 4)
    raise ValueError("it has no comment")


def _mp4_comment(file: BinaryIO) -> bytes:
    """Found without FFmpeg's reader, which takes 700 MB where 2 kB of a file claim ten million frames.

    Source: ISO/IEC 14496-12, 4.2 (boxes); the rest is what ffmpeg writes, as iTunes does.
    """
    start, end = 0, os.fstat(file.fileno()).st_size
    for kind in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
        start, end = _box(file, start, end, kind)
        start += {b"meta": 4, b"data": 8}.get(kind, 0)  # version and flags; type and language
    file.seek(start)
    return _read(file, end - start)


def _box(file: BinaryIO, start: int, end: int, kind: bytes) -> tuple[int, int]:
    """Where the contents of the first box of this kind start and end. Raises ValueError where there is none."""
    for _ in range(_MAX_PARTS):
        if end - start < 8:
            break
        file.seek(start)
        head = file.read(16)
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:], "big"), 16
        elif size == 0:  # as far as there is
            size = end - start
        if not header <= size <= end - start:
            raise ValueError("it is no mp4, or a damaged one")
        if head[4:8] == kind:
            return start + header, start + size
        start += size
    raise ValueError("it has no comment")


def _read(file: BinaryIO, size: int) -> bytes:
    if not 0 < size <= _MAX_COMMENT_BYTES:
        raise ValueError(f"its comment has {size:,} bytes, and at most {_MAX_COMMENT_BYTES:,} are read")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends within its comment")
    return data
