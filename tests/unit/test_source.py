"""Video made of another video: `--video` and `--strength`."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan import Engine
from wan.conditioning.source import noised, source_latent
from wan.errors import UsageError
from wan.media import write_video
from wan.options import build_request
from wan.pipeline import WanPipeline
from wan.solvers import make_solver
from wan.video import open_video

PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def video(tmp_path):
    """Nine frames a second of 96x64, two seconds; frame n has the grey level 12n."""
    frames = np.empty((18, 64, 96, 3), np.uint8)
    frames[:] = 12 * np.arange(18)[:, None, None, None]
    write_video(tmp_path / "grey.mp4", frames, 9, {"task": "x"})
    return str(tmp_path / "grey.mp4")


def request(video=None, task="t2v-tiny", **options):
    return build_request({"task": task, "prompt": PROMPT, "device": "cpu", "video": video, "seed": 3, **options})


def test_shape_and_steps(video):
    sample = request(video).sample
    assert (sample.width, sample.height, sample.frame_num) == (64, 48, 13)  # 16 frames at 8 a second
    assert (sample.strength, sample.first_step, sample.steps) == (0.8, 4, 20)
    assert request(video, frame_num=5, size="96*96").sample.frame_num == 5
    steps = {strength: request(video, strength=strength).sample.first_step for strength in (0.01, 0.5, 1)}
    assert steps == {0.01: 19, 0.5: 10, 1: 0}
    plain = request().sample
    assert plain.strength is None and plain.first_step == 0


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "a.png")
    for task in ("t2v-tiny", "i2v-tiny"):
        assert request(str(tmp_path / "a.png"), task, save_file=str(tmp_path / "b.png")).sample.frame_num == 1
    engine = Engine(task="t2v-tiny", device="cpu")
    made = engine.generate(prompt=PROMPT, video=str(tmp_path / "a.png"), sample_steps=2, seed=1)
    assert made.frames.shape[0] == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strength": 0.5, "video": None}, "--strength is for --video FILE"),
        ({"strength": 0}, "--strength must be a number above 0 and at most 1"),
        ({"strength": 1.1}, "--strength must be a number above 0"),
        ({"strength": "much"}, "--strength must be"),
        ({"video": "gone.mp4"}, "no video file gone.mp4"),
        ({"task": "vace-tiny"}, "--video is for t2v, i2v, flf2v and ti2v tasks, not for vace-tiny"),
    ],
)
def test_bad_options(video, options, line):
    with pytest.raises(UsageError, match=line):
        request(**{"video": video, **options})


def test_frames_are_taken_at_the_models_speed(video):
    taken = []

    def encode(pixels):
        taken.append(((pixels[0, 0, :, 0, 0] + 1) * 127.5).round().tolist())
        return pixels

    source_latent(encode, open_video(video), 13, 8, 32, 32)
    wanted = [12 * int(at / 8 * 9 + 1e-6) for at in range(13)]
    assert np.abs(np.subtract(taken[0], wanted)).max() <= 2


def test_the_latent_at_a_noise_level():
    source, noise = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(noised(source, noise, 0.25), source * 0.75)


def test_solver_in_the_middle():
    whole, rest = (make_solver("unipc", steps=8, shift=3.0, first=first) for first in (0, 5))
    assert torch.equal(rest.timesteps, whole.timesteps[5:]) and torch.equal(rest.sigmas, whole.sigmas[5:])
    assert (rest.steps, rest.first) == (3, 5)


def test_the_less_strength_the_more_is_kept(video):
    engine, off, steps = Engine(task="t2v-tiny", device="cpu"), {}, []
    shown = np.stack(list(open_video(video).frames(range(5))))[:, :32, :48].astype(float)
    options = {"prompt": PROMPT, "seed": 3, "size": "48*48", "frame_num": 5}
    options |= {"sample_steps": 10, "sample_guide_scale": 1}
    for strength in (0.1, 1.0):
        made = engine.generate(**options, video=video, strength=strength, on_event=steps.append)
        assert made.frames.shape == (5, 32, 48, 3)
        off[strength] = np.abs(made.frames - shown).mean()
    assert off[0.1] < off[1.0]
    done = [event.done for event in steps if event.kind == "step"]
    assert done == [10, *range(1, 11)]
    cached = engine.generate(**options, video=video, strength=0.5, fbcache=True, fb_thresh=0)
    assert (cached.frames == engine.generate(**options, video=video, strength=0.5).frames).all()


def test_experts_that_are_left_out_are_not_loaded(video, tmp_path):
    spec = shrunk("t2v-A14B")
    folder = write_checkpoint(tmp_path / "t2v", spec)
    asked = request(video, "t2v-A14B", ckpt_dir=str(folder), size="32*32", frame_num=5, sample_steps=8, strength=0.25)
    pipe = WanPipeline.from_request(asked, spec)
    assert pipe.plan["steps_by_expert"] == {"low": 2, "high": 0}
    pipe(asked)
    assert "high" not in pipe.experts
