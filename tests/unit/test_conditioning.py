"""Sizes, pixels, masks and the ti2v latent, against tables made with the official arithmetic."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from wan.conditioning.condition import Condition
from wan.conditioning.image import conditioning_video, crop_last, frame_mask, image_condition, to_pixels
from wan.conditioning.latent import cover, first_frame_condition
from wan.conditioning.sizes import cover_size, i2v_size, latent_frames, latent_shape, ti2v_size
from wan.errors import UsageError

# img_h, img_w, max_area, height, width
I2V_SIZES = [
    (480, 832, 921600, 720, 1248),
    (720, 1280, 921600, 720, 1280),
    (1280, 720, 921600, 1280, 720),
    (1080, 1920, 921600, 720, 1280),
    (1024, 1024, 921600, 960, 960),
    (600, 1000, 921600, 736, 1232),
    (3000, 2000, 921600, 1168, 768),
    (777, 1333, 921600, 720, 1248),
    (512, 512, 921600, 960, 960),
    (333, 1000, 921600, 544, 1648),
    (1920, 1080, 921600, 1280, 720),
    (64, 64, 921600, 960, 960),
    (705, 1281, 921600, 704, 1280),
    (480, 832, 399360, 464, 832),
    (720, 1280, 399360, 464, 832),
    (1280, 720, 399360, 832, 464),
    (1080, 1920, 399360, 464, 832),
    (1024, 1024, 399360, 624, 624),
    (600, 1000, 399360, 480, 800),
    (3000, 2000, 399360, 768, 512),
    (777, 1333, 399360, 480, 816),
    (512, 512, 399360, 624, 624),
    (333, 1000, 399360, 352, 1088),
    (1920, 1080, 399360, 832, 464),
    (64, 64, 399360, 624, 624),
    (705, 1281, 399360, 464, 848),
]
TI2V_SIZES = [
    (480, 832, 901120, 704, 1248),
    (720, 1280, 901120, 704, 1248),
    (1280, 720, 901120, 1248, 704),
    (1080, 1920, 901120, 704, 1248),
    (1024, 1024, 901120, 928, 960),
    (600, 1000, 901120, 736, 1216),
    (3000, 2000, 901120, 1152, 768),
    (777, 1333, 901120, 736, 1216),
    (512, 512, 901120, 928, 960),
    (333, 1000, 901120, 544, 1632),
    (1920, 1080, 901120, 1248, 704),
    (64, 64, 901120, 928, 960),
    (705, 1281, 901120, 704, 1280),
]


@pytest.mark.parametrize(("img_h", "img_w", "max_area", "height", "width"), I2V_SIZES)
def test_i2v_size(img_h, img_w, max_area, height, width):
    assert i2v_size(max_area, img_h, img_w) == (height, width)


@pytest.mark.parametrize(("img_h", "img_w", "max_area", "height", "width"), TI2V_SIZES)
def test_ti2v_size(img_h, img_w, max_area, height, width):
    assert ti2v_size(max_area, img_h, img_w) == (height, width)


@pytest.mark.parametrize("size", [i2v_size, ti2v_size])
def test_impossible_area(size):
    with pytest.raises(UsageError, match="larger area"):
        size(100, 480, 832)


def test_latent_shape():
    assert latent_shape(16, 81, 720, 1280, 8) == (16, 21, 90, 160)
    assert latent_shape(48, 121, 704, 1280, 16) == (48, 31, 44, 80)
    assert latent_frames(1) == 1
    with pytest.raises(UsageError, match="such as 77 or 81"):
        latent_frames(80)


def test_cover_size():
    assert cover_size(60, 90, 60, 90) == (60, 90)
    assert cover_size(60, 90, 90, 50) == (162, 90)
    assert cover_size(60, 90, 600, 1800) == (60, 180)
    with pytest.raises(UsageError, match="90x9000 is too unlike 90x60 in shape"):
        cover_size(60, 90, 9000, 90)


def test_sizes_need_no_torch():
    code = "import sys, wan.conditioning.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("num_frames", [1, 5, 9, 81])
@pytest.mark.parametrize("last", [False, True])
def test_frame_mask(num_frames, last):
    mask = frame_mask(num_frames, 2, 3, last=last)
    assert mask.shape == (4, latent_frames(num_frames), 2, 3)
    expected = torch.zeros(4, latent_frames(num_frames))
    expected[:, 0] = 1
    if last:
        expected[3, -1] = 1
    assert torch.equal(mask, expected[:, :, None, None].expand(mask.shape))


def test_pixels_span_minus_one_to_one():
    image = np.array([[[0, 255, 51]]], dtype=np.uint8)
    assert to_pixels(image).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_last_frame_of_equal_size_is_untouched():
    pixels = torch.rand(3, 6, 4)
    assert torch.equal(crop_last(pixels, 6, 4), pixels)


def disc(width, height, radius):
    """White on black, in the middle."""
    y, x = np.mgrid[:height, :width]
    inside = (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2 < radius**2
    return np.repeat(inside[:, :, None] * np.uint8(255), 3, axis=2)


@pytest.mark.parametrize(
    ("width", "height", "radius"), [(128, 96, 24), (256, 192, 48), (32, 24, 6), (128, 200, 24), (300, 96, 24)]
)
def test_last_frame_of_another_size_covers_the_first(width, height, radius):
    """Scaled by as much as it takes and cropped: the disc stays round, in the middle, and has the size it should."""
    seen = crop_last(to_pixels(disc(width, height, radius)), 96, 128)
    expected = to_pixels(disc(128, 96, 24 * max(128 / width, 96 / height) * radius / 24))
    assert seen.shape == (3, 96, 128) and seen.abs().max() <= 1
    assert (seen - expected).abs().mean() < 0.05


def test_conditioning_video_is_grey_between():
    first, last = torch.ones(3, 2, 2), -torch.ones(3, 2, 2)
    assert conditioning_video([first, last], 5)[0, :, 0, 0].tolist() == [1, 0, 0, 0, -1]
    assert conditioning_video([first], 3)[0, :, 0, 0].tolist() == [1, 0, 0]


def test_image_condition_layout():
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    seen = []

    def encode(video):
        seen.append(video)
        return torch.full((1, 16, 2, 6, 8), 7.0)

    condition = image_condition(encode, image, num_frames=5, height=48, width=64, clip=True)
    assert seen[0].shape == (1, 3, 5, 48, 64)
    assert condition.y.shape == (1, 20, 2, 6, 8)
    assert (condition.y[:, 4:] == 7).all() and (condition.y[:, :4, 0] == 1).all() and (condition.y[:, :4, 1] == 0).all()
    assert [picture.shape for picture in condition.clip_images] == [(3, 1, 48, 64)]
    both = image_condition(encode, image, image, num_frames=5, height=48, width=64, clip=True)
    assert len(both.clip_images) == 2
    assert both.y[0, :4, 1, 0, 0].tolist() == [0, 0, 0, 1]
    assert image_condition(encode, image, num_frames=5, height=48, width=64).clip_images == ()


def test_cover_keeps_aspect_and_centre():
    image = np.zeros((32, 96, 3), dtype=np.uint8)
    image[:, 32:64] = 255  # the middle third, all that a square keeps
    pixels = cover(image, 32, 32)
    assert pixels.shape == (3, 1, 32, 32)
    assert (pixels == 1).all()


def test_first_frame_condition():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    frame = torch.full((1, 48, 1, 4, 4), 2.0)
    condition = first_frame_condition(lambda video: frame, image, num_frames=9, height=64, width=64)
    assert condition.timesteps(torch.tensor(500)).tolist() == [[0.0] * 4 + [500.0] * 8]
    latent = torch.zeros(48, 3, 4, 4)
    restored = condition.restore(latent)
    assert (restored[:, 0] == 2).all() and (restored[:, 1:] == 0).all()
    assert (latent == 0).all()


def test_no_condition():
    condition = Condition()
    latent = torch.zeros(16, 2, 4, 4)
    assert condition.restore(latent) is latent
    assert condition.timesteps(torch.tensor(731)).tolist() == [731]
