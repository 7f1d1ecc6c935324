"""Videos, images and latents on disk: whole or not at all, with the settings inside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from wan.errors import SwanError, UsageError
from wan.media import read_image, read_settings, save_latents, write_video

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
SETTINGS = {"task": "t2v-tiny", "prompt": 'quotes " and 你好; a=b\nnext', "seed": 2**62, "negative_prompt": "，"}


def clip(frames=5, height=48, width=64):
    ramp = np.linspace(0, 255, frames * height * width * 3)
    return ramp.reshape(frames, height, width, 3).astype(np.uint8)


def test_mp4_holds_frames_and_settings(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, clip(), 16, SETTINGS)
    assert read_settings(path) == SETTINGS
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate == 16 and stream.codec_context.name == "h264"
    assert decoded.shape == clip().shape
    assert np.abs(decoded.astype(int) - clip()).mean() < 6
    assert [item.name for item in tmp_path.iterdir()] == ["video.mp4"]


def as_a_player_shows(path):
    """RGB of every frame, as its own tags say it is to be made, which must be those of BT.709 in the range of TV."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            tags = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
            assert [int(tag) for tag in tags] == [1, 1, 1, 1]
            planes = [
                np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width] for plane in frame.planes
            ]
            y, u, v = planes[0], *(np.kron(plane, np.ones((2, 2), int)) for plane in planes[1:])
            y, u, v = (y - 16.0) / 219, (u - 128.0) / 224, (v - 128.0) / 224
            red, blue = y + 2 * (1 - 0.2126) * v, y + 2 * (1 - 0.0722) * u
            green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
            yield np.clip(np.stack([red, green, blue], axis=-1), 0, 1) * 255


@pytest.mark.parametrize("height, width", [(48, 64), (736, 1296)])
def test_colours_are_those_that_a_player_shows(tmp_path, height, width):
    """In small and in HD videos, of which players think differently if they are not told."""
    colours = [(r, g, b) for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)]
    colours = colours if height < 720 else [(255, 0, 0), (0, 255, 0), (200, 150, 120)]
    for colour in colours:
        frames = np.full((2, height, width, 3), colour, np.uint8)
        write_video(tmp_path / "a.mp4", frames, 8, SETTINGS)
        shown = list(as_a_player_shows(tmp_path / "a.mp4"))
        assert len(shown) == 2 and np.abs(np.stack(shown) - frames).max() <= 3, colour


PROMPTS = {
    "long": "\U0001f600" * 10_000,
    "signs": "\\=;#\n\r\t\"'%{}:,[]" * 50 + "\\",
    "unicode": "é你好\u2028\x00\x1b\x7f\ufeff",
    "metadata": ";FFMETADATA1\ncomment=other\n[CHAPTER]\n",
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_every_prompt_is_stored_exactly(tmp_path, name, prompt):
    settings = {"task": "t2v-tiny", "prompt": PROMPTS[prompt], "negative_prompt": PROMPTS[prompt], "=#;\\\n": 1}
    write_video(tmp_path / name, clip(1, 16, 16), 8, settings)
    assert read_settings(tmp_path / name) == settings
    opened, others_name_for_it = (Image.open, "text") if name.endswith("png") else (av.open, "metadata")
    with opened(str(tmp_path / name)) as file:
        assert json.loads(getattr(file, others_name_for_it)["comment"]) == settings
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_a_name_that_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("http:a.mp4", clip(1, 16, 16), 8, SETTINGS)
    assert read_settings("http:a.mp4") == SETTINGS


@pytest.mark.parametrize("name", ["video.mp4", "frame.png"])
def test_same_frames_same_bytes(tmp_path, name):
    frames = clip(1 if name.endswith("png") else 5)
    write_video(tmp_path / name, frames, 16, SETTINGS)
    first = (tmp_path / name).read_bytes()
    write_video(tmp_path / name, frames, 16, SETTINGS)
    assert (tmp_path / name).read_bytes() == first


def test_one_frame_as_png(tmp_path):
    path = tmp_path / "frame.png"
    write_video(path, clip(1), 16, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert np.array_equal(read_image(path), clip(1)[0])
    with pytest.raises(SwanError, match="one frame"):
        write_video(path, clip(2), 16, {})


def test_frames_that_are_no_video(tmp_path):
    with pytest.raises(SwanError, match="even"):
        write_video(tmp_path / "a.mp4", clip(5, 47, 64), 16, {})
    with pytest.raises(SwanError, match="uint8"):
        write_video(tmp_path / "a.mp4", clip().astype(np.float32), 16, {})
    assert not list(tmp_path.iterdir())


# A limit on the size of files is what a full disk looks like to ffmpeg and to safetensors.
FULL_DISK = """
import resource, sys
import numpy as np, torch
from wan.errors import SwanError
from wan.media import save_latents, write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 255, (9, 128, 128, 3), dtype=np.uint8)
for write in (lambda: write_video("video.mp4", noise, 16, {}), lambda: write_video("frame.png", noise[:1], 16, {}),
              lambda: save_latents("latents.safetensors", torch.zeros(16, 5, 64, 64))):
    try:
        write()
        sys.exit("nothing failed")
    except SwanError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs file size limits")
def test_full_disk_leaves_no_partial_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("cannot write ") for line in lines)
    assert not list(tmp_path.iterdir())


def test_latents(tmp_path):
    import torch
    from safetensors.torch import load_file

    latents = torch.randn(16, 2, 4, 4)
    save_latents(tmp_path / "l.safetensors", latents)
    assert torch.equal(load_file(tmp_path / "l.safetensors")["latents"], latents)
    with pytest.raises(SwanError, match="cannot write"):
        save_latents(tmp_path / "no" / "l.safetensors", latents)


def test_image_is_turned_upright_and_made_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (30, 20), 7).save(tmp_path / "grey.jpg", exif=exif)
    assert read_image(tmp_path / "grey.jpg").shape == (30, 20, 3)
    Image.new("RGBA", (30, 20), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[0, 0].tolist() == [10, 20, 30]


def test_settings_of_other_files(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        read_settings(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    write_video(tmp_path / "other.mp4", clip(), 16, {"by": "another program"})
    for name in ("text.mp4", "plain.png", "other.mp4"):
        with pytest.raises(SwanError, match="holds no Swan settings") as caught:
            read_settings(tmp_path / name)
        assert caught.value.exit_code == 1
