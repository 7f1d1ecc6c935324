"""The embedded model through the command line: the video shows what the prompt says, and can be made again."""

import json

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.judge import judge
from benchmarks.tiny_world import cases, report, run
from tools.tiny.world import Clip, from_start, picture
from wan.cli import main
from wan.media import read_image
from wan.tasks import embedded_checkpoint, load_task

I2V = load_task("i2v-tiny")


def generate(capsys, *args):
    """The JSON line of a run, and the frames of its file as uint8 [T, H, W, 3]."""
    assert main(["--quiet", *args]) == 0
    result = json.loads(capsys.readouterr().out)
    with av.open(result["file"]) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return result, frames


def test_without_any_flag_a_red_circle_moves_right(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, frames = generate(capsys, "--seed", "0")
    assert [path.name for path in tmp_path.iterdir()] == [result["file"].rpartition("/")[2]]
    assert frames.shape == (17, 64, 64, 3)
    assert judge(frames) == ("red", "circle", "right", "black")


@pytest.mark.parametrize("size", ["96*64", "80x80"])
def test_other_sizes(capsys, tmp_path, size):
    prompt = "a green square moving down on a white background"
    _, frames = generate(
        capsys, "--prompt", prompt, "--size", size, "--seed", "3", "--save_file", str(tmp_path / "a.mp4")
    )
    assert judge(frames)[:3] == ("green", "square", "down")


def test_same_seed_same_frames_and_replay(capsys, tmp_path):
    flags = ("--prompt", "a blue triangle moving left on a gray background", "--sample_steps", "6", "--frame_num", "5")
    first, _ = generate(capsys, *flags, "--save_file", str(tmp_path / "a.mp4"))  # a random seed
    again, _ = generate(capsys, *flags, "--seed", str(first["seed"]), "--save_file", str(tmp_path / "b.mp4"))
    replay, _ = generate(capsys, "--replay", first["file"], "--save_file", str(tmp_path / "c.mp4"))
    other, _ = generate(capsys, "--replay", first["file"], "--seed", "7", "--save_file", str(tmp_path / "d.mp4"))
    assert first["sha256"] == again["sha256"] == replay["sha256"] != other["sha256"]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_every_solver(capsys, tmp_path, solver):
    _, frames = generate(
        capsys, "--sample_solver", solver, "--seed", "0", "--sample_steps", "24", "--save_file", str(tmp_path / "a.mp4")
    )
    assert judge(frames)[:3] == ("red", "circle", "right")


@pytest.mark.parametrize("direction", ["left", "down"])
def test_one_picture_moves_where_the_prompt_says(capsys, tmp_path, direction):
    prompt = f"a red circle moving {direction} on a black background"
    _, frames = generate(
        capsys, "--task", "i2v-tiny", "--prompt", prompt, "--seed", "0", "--save_file", str(tmp_path / "a.mp4")
    )
    assert judge(frames) == ("red", "circle", direction, "black")
    assert cv2.PSNR(frames[0], read_image(embedded_checkpoint(I2V) / I2V.image)) > 24


@pytest.mark.parametrize("width, height", [(96, 64), (80, 80)])
def test_a_picture_of_other_size(capsys, tmp_path, width, height):
    clip = from_start(Clip("blue", "square", "up", "gray", radius=0.17), 0.45, 0.55, travel=0.3)
    Image.fromarray(picture(clip, width, height)).save(tmp_path / "first.png")
    flags = ("--image", str(tmp_path / "first.png"), "--size", f"{width}x{height}", "--seed", "0")
    _, frames = generate(
        capsys, "--task", "i2v-tiny", "--prompt", clip.prompt, *flags, "--save_file", str(tmp_path / "a.mp4")
    )
    assert frames.shape[1:3] == (height, width)
    seen = judge(frames)  # at sizes that were a small share of the training, corners become round
    assert (seen.color, seen.direction, seen.background) == (clip.color, clip.direction, clip.background)


def test_replay_with_the_picture_given_or_the_task_s_own(capsys, tmp_path):
    (tmp_path / "first.png").write_bytes((embedded_checkpoint(I2V) / I2V.image).read_bytes())
    flags = ("--task", "i2v-tiny", "--seed", "5", "--sample_steps", "4", "--frame_num", "5")
    own, _ = generate(capsys, *flags, "--save_file", str(tmp_path / "a.mp4"))
    given, _ = generate(capsys, *flags, "--image", str(tmp_path / "first.png"), "--save_file", str(tmp_path / "b.mp4"))
    again = [
        generate(capsys, "--replay", one["file"], "--save_file", str(tmp_path / "c.mp4"))[0] for one in (own, given)
    ]
    assert {one["sha256"] for one in (own, given, *again)} == {own["sha256"]}
    (tmp_path / "first.png").unlink()
    assert main(["--quiet", "--replay", given["file"]]) == 2  # what is the user's own is not replaced
    assert "the image of the stored run is gone" in capsys.readouterr().err


def test_both_experts_take_their_steps(capsys, tmp_path):
    assert main(["--task", "i2v-tiny", "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_by_expert"] == {"high": 9, "low": 11}
    high, low = (str(embedded_checkpoint(I2V) / I2V.experts[name]) for name in ("high", "low"))
    flags = ("--task", "i2v-tiny", "--seed", "0", "--sample_steps", "6", "--frame_num", "5")
    flags += ("--save_file", str(tmp_path / "a.mp4"))
    changed = [(), ("--high", low), ("--low", high)]
    assert len({generate(capsys, *flags, *files)[0]["sha256"] for files in changed}) == 3


@pytest.mark.parametrize("task", ["t2v-tiny", "i2v-tiny"])
def test_tiny_world_benchmark(task):
    outcomes, request = run(2, None, None, task=task)
    result = report(outcomes, request)
    assert result["task"] == task and ("first_frame_psnr_db" in result) == (task == "i2v-tiny")
    assert len(cases()) == 64 and result["clips"] == 2 and result["held_out"]["clips"] == 1
    assert min(result["color"], result["shape"], result["direction"]) == 1
