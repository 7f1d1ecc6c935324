"""VACE with the embedded model: what is mixed, what is kept, and what the command line refuses in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.judge import judge
from benchmarks.tiny_world_vace import all_cases, appears, kept_psnr, make_case
from tests.unit.video_helpers import ramp, sound, still, write
from wan import Engine
from wan.cli import main
from wan.video import open_video

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def engine():
    with Engine(task="vace-tiny", device="cpu", residency="keep") as engine:
        yield engine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command runs, with things to give to it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "nine.avi", ramp(9), "ffv1", "bgr0")
    write(tmp_path / "five.avi", ramp(5), "ffv1", "bgr0")
    still(tmp_path / "half.png", np.repeat([[[0]], [[255]]], 24, axis=0).repeat(64, 1).repeat(3, 2).astype(np.uint8))
    still(tmp_path / "wide.png", ramp(1, 96, 32)[0])
    still(tmp_path / "thin.png", np.zeros((2, 1000, 3), np.uint8))
    frames = [Image.fromarray(frame) for frame in ramp(3)]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "text.mp4").write_text("no video\n")
    sound(tmp_path / "sound.mp4")
    return tmp_path


@pytest.fixture
def makes(folder, engine):
    """makes(**options) -> a quick video."""

    def run(**options):
        quick = {"prompt": PROMPT, "seed": 3, "sample_steps": 1, "frame_num": 9, "size": "48*48"}
        return engine.generate(**quick | options)

    return run


MIXES = {
    "nothing": ({}, (9, 48, 48)),
    "control": ({"src_video": "nine.avi"}, (9, 48, 48)),
    "mask": ({"src_video": "nine.avi", "src_mask": "half.png"}, (9, 48, 48)),
    "hole": ({"src_video": "nine.avi", "inpaint": "half.png", "context_scale": 0.8}, (9, 48, 48)),
    "margins": ({"src_video": "five.avi", "outpaint": "0,0,32,0"}, (5, 32, 64)),
    "extension": ({"extend": "five.avi"}, (9, 48, 48)),
    "ends": ({"image": "wide.png", "last_frame": "half.png"}, (9, 32, 64)),
    "references": ({"src_ref_images": "wide.png, half.png"}, (9, 48, 48)),
    "all": ({"src_video": "nine.avi", "src_mask": "nine.avi", "src_ref_images": "wide.png"}, (9, 48, 48)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix(makes, mix):
    """The references' latent frames are not in the video."""
    options, shape = MIXES[mix]
    video = makes(**options)
    assert video.frames.shape == (*shape, 3) and video.report["frames"] == shape[0]


def test_what_is_given_counts(makes):
    """And nothing else: the same again has the same frames."""
    alone, again = makes().frames, makes().frames
    assert np.array_equal(alone, again)
    other = [makes(**MIXES[mix][0]).frames for mix in ("references", "control", "mask", "hole")]
    other.append(makes(**MIXES["references"][0], context_scale=0.5).frames)
    assert len({frames.tobytes() for frames in (alone, *other)}) == 6


@pytest.mark.parametrize("index", range(4))
def test_one_of_each_kind_is_right(engine, tmp_path, index):
    """The benchmark makes all 32."""
    kind, clip, seed = all_cases()[index]
    case = make_case(kind, clip, tmp_path)
    frames = engine.generate(prompt=case.prompt, seed=seed, **case.options).frames
    assert appears(case, frames) and judge(frames).direction == clip.direction
    assert kind == "reference" or kept_psnr(case, frames) > 25


def test_the_command_line(folder, capsys):
    flags = ["--src_video", "five.avi", "--outpaint", "0,0,32,0", "--src_ref_images", "wide.png,half.png"]
    flags += ["--prompt", PROMPT, "--sample_steps", "1", "--size", "48x48", "--save_file", "out.mp4", "--quiet"]
    assert main(["--task", "vace-tiny", *flags]) == 0
    report, video = json.loads(capsys.readouterr().out.splitlines()[-1]), open_video("out.mp4")
    assert (report["frames"], report["size"]) == (5, "64x32")
    assert (len(video), video.width, video.height) == (5, 64, 32)


def test_previews_show_the_video_alone(makes):
    previews = []
    makes(src_ref_images="wide.png,half.png", preview_every=1, on_event=lambda event: previews.append(event.frames))
    assert {len(frames) for frames in previews if frames is not None} == {3}


def test_a_replay_asks_for_all_references_at_once(folder, capsys):
    flags = ["--task", "vace-tiny", "--prompt", PROMPT, "--sample_steps", "1", "--size", "48x48", "--frame_num", "5"]
    assert main([*flags, "--src_ref_images", "wide.png,half.png", "--save_file", "a.mp4", "--quiet"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["--replay", "a.mp4", "--save_file", "b.mp4", "--quiet"]) == 2
    both = f"{folder / 'wide.png'},{folder / 'half.png'}"
    assert f"add --src_ref_images {both}" in capsys.readouterr().err
    assert main(["--replay", "a.mp4", "--src_ref_images", both, "--save_file", "b.mp4", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == first["sha256"]


BAD = {
    ("--src_video", "sound.mp4"): (1, "it has sound, but no picture"),
    ("--src_video", "text.mp4"): (1, "damaged, cut off, or of a format that is not known"),
    ("--src_video", "gone.mp4"): (2, "no video file gone.mp4"),
    ("--src_video", "nine.avi", "--src_mask", "five.avi"): (2, "--src_mask has 5 frames and --src_video 9"),
    ("--src_video", "nine.avi", "--src_mask", "wide.png"): (2, "--src_mask is 96x32 and --src_video 64x48"),
    ("--src_ref_images", "wide.png,text.mp4"): (1, "cannot read image"),
    ("--context_scale", "much"): (2, "--context_scale must be a number, not 'much'"),
    ("--src_video", "nine.avi", "--extend", "five.avi"): (2, "--src_video and --extend both say"),
    ("--src_video", "nine.avi", "--outpaint", "9999,9999,9999,9999"): (2, "--outpaint leaves nothing of a source"),
    ("--src_video", "nine.avi", "--outpaint", "1.5,0,0,0"): (2, "--outpaint must be four numbers"),
    ("--src_video", "moves.webp"): (1, "an animated picture of 3 frames"),
    ("--extend", "half.png", "--last_frame", "thin.png"): (2, "--last_frame: 1000x2 is too unlike"),
    ("--src_ref_images", "wide.png,"): (2, "--src_ref_images is an empty path"),
    ("--src_video", ""): (2, "--src_video is an empty path"),
    ("--task", "t2v-tiny", "--src_video", "nine.avi"): (2, "--src_video is for vace tasks"),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(folder, capsys, flags):
    code, message = BAD[flags]
    assert main(["--task", "vace-tiny", "--prompt", PROMPT, *flags, "--save_file", "out.mp4", "--quiet"]) == code
    printed, line = capsys.readouterr()
    assert printed == "" and line.startswith("error: ") and line.count("\n") == 1 and message in line
    assert not (folder / "out.mp4").exists()
