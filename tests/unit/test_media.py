"""Videos, images and latents on disk: whole or not at all, with the settings inside."""

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
