"""python -m wan.prepare: what it makes of videos of any size and rate, and what it refuses in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unit.video_helpers import still, write
from wan.conditioning.sizes import face_box, resampled_ids
from wan.options import build_request
from wan.prepare import main
from wan.video import open_video


def moving(count, width, height):
    """uint8 [T, H, W, 3]: on grey, a white square that moves to the right, 4 pixels a frame."""
    frames = np.full((count, height, width, 3), 100, np.uint8)
    for at, frame in enumerate(frames):
        frame[10:30, 4 * at : 4 * at + 20] = 255
    return frames


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command runs: one second of everything, at 15 frames a second."""
    monkeypatch.chdir(tmp_path)
    frames = moving(15, 160, 90)
    for name in ("pose", "actor"):
        write(tmp_path / f"{name}.mp4", frames, pix_fmt="yuv420p", fps=15)
    write(tmp_path / "mask.avi", np.where(frames > 200, 255, 0).astype(np.uint8), "ffv1", "bgr0", fps=15)
    write(tmp_path / "half.mp4", frames[:7], pix_fmt="yuv420p", fps=15)
    still(tmp_path / "ref.png", np.full((120, 80, 3), 200, np.uint8))
    return tmp_path


@pytest.fixture
def prepare(folder, capsys):
    """prepare(*flags) -> (exit code, what was printed last, on stdout or as an error)."""

    def run(*flags):
        code = main(["animate", "--out", "made", *flags])
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else err.strip()

    return run


def frames_of(name):
    video = open_video(f"made/{name}")
    return np.stack(list(video.frames(range(len(video)))))


ANIMATION = ("--src_pose", "pose.mp4", "--src_face", "actor.mp4", "--face_box", "0,10,20,20", "--src_ref", "ref.png")
REPLACEMENT = (*ANIMATION, "--src_bg", "actor.mp4", "--src_mask", "mask.avi")
SMALL = ("--size", "96*64")


def test_animation(prepare, folder):
    """All have the aspect ratio of the reference, which stands: the others lie between black bars."""
    code, report = prepare(*ANIMATION, *SMALL)
    assert code == 0 and (report["size"], report["frames"], report["fps"]) == ("64x96", 30, 30)
    assert set(report["files"]) == {"src_pose", "src_face", "src_ref"}
    pose, face = frames_of("src_pose.mp4"), frames_of("src_face.mp4")
    assert pose.shape == (30, 96, 64, 3) and face.shape == (30, 512, 512, 3)
    assert pose[0, :28].max() < 20 and pose[0, 68:].max() < 20 and 80 < pose[0, 60].mean() < 120
    assert face[0].mean() > 180 > 120 > face[-1].mean()  # the square has moved out of the box
    assert Image.open("made/src_ref.png").size == (64, 96)
    assert np.abs(pose[0].astype(int) - pose[1]).max() < 40 < np.abs(pose[0].astype(int) - pose[3]).max()  # each twice
    request = build_request({"task": "animate-14B", "ckpt_dir": str(folder), "src_root_path": "made"})
    assert (request.sample.width, request.sample.height, request.sample.film_frames) == (64, 96, 30)
    assert request.warnings == ()


def test_replacement(prepare, folder):
    """All have the aspect ratio of the video in which a character is replaced."""
    code, report = prepare(*REPLACEMENT, *SMALL, "--fps", "15")
    assert code == 0 and (report["size"], report["frames"]) == ("96x48", 15)
    mask, behind = frames_of("src_mask.mp4"), frames_of("src_bg.mp4")
    assert mask.shape == behind.shape == (15, 48, 96, 3)
    assert ((mask < 40) | (mask > 215)).mean() > 0.97
    assert behind[mask > 215].mean() < 12 and behind[mask < 40][:1000].mean() > 0
    is_white = mask[0, :, :, 0] > 127
    rows, columns = np.flatnonzero(is_white.any(1)), np.flatnonzero(is_white.any(0))
    # The square of 20 x 20 is some 11 pixels wide here, and grows by 9 on each side that has room.
    assert 17 <= len(columns) <= 26 and 20 <= len(rows) <= 30
    _, narrower = prepare(*REPLACEMENT, *SMALL, "--fps", "15", "--dilate", "0")
    assert (frames_of("src_mask.mp4")[0, :, :, 0] > 127).sum() < is_white.sum() / 2
    options = {"task": "animate-14B", "ckpt_dir": str(folder), "src_root_path": "made", "replace_flag": True}
    assert build_request(options).warnings == ()


def test_boxes_by_frame(prepare, folder):
    """A face that is followed stays where it is."""
    (folder / "list.json").write_text(json.dumps([[4 * at, 10, 20, 20] for at in range(15)]))
    (folder / "table.json").write_text(json.dumps({"0": [0, 10, 20, 20], "10": [40, 10, 20, 20]}))
    assert prepare("--src_face", "actor.mp4", "--face_box", "list.json")[0] == 0
    assert all(face[200:400, 150:350].mean() > 240 for face in frames_of("src_face.mp4"))
    assert prepare("--src_face", "actor.mp4", "--face_box", "table.json", "--fps", "15")[0] == 0
    faces = frames_of("src_face.mp4")
    assert faces[0].mean() > 180 and faces[9].mean() < 130 and faces[10].mean() > 180


def test_a_square_face_is_only_resized(prepare, folder):
    write(folder / "square.mp4", moving(15, 90, 90), pix_fmt="yuv420p", fps=30)
    assert prepare("--src_face", "square.mp4")[0] == 0
    assert frames_of("src_face.mp4").shape == (15, 512, 512, 3)


REFUSED = {
    (): "nothing to prepare: give some of --src_pose, --src_face, --src_ref",
    ("--src_pose", "none.mp4"): "no video file none.mp4",
    ("--src_ref", "pose.mp4"): "cannot read image pose.mp4",
    ("--src_bg", "actor.mp4"): "--src_bg is made black where the character is: give --src_mask with it",
    ("--face_box", "1,2,3,4"): "--face_box is of a video: give --src_face FILE with it",
    ("--src_face", "actor.mp4"): "--src_face is 160x90, which is no square: say with --face_box X,Y,W,H where",
    ("--src_face", "actor.mp4", "--face_box", "1,2,3"): "--face_box must be X,Y,W,H in pixels, or a JSON file",
    ("--src_face", "actor.mp4", "--face_box", "1,2,3,x"): "--face_box must be X,Y,W,H in pixels, or a JSON file",
    (
        "--src_face",
        "actor.mp4",
        "--face_box",
        "500,2,30,40",
    ): "--face_box 500,2,30,40 has no part of --src_face, which is",
    ("--src_face", "actor.mp4", "--face_box", "5,2,0,4"): "--face_box 5,2,0,4 has no part of --src_face",
    ("--src_face", "actor.mp4", "--face_box", "ref.png"): "ref.png",
    ("--src_pose", "pose.mp4", "--size", "big"): "--size must be WIDTH*HEIGHT in pixels, such as 1280*720, not 'big'",
    ("--src_pose", "pose.mp4", "--size", "8*8"): "an image of 160x90 has no size of at most 64 pixels",
    ("--src_pose", "pose.mp4", "--fps", "0"): "--fps must be a number from 1 to 240, not 0",
    ("--src_pose", "pose.mp4", "--dilate", "2"): "--dilate widens a mask: give --src_mask with it",
    ("--src_mask", "mask.avi", "--dilate", "-1"): "--dilate must be a whole number from 0 to 100",
    ("--src_pose", "pose.mp4", "--fps", "nan"): "--fps must be a number from 1 to 240, not nan",
    (
        "--src_pose",
        "pose.mp4",
        "--src_mask",
        "half.mp4",
    ): "differ in length (--src_pose 1.00 s, --src_mask 0.47 s)",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_what_is_refused(prepare, folder, flags):
    code, line = prepare(*flags)
    assert code in (1, 2) and "\n" not in line and REFUSED[flags] in line, line
    assert not (folder / "made").exists()


def test_inputs_are_not_overwritten(prepare, folder):
    (folder / "made").mkdir()
    (folder / "pose.mp4").rename(folder / "made/src_pose.mp4")
    before = (folder / "made/src_pose.mp4").read_bytes()
    code, line = prepare("--src_pose", "made/src_pose.mp4")
    assert code == 2 and "it would be overwritten" in line
    assert (folder / "made/src_pose.mp4").read_bytes() == before and len(list((folder / "made").iterdir())) == 1


def test_frame_rates():
    assert resampled_ids(30, 1.0, 30) == list(range(30))
    assert resampled_ids(60, 2.0, 15) == list(range(0, 60, 2))
    assert resampled_ids(4, 4 / 15, 30) == [0, 0, 1, 2, 2, 2, 3, 3]  # half-way the even one, and none past the end
    assert len(resampled_ids(90, 2.9999999, 30)) == 90


def test_a_face_is_cut_out_with_what_is_around_it():
    assert face_box((100, 100, 100, 100), 400, 400) == (92, 89, 207, 203)  # 1.3 times the area, more of it above
    assert face_box((0, 0, 50, 50), 40, 60) == (0, 0, 53, 40)
