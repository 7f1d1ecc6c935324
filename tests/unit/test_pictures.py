"""Pictures as a user has them: of any depth, in the usual formats, and none that does harm."""

import contextlib
import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.mutations import BATCHES, limits, survive
from wan.errors import SwanError, UsageError
from wan.pictures import FORMATS, image_sha256, read_image

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
GREY = np.repeat((RAMP * 255).round().astype(np.uint8)[:, :, None], 3, axis=2)
RAMP_16 = (RAMP * 65535).round().astype(np.uint16)


def tiff(pixels, bits, photometric=1, order="<"):
    """A grey TIFF, uncompressed, of rows of whole bytes."""
    height, width = RAMP.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    entries += [(273, 8), (277, 1), (278, height), (279, len(pixels))]
    directory = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(entries)) + directory + bytes(4)


def twelve_bits():
    values = (RAMP * 4095).round().astype(int).reshape(-1, 2)
    rows = [(one >> 4, (one & 15) << 4 | two >> 8, two & 255) for one, two in values]
    return np.array(rows, np.uint8).tobytes()


DEEP = {
    "grey.png": lambda path: Image.fromarray(RAMP_16).save(path),
    "grey.tif": lambda path: Image.fromarray(RAMP_16).save(path),
    "big_endian.tif": lambda path: path.write_bytes(tiff(RAMP_16.astype(">u2").tobytes(), 16, order=">")),
    "opencv.tif": lambda path: cv2.imwrite(str(path), RAMP_16),
    "grey.pgm": lambda path: path.write_bytes(b"P5 64 48 65535\n" + RAMP_16.astype(">u2").tobytes()),
    "ten_bits.pgm": lambda path: path.write_bytes(b"P5 64 48 1023\n" + (RAMP * 1023).round().astype(">u2").tobytes()),
    "twelve_bits.tif": lambda path: path.write_bytes(tiff(twelve_bits(), 12)),
    "white_is_zero.tif": lambda path: path.write_bytes(tiff((65535 - RAMP_16).tobytes(), 16, photometric=0)),
    "rgb.png": lambda path: cv2.imwrite(str(path), np.repeat(RAMP_16[:, :, None], 3, axis=2)),
    "rgb.tif": lambda path: cv2.imwrite(str(path), np.repeat(RAMP_16[:, :, None], 3, axis=2)),
    "rgba.png": lambda path: cv2.imwrite(str(path), np.repeat(RAMP_16[:, :, None], 4, axis=2)),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled(tmp_path, name):
    DEEP[name](tmp_path / name)
    seen = read_image(tmp_path / name)
    assert seen.dtype == np.uint8 and seen.shape == GREY.shape
    assert np.abs(seen.astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bits_and_less(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(GREY).convert(mode).save(path)
    seen = read_image(path).astype(int)
    assert seen.shape == GREY.shape and seen[:, :8].mean() < 20 and seen[:, -8:].mean() > 235


@pytest.mark.parametrize(
    "name, array", [("int32.tif", RAMP_16.astype(np.int32)), ("float.tif", RAMP.astype(np.float32))]
)
def test_values_without_an_agreed_white_are_refused(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(SwanError, match=f"{name}: which of its values is white is not known .mode .*8 or 16 bits"):
        read_image(tmp_path / name)


def test_a_deep_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP_16).save(tmp_path / "a.png", exif=exif)
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - np.rot90(GREY, -1)).max() <= 1


MOST_BYTES = 140 << 20  # of 20 million pixels, which a few bytes can rightly hold where all have one colour


def png(width, height, *chunks):
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n%%EOF\n"
HARMFUL = {
    "eps.png": (POSTSCRIPT, "none of JPEG, "),
    "bomb.png": (png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(99)))), "60000x60000|decompression bomb"),
    "wide.png": (png(2_000_000_000, 1), "2000000000x1|decompression bomb"),
    "text.png": (png(8, 8, (b"zTXt", b"comment\0\0" + zlib.compress(bytes(1 << 24)))), "[Dd]ecompress"),
    "large.pgm": (b"P5 30000 4000 255\n", "30000x4000 are more than 20,000,000 pixels, the most for 18 bytes"),
    "chunk.png": (png(8, 8)[:-12] + struct.pack(">I", 0x7FFFFFFF) + b"iCCP", ""),
    "exif.jpg": (b"\xff\xd8\xff\xe1\x00\x10Exif\0\0MM\0*\0\0\0\x08\xff\xd9", ""),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_pictures_are_refused(tmp_path, name):
    content, message = HARMFUL[name]
    (tmp_path / name).write_bytes(content)
    with (
        limits(name, len(content)),
        pytest.raises(SwanError, match=f"cannot read image .*{name}: .*({message})") as caught,
    ):
        read_image(tmp_path / name)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", ["tiff_deflate", "tiff_lzw", "jpeg"])
def test_decoders_are_not_heard(tmp_path, capfd, compression):
    """Neither from Python nor from C: what a user sees is one line."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.tif", compression=compression)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0x55
    (tmp_path / "a.tif").write_bytes(data)
    with contextlib.suppress(SwanError):
        read_image(tmp_path / "a.tif")
    os.write(2, b"heard")
    assert capfd.readouterr() == ("", "heard")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for path in (
        tmp_path / "pipe.png",
        tmp_path / "link.png",
        tmp_path,
        "/dev/zero",
        tmp_path / "a\0b",
        tmp_path / "gone",
    ):
        for read in (read_image, image_sha256):
            with pytest.raises(UsageError, match="no image file"):
                read(path)


@pytest.fixture(scope="module")
def originals():
    """A picture of each format, the deep ones and some with EXIF among them."""
    Image.init()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65535, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    kinds = [(noise, name, {}) for name in FORMATS if name != "MPO" and name in Image.SAVE]
    kinds += [(noise, name, {"exif": exif}) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    kinds += [(deep, "PNG", {}), (deep, "TIFF", {}), (noise.convert("P"), "PNG", {}), (noise.convert("1"), "TIFF", {})]
    kinds += [(noise, "TIFF", {"compression": how}) for how in ("tiff_lzw", "tiff_deflate", "jpeg")]
    files = []
    for picture, name, options in kinds:
        file = io.BytesIO()
        picture.save(file, name, **options)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_pictures(tmp_path, originals, batch):
    def attempt(data):
        (tmp_path / "a").write_bytes(data)
        pixels = read_image(tmp_path / "a")
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size

    survive(originals, batch, attempt, slack_bytes=MOST_BYTES)
