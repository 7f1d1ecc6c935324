"""The embedded model through the command line: the video shows what the prompt says, and can be made again."""

import json

import av
import numpy as np
import pytest

from benchmarks.judge import judge
from benchmarks.tiny_world import cases, report, run
from wan.cli import main


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
    flags = ("--prompt", "a blue triangle moving left on a gray background", "--sample_steps", "6")
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


def test_tiny_world_benchmark():
    outcomes, request = run(4, None, None)
    result = report(outcomes, request)
    assert len(cases()) == 64 and result["clips"] == 4 and result["held_out"]["clips"] == 2
    assert min(result["color"], result["shape"], result["direction"]) >= 0.75
