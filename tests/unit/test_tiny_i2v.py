"""The clips of i2v-tiny: one first frame for all directions, shown to the network as inference shows it."""

import random

import pytest
import torch

from benchmarks.judge import judge
from benchmarks.tiny_world import cases
from tools.tiny.fit import load_vae
from tools.tiny.train_i2v import conditions_of, sigma_range
from tools.tiny.world import DIRECTIONS, SHAPES, SIZES, picture, render, sample_starts
from wan.conditioning.image import image_condition
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.locate import locate

TASK = load_task("i2v-tiny")


@pytest.mark.parametrize("seed", range(6))
def test_one_first_frame_for_all_directions(seed):
    starts = sample_starts(random.Random(seed), "green", list(SHAPES)[seed % 3], "gray")
    assert list(starts) == list(DIRECTIONS)
    pictures = [picture(clip, 64, 64) for clip in starts.values()]
    assert all((one == pictures[0]).all() for one in pictures)
    for direction, clip in starts.items():
        frames = ((render(clip, 64, 64) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        assert judge(frames) == ("green", clip.shape, direction, "gray")
        area = abs(frames - frames[0, 0, 0].astype(float)).sum((1, 2, 3))
        assert area.min() > 0.98 * area.max()  # nothing leaves the frame


@pytest.mark.parametrize("width, height", SIZES[:2])
def test_training_shows_the_first_frame_as_inference_does(width, height):
    vae = load_vae(locate(embedded_checkpoint(TASK), TASK), TASK, torch.float32)
    clips = [sample_starts(random.Random(seed), "red", "circle", "black")["up"] for seed in range(2)]
    together = conditions_of(vae, clips, width, height)
    for clip, ours in zip(clips, together):
        size = {"num_frames": TASK.sampling.frame_num, "height": height, "width": width}
        theirs = image_condition(vae.encode, picture(clip, width, height), **size).y[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_experts_share_the_noise_levels():
    (least, one), (zero, most) = (sigma_range(name, TASK.boundary) for name in ("high", "low"))
    assert (zero, one) == (0, 1) and least < TASK.boundary < most


def test_the_benchmark_asks_for_every_direction_as_often():
    asked = [clip.direction for clip, _ in cases("i2v-tiny")]
    assert all(15 <= asked.count(direction) <= 17 for direction in DIRECTIONS)
