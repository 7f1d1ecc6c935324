"""Videos as users have them: of any depth, rate and container, turned, cut, and none that does harm."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.mutations import limits, survive
from tests.unit.video_helpers import ramp, sound, still, write
from wan.errors import SwanError, UsageError
from wan.media import write_video
from wan.video import HD_HEIGHT, VideoFile, open_video

COUNT = 9
FRAMES = ramp(COUNT)


def read(path, ids=None):
    video = open_video(path)
    return np.stack(list(video.frames(range(len(video)) if ids is None else ids)))


KINDS = {
    "h264.mp4": {},
    "h265.mp4": {"codec": "libx265", "x265-params": "log-level=none"},
    "ten_bits.mkv": {"pix_fmt": "yuv444p10le"},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "deep_grey.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "full_range.avi": {"codec": "mjpeg", "pix_fmt": "yuvj444p", "qmin": "1", "qmax": "2"},
    "lossless.avi": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "vp9.webm": {"codec": "libvpx-vp9", "crf": "1", "b": "0"},
    "stream.ts": {"pix_fmt": "yuv420p"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
}


@pytest.mark.parametrize("name", KINDS)
def test_containers_codecs_and_depths(tmp_path, name):
    write(tmp_path / name, FRAMES, **KINDS[name])
    video = open_video(tmp_path / name)
    assert (video.width, video.height, len(video)) == (64, 48, COUNT)
    assert video.times[0] == 0 and np.allclose(np.diff(video.times), 1 / 16, atol=2e-3)
    assert video.end == pytest.approx(COUNT / 16, abs=5e-3)
    assert np.abs(read(tmp_path / name)[:, 2::8, 2::8].astype(int) - FRAMES[:, 2::8, 2::8]).max() <= 6


def test_frames_are_those_asked_for(tmp_path):
    path = write(tmp_path / "a.avi", FRAMES, "ffv1", "bgr0")
    for ids in ([0, 2, 2, 5, 8], [8], [], [3, 3]):
        assert np.array_equal(read(path, ids) if ids else np.empty((0, 48, 64, 3)), FRAMES[ids])


SEEKABLE = {
    "b_frames.mp4": {"g": "3", "bf": "2"},
    "open_gop.mkv": {"g": "4", "bf": "2", "x264-params": "open-gop=1"},
    "stream.ts": {"g": "3", "pix_fmt": "yuv420p"},
    "h265.mp4": {"codec": "libx265", "x265-params": "keyint=4:bframes=2:open-gop=1:log-level=none"},
    "vp9.webm": {"codec": "libvpx-vp9", "crf": "1", "b": "0", "g": "4"},
    "vp8.webm": {"codec": "libvpx", "pix_fmt": "yuv420p", "g": "4", "b": "4000000"},
    "lossless.avi": {"codec": "ffv1", "pix_fmt": "bgr0"},
}


@pytest.mark.parametrize("name", SEEKABLE)
def test_the_same_frames_wherever_reading_begins(tmp_path, name):
    """Later clips of a film do not decode all that comes before them."""
    path = write(tmp_path / name, ramp(20), **SEEKABLE[name])
    whole = read(path)
    for first in range(len(whole)):
        assert np.array_equal(read(path, list(range(first, len(whole)))), whole[first:]), first


def test_what_comes_before_is_not_decoded(tmp_path, monkeypatch):
    video, decoded = open_video(write(tmp_path / "a.mp4", ramp(20), g="4")), []
    real = VideoFile._numbered

    def watched(self, *args):
        for one in real(self, *args):
            decoded.append(one[0])
            yield one

    monkeypatch.setattr(VideoFile, "_numbered", watched)
    assert len(list(video.frames([17, 18]))) == 2 and min(decoded) >= 12


def test_a_raw_stream_has_no_times(tmp_path):
    path = write(tmp_path / "a.h264", FRAMES, pix_fmt="yuv420p", bf="2")
    video = open_video(path)
    assert len(video) == COUNT and video.times == tuple(i / round(1 / video.times[1]) for i in range(COUNT))
    assert np.abs(read(path)[:, -2, -2, 0].astype(int) - FRAMES[:, -2, -2, 0]).max() <= 3


def test_frames_of_unequal_length(tmp_path):
    times = [0, 40, 80, 120, 900, 1000, 1040, 1080, 2000]
    video = open_video(write(tmp_path / "a.mp4", FRAMES, times=times))
    assert np.allclose(video.times, np.array(times) / 1000, atol=1e-3) and video.end > 2
    assert np.abs(read(tmp_path / "a.mp4")[:, -2, -2, 0].astype(int) - FRAMES[:, -2, -2, 0]).max() <= 3


@pytest.mark.parametrize("angle, turns", [(90, 1), (-90, 3), (180, 2)])
def test_it_is_turned_as_players_do(tmp_path, angle, turns):
    path = write(tmp_path / "a.mp4", FRAMES, rotation=angle)
    video, wanted = open_video(path), np.rot90(FRAMES, turns, axes=(1, 2))
    assert (video.height, video.width) == wanted.shape[1:3]
    assert np.abs(read(path)[:, 4::8, 4::8].astype(int) - wanted[:, 4::8, 4::8]).max() <= 4


def test_odd_sizes(tmp_path):
    path = write(tmp_path / "a.mp4", FRAMES[:, :47, :63])
    assert read(path).shape == (COUNT, 47, 63, 3)


def test_alpha_is_dropped(tmp_path):
    clear = np.concatenate([FRAMES, np.zeros_like(FRAMES[..., :1])], axis=-1)
    assert np.array_equal(read(write(tmp_path / "a.mov", clear, "qtrle", "argb")), FRAMES)


def test_a_video_of_ours_comes_back(tmp_path):
    """In its colours: it says that it is in BT.709."""
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:] = (220, 40, 40)
    write_video(tmp_path / "a.mp4", frames, 16, {"task": "t2v-tiny"})
    assert np.abs(read(tmp_path / "a.mp4").astype(int) - frames).max() <= 2


@pytest.mark.parametrize("height", [HD_HEIGHT, 480])
def test_colours_of_what_is_not_tagged(tmp_path, height):
    """Red, of which BT.709 and BT.601 make different luma and chroma: players take the one for HD, the other below."""
    red = np.zeros((1, height, 64, 3), np.uint8)
    red[..., 0] = 200
    path = write(tmp_path / "a.mkv", red, codec="ffv1", pix_fmt="yuv444p")  # made by BT.601
    error = np.abs(read(path).astype(int) - red).max()
    assert error > 5 if height == HD_HEIGHT else error <= 3


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    pixels = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    for name in ("a.png", "a.bmp", "named_wrongly.mp4.png"):
        still(tmp_path / name, pixels)
        video = open_video(tmp_path / name)
        assert (video.width, video.height, video.times) == (64, 48, (0.0,))
        assert np.array_equal(read(tmp_path / name, [0, 0]), np.stack([pixels] * 2))
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.png").read_bytes())  # told from its contents
    assert np.array_equal(read(tmp_path / "a.mp4")[0], pixels)
    assert np.array_equal(read(Image.fromarray(pixels))[0], pixels)


def test_a_gif_has_as_many_frames_as_it_shows(tmp_path):
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=60)
    pictures[0].save(tmp_path / "one.gif")
    assert np.abs(read(tmp_path / "a.gif")[:, -2, -2, 0].astype(int) - FRAMES[:, -2, -2, 0]).max() <= 3
    assert read(tmp_path / "one.gif").shape == (1, 48, 64, 3)


# What cannot be used: one line each


def refused(path, kind, message):
    with pytest.raises(kind, match=message) as caught:
        read(path)
    assert type(caught.value) is kind and len(str(caught.value).splitlines()) == 1
    assert str(path.name) in str(caught.value)


def test_there_is_no_such_file(tmp_path):
    refused(tmp_path / "gone.mp4", UsageError, "no video file")
    refused(tmp_path, UsageError, "no video file")


@pytest.mark.parametrize("name", ["a.mp4", "a.wav"])
def test_sound_alone(tmp_path, name):
    refused(sound(tmp_path / name), SwanError, "it has sound, but no picture")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(5_000), b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"])
def test_what_is_no_video(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    refused(tmp_path / "a.mp4", SwanError, "cannot read video .*format that is not known")


def test_a_playlist_is_not_followed(tmp_path):
    write(tmp_path / "b.ts", FRAMES, pix_fmt="yuv420p")
    (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'b.ts'}\n#EXT-X-ENDLIST\n")
    refused(tmp_path / "a.m3u8", SwanError, "format that is not known")
    (tmp_path / "a.txt").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'b.ts'}\n")
    refused(tmp_path / "a.txt", SwanError, "format that is not known")


@pytest.mark.parametrize("part", [0.2, 0.9])
@pytest.mark.parametrize("name", ["index_last.mp4", "index_first.mp4", "a.avi"])
def test_a_file_that_was_cut(tmp_path, name, part):
    options = KINDS["lossless.avi"] if name == "a.avi" else {}
    frames = np.random.default_rng(0).integers(0, 255, FRAMES.shape, dtype=np.uint8)
    path = write(tmp_path / name, frames, container={"movflags": "faststart"} if "first" in name else {}, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path, SwanError, "damaged|cut off")


def patched(path, old, new):
    data = bytearray(path.read_bytes())
    at = data.find(old)
    assert at >= 0
    data[at + len(old) : at + len(old) + len(new)] = new
    path.write_bytes(data)
    return path


def test_more_frames_are_claimed_than_there_are(tmp_path):
    path = write(tmp_path / "a.avi", FRAMES, "ffv1", "bgr0")
    data = path.read_bytes()
    at = data.find(b"strh") + 8 + 32  # how long the stream is
    assert struct.unpack_from("<I", data, at) == (COUNT,)
    path.write_bytes(data[:at] + struct.pack("<I", 50) + data[at + 4 :])
    refused(path, SwanError, f"cut off: it claims 50 frames and holds {COUNT}")


def test_frames_without_end_are_claimed_in_a_few_bytes(tmp_path):
    path = patched(write(tmp_path / "a.mp4", FRAMES), b"stsz", bytes(4) + struct.pack(">II", 1, 10_000_000))
    patched(path, b"stsc", bytes(4) + struct.pack(">III", 1, 1, 10_000_000))
    with limits(0, path.stat().st_size):
        refused(path, SwanError, "it claims 10,000,000 frames in")


def claims_by_png(path):
    write(path, FRAMES, "png", "rgb24")
    data = path.read_bytes()
    at = data.find(b"IHDR")
    while at >= 0:
        head = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[at + 12 : at + 17]
        data = data[:at] + head + struct.pack(">I", zlib.crc32(head)) + data[at + 21 :]
        at = data.find(b"IHDR", at + 4)
    path.write_bytes(data)


ENORMOUS = {
    "header.y4m": lambda path: path.write_bytes(b"YUV4MPEG2 W20000 H20000 F16:1 Ip C420jpeg\nFRAME\n" + bytes(99)),
    "wide.y4m": lambda path: path.write_bytes(b"YUV4MPEG2 W2000000000 H2 F16:1 Ip C420jpeg\nFRAME\n" + bytes(99)),
    "contents.mov": claims_by_png,  # the container says 64x48
    "a.gif": lambda path: path.write_bytes(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(99)),
}


@pytest.mark.parametrize("name", ENORMOUS)
def test_sizes_are_looked_at_before_memory_is_taken(tmp_path, name):
    ENORMOUS[name](tmp_path / name)
    before = peak_kb()
    refused(tmp_path / name, SwanError, "cannot read video")
    assert peak_kb() - before < 300_000  # a frame of these has a gigabyte or more


def peak_kb():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", UsageError, "no video file")


def test_decoders_are_not_heard(tmp_path, capfd):
    path = write(tmp_path / "a.mp4", FRAMES)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(SwanError):
        read(path)
    os.write(2, b"heard")
    assert capfd.readouterr() == ("", "heard")


def test_damaged_videos(tmp_path):
    files = []
    for name, options in {"mp4": {}, "webm": KINDS["vp9.webm"], "avi": KINDS["lossless.avi"], "gif": None}.items():
        if options is None:
            file = io.BytesIO()
            pictures = [Image.fromarray(frame) for frame in FRAMES[:4]]
            pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
            files.append(file.getvalue())
        else:
            files.append(write(tmp_path / f"a.{name}", FRAMES[:4], **options).read_bytes())

    def attempt(data):
        (tmp_path / "a").write_bytes(data)
        video = open_video(tmp_path / "a")
        for frame in video.frames([0, len(video) - 1]):
            assert frame.shape == (video.height, video.width, 3) and frame.dtype == np.uint8

    survive(files, 0, attempt, slack_bytes=140 << 20)
