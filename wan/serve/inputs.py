"""Files that come with a request: sent, as a data URL, as a URL, or a video that this server made; into its folder.

A file is named by us, and what it is is told from its first bytes, whatever it is called. What is in it is looked at by
the checker, a process of its own.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.files import open_plain
from wan.options import FLAGS
from wan.options.names import MAX_PICTURES
from wan.options.values import shown
from wan.serve.refused import Refused, bad
from wan.serve.urls import fetch

_PICTURES_ALONE = {"image", "last_frame", "first_frame", "src_ref", "src_ref_images"}
_URL_NAMES = ("image_url", "video_url", "audio_url", "url")
_ID_NAMES = ("id", "video_id")
_HEAD_BYTES = 64
_BLOCK_BYTES = 1 << 20
# (offset, bytes there) -> (what it is, ending). Source: the formats' specifications.
_MAGIC = [
    ((0, b"\x89PNG\r\n\x1a\n"), ("picture", "png")),
    ((0, b"\xff\xd8\xff"), ("picture", "jpg")),
    ((8, b"WEBP"), ("picture", "webp")),
    ((4, b"ftypavif"), ("picture", "avif")),
    ((0, b"BM"), ("picture", "bmp")),
    ((0, b"II*\0"), ("picture", "tif")),
    ((0, b"MM\0*"), ("picture", "tif")),
    ((0, b"P6"), ("picture", "ppm")),
    ((0, b"P5"), ("picture", "pgm")),
    ((0, b"GIF8"), ("video", "gif")),
    ((4, b"ftypM4A"), ("sound", "m4a")),
    ((4, b"ftyp"), ("video", "mp4")),
    ((4, b"moov"), ("video", "mov")),
    ((0, b"\x1a\x45\xdf\xa3"), ("video", "mkv")),
    ((8, b"AVI "), ("video", "avi")),
    ((8, b"WAVE"), ("sound", "wav")),
    ((0, b"ID3"), ("sound", "mp3")),
    ((0, b"fLaC"), ("sound", "flac")),
    ((0, b"OggS"), ("sound", "ogg")),
    ((0, b"FLV\x01"), ("video", "flv")),
    ((0, b"\x47"), ("video", "ts")),
    ((0, b"\0\0\x01\xba"), ("video", "mpg")),
    *(((0, bytes([0xFF, second])), ("sound", "mp3")) for second in (0xFB, 0xF3, 0xF2, 0xFA)),
    *(((0, bytes([0xFF, second])), ("sound", "aac")) for second in (0xF1, 0xF9)),
]


class Inputs:
    """Takes the files of requests in. allow_urls: whether they are fetched; most_bytes: of one that is."""

    def __init__(self, allow_urls: bool, most_bytes: int):
        self._allow_urls, self._most_bytes = allow_urls, most_bytes

    def store(self, sources: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Their names in the folder, by flag, one or a list. Raises Refused. Waits for disks and networks: not for the
        thread of an event loop."""
        found: dict[str, Any] = {}
        for flag, source in sources.items():
            try:
                if FLAGS[flag].kind != "pictures":
                    found[flag] = self._one(flag, source, folder, 0)
                    continue
                many = source if isinstance(source, list) else [source]
                if len(many) > MAX_PICTURES:
                    raise bad(flag, f"{flag}: {len(many)} pictures; at most {MAX_PICTURES} are allowed")
                found[flag] = [self._one(flag, one, folder, number) for number, one in enumerate(many)]
            except Refused as error:
                error.param = error.param or flag
                raise
        return found

    def _one(self, flag: str, source: Any, folder: Path, number: int) -> str:
        path = folder / f"{flag}-{number}"
        self._write(flag, source, path)
        with open_plain(path) as file:
            head = file.read(_HEAD_BYTES)
        kind, ending = _kind_of(head)
        if not _fits(flag, kind):
            what = "picture" if flag in _PICTURES_ALONE else "sound" if flag == "audio" else "video or picture"
            raise bad(flag, f"{flag}: this is no {what} of a format that is read here", "invalid_file")
        os.rename(path, path.with_suffix(f".{ending}"))
        return f"{path.name}.{ending}"

    def _write(self, flag: str, source: Any, path: Path) -> None:
        if hasattr(source, "file"):  # an upload, which is in a temporary file
            source.file.seek(0)
            with open(path, "wb") as file:
                shutil.copyfileobj(source.file, file, _BLOCK_BYTES)
            return
        if isinstance(source, Path):  # of another job
            link(source, path)
            return
        if isinstance(source, dict):
            if "file_id" in source:
                raise bad(flag, f"{flag}: no files are kept here by an id: send it, or as a data URL")
            source = next((source[name] for name in _URL_NAMES if name in source), None)
        if not isinstance(source, str):
            raise bad(flag, f"{flag} must be a file, or an object with image_url, not {shown(source)}")
        if source[:5].lower() == "data:":
            path.write_bytes(_decoded(flag, source.partition(",")[2]))
        elif source[:8].lower().startswith(("http://", "https://")):
            if not self._allow_urls:
                raise bad(flag, f"{flag}: URLs are not fetched here: send the file, or a data URL", "url_refused")
            fetch(source, path, self._most_bytes)
        else:
            raise bad(flag, f"{flag} must be a file that is sent, a data URL or a URL, not {shown(source)}")


def video_id(source: Any) -> Any:
    """Of a video that this server made, where that is what a source names."""
    return next((source[name] for name in _ID_NAMES if name in source), None) if isinstance(source, dict) else None


def link(there: Path, path: Path) -> None:
    """A file of a job for another one, which each may remove."""
    try:
        os.link(there, path)
    except OSError:  # of another file system, or of one without links
        shutil.copyfile(there, path)


def _decoded(flag: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(flag, f"{flag}: this is no base64") from error


def as_data_url(text: str) -> str:
    """Base64 as it is, for clients that send it so."""
    return text if text[:5].lower() in ("data:", "http:", "https") else f"data:;base64,{text}"


def _kind_of(head: bytes) -> tuple[str, str]:
    for (offset, magic), told in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return told
    return "", ""


def _fits(flag: str, kind: str) -> bool:
    if flag in _PICTURES_ALONE:
        return kind == "picture"
    if flag == "audio":
        return kind in ("sound", "video")
    return kind == "video" or (kind == "picture" and FLAGS[flag].kind == "picture")
