"""Pictures of others: opened in the formats that people use, as 8-bit RGB, and at most so large.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Not all that Pillow knows: it hands EPS to Ghostscript, whatever the file is called.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
MAX_PIXELS = 100_000_000
PLAIN_PIXELS, PIXELS_PER_BYTE = 20_000_000, 1_000  # what a few bytes may claim; deflate saves no more than that
_STDERR = threading.Lock()
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits


def read_image(path: str | Path | Image.Image) -> np.ndarray:
    """An image file, or one in memory, as uint8 [H, W, 3] RGB, turned upright as its EXIF tag says. 16-bit greys are
    scaled.

    Raises UsageError where there is no such file and SwanError where it cannot be read as an image.
    """
    from PIL import Image

    if isinstance(path, Image.Image):
        if path.width * path.height > MAX_PIXELS:
            raise SwanError(f"{path.width}x{path.height} are more than {MAX_PIXELS:,} pixels: make it smaller")
        return _pixels(path.copy())
    with _opened(path) as file:
        try:
            with _unheard():
                return _decode(file)
        except SwanError as error:
            raise SwanError(f"cannot read image {printable(path)}: {error}") from error
        except Image.UnidentifiedImageError as error:
            raise SwanError(f"cannot read image {printable(path)}: damaged, or none of {', '.join(FORMATS)}") from error
        # A damaged file makes decoders raise whatever they meet: SyntaxError, struct.error, MemoryError and more.
        except Exception as error:
            raise SwanError(f"cannot read image {printable(path)}: {one_line(error)}") from error


def is_picture(path: str | Path) -> bool:
    """Whether a file begins as one of the formats that hold a single picture. A GIF is taken for a video."""
    from PIL import Image

    Image.init()
    with open_plain(path) as file:
        head = file.read(32)
    accepts = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN and name != "GIF")
    return any(accept(head) for accept in accepts if accept)


def most_pixels(size_bytes: int) -> int:
    """The most pixels that a file of this size may claim."""
    return min(MAX_PIXELS, max(PLAIN_PIXELS, PIXELS_PER_BYTE * size_bytes))


def frames_of_image(path: str | Path) -> int:
    """Of an image file that can be read. Pages of a TIFF are frames, too; the second view of a camera's MPO is none."""
    from PIL import Image

    with _opened(path) as file, _unheard(), Image.open(file) as image:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def image_sha256(path: str | Path | Image.Image) -> str:
    """SHA-256 of an image file, as it lies on the disk, or of the pixels of one in memory. Raises as `read_image` for
    what is no plain file."""
    digest = hashlib.sha256()
    if not isinstance(path, (str, Path)):
        return hashlib.sha256(path.tobytes()).hexdigest()
    with _opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    if not os.path.isfile(path):
        raise UsageError(f"no image file {printable(path)}")
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise SwanError(
                f"cannot read image {printable(path)}: {size:,} bytes are more than the {MAX_BYTES:,} allowed"
            )
        yield _Reader(file)


class _Reader(io.BufferedReader):
    """Takes no memory for more bytes than are left, whatever length a decoder has found and asks for."""

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Decoders print to stderr, through Python or, as libtiff does, from C. A failure is one line, and ours.

    One at a time: stderr is of the whole process, and a second thread would keep what the first one has put there.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with _STDERR, warnings.catch_warnings(), open(os.devnull, "wb") as nowhere:
        warnings.simplefilter("ignore")
        try:
            stderr = os.dup(2)
        except OSError:  # closed, so nothing is heard anyway
            yield
            return
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _decode(file: BinaryIO) -> np.ndarray:
    from PIL import Image

    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        width, height = image.size
        size = os.fstat(file.fileno()).st_size
        most = most_pixels(size)
        if width * height > most:  # looked at before any pixel is decoded
            raise SwanError(
                f"{width}x{height} are more than {most:,} pixels, the most for {size:,} bytes: make it smaller"
            )
        return _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an image, which is turned upright."""
    import numpy as np
    from PIL import ImageOps

    if image.mode in EIGHT_BIT_MODES:
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert("RGB"))
    white = _white(image)
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # Pillow turns round only greys of 8 bits
    ImageOps.exif_transpose(image, in_place=True)
    grey = np.asarray(image).astype(np.uint32)
    grey = (np.minimum(grey, white) * 255 + white // 2) // white
    grey = (255 - grey if inverted else grey).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _white(image: Image.Image) -> int:
    """The value that stands for white in a picture of more than 8 bits. Raises SwanError where that is anybody's guess:
    whole numbers of 32 bits and fractions have no agreed range."""
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
        return 2**bits - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # their 16 bits, in Pillow's wider type
        return 65_535
    raise SwanError(f"which of its values is white is not known (mode {image.mode}): save it with 8 or 16 bits")
