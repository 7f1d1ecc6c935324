"""What VACE is given: sizes, frames and masks, from source videos, from holes and margins in them, and from clips."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.video_helpers import ramp, still, write
from wan.conditioning import vace_inputs as made
from wan.conditioning.sizes import Margins, cover_size, frame_ids, vace_size
from wan.errors import UsageError
from wan.options import build_request
from wan.tasks import load_task
from wan.tasks.kinds import kind_of
from wan.video import open_video

SPEC = load_task("vace-1.3B")
AREA, TOKENS = 832 * 480, 32_760


@pytest.fixture
def video(tmp_path):
    """Nine frames of 64x48, exact."""
    return open_video(write(tmp_path / "video.avi", ramp(9), "ffv1", "bgr0"))


def grey(*levels):
    return torch.tensor(levels).div(127.5).sub(1)


# Size and length


def test_a_source_is_never_enlarged_and_keeps_its_shape():
    assert vace_size(AREA, TOKENS, 81, 1080, 1920) == (480, 832, 81)
    assert vace_size(AREA, TOKENS, 81, 1920, 1080) == (848, 464, 81)
    assert vace_size(AREA, TOKENS, 81, 64, 64) == (64, 64, 81)
    assert vace_size(AREA, TOKENS, 81, 63, 79) == (48, 64, 81)
    for height, width in ((16, 10_000), (10_000, 16), (17, 4_000)):
        rows, columns, _ = vace_size(AREA, TOKENS, 5, height, width)
        assert rows >= 16 and columns >= 16 and rows * columns <= min(AREA, height * width)
        cover_size(rows, columns, height, width)


def test_a_source_is_thinned_out_to_the_tokens_allowed():
    assert [vace_size(AREA, TOKENS, count, 480, 832)[2] for count in (1, 2, 5, 80, 81, 82, 5_000)] == [
        1,
        1,
        5,
        77,
        81,
        81,
        81,
    ]
    assert vace_size(AREA, TOKENS, 200, 512, 512)[2] == 121  # a smaller one leaves room for more


@pytest.mark.parametrize("height, width", [(15, 400), (400, 15), (1, 1)])
def test_a_source_smaller_than_a_patch(height, width):
    with pytest.raises(UsageError, match=f"{width}x{height} is too small"):
        vace_size(AREA, TOKENS, 9, height, width)


def test_frames_are_picked_evenly_from_first_to_last():
    assert frame_ids([at / 16 for at in range(81)], 81 / 16, 81) == list(range(81))
    assert frame_ids([at / 30 for at in range(120)], 4.0, 5) == [0, 29, 59, 89, 119]
    assert frame_ids([0.0], 1 / 16, 1) == [0]
    # A frame that is shown for long is taken more often, and one that is hardly seen not at all.
    assert frame_ids([0.0, 0.1, 0.9, 0.91, 1.0], 1.1, 5) == [0, 1, 1, 1, 4]


# Source and mask


def test_a_source_alone_steers(video):
    frames, mask = made.source(video, None, 9, 48, 64)
    assert frames.shape == (3, 9, 48, 64) and frames.dtype == torch.float32
    assert torch.equal(frames[0, :, -1, -1], grey(*range(10, 100, 10)))
    assert torch.equal(mask, torch.ones(1, 9, 48, 64))


def test_soft_masks_stay_soft(video, tmp_path):
    ramped = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    mask = made.source(video, open_video(still(tmp_path / "mask.png", ramped)), 9, 48, 64)[1]
    assert torch.allclose(mask[0, 3, 7], torch.from_numpy(ramped[0, :, 0].astype(np.float32) / 255), atol=1e-6)
    assert torch.equal(mask[:, 0], mask[:, -1])


def test_a_mask_takes_the_frames_of_its_video(tmp_path, video):
    white_from = np.zeros((9, 48, 64, 3), np.uint8)
    white_from[6:] = 255
    mask = open_video(write(tmp_path / "mask.avi", white_from, "ffv1", "bgr0"))
    frames, mask = made.source(video, mask, 5, 48, 64)
    seen = ((frames[0, :, -1, -1] + 1) * 12.75).round() - 1
    assert seen.tolist() == [0, 2, 4, 6, 8]
    assert mask[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1]


def test_a_hole_is_grey(video, tmp_path):
    hole = np.zeros((48, 64, 3), np.uint8)
    hole[:24] = 255
    frames, mask = made.inpainted(video, open_video(still(tmp_path / "hole.png", hole)), 9, 48, 64)
    assert torch.equal(mask[0, :, 24:], torch.zeros(9, 24, 64)) and torch.equal(mask[0, :, :24], torch.ones(9, 24, 64))
    assert torch.allclose(frames[:, :, :24], grey(made.GREY), atol=1e-6)
    assert torch.equal(frames[0, :, -1, -1], grey(*range(10, 100, 10)))


def test_margins_are_made_anew(video):
    frames, mask = made.outpainted(video, Margins(16, 0, 0, 32), 9, 80, 80)
    assert torch.equal(frames[:, :, :48, 16:], made.source(video, None, 9, 48, 64)[0])
    assert torch.equal(mask[0, 0, :48, 16:], torch.zeros(48, 64)) and mask[0, 0].sum() == 80 * 80 - 48 * 64
    outside = mask[0, 0] == 1
    assert torch.equal(frames[:, :, outside].unique(), grey(made.GREY))


def test_margins_shrink_with_their_video(video):
    frames, mask = made.outpainted(video, Margins(64, 0, 64, 0), 9, 16, 64)
    assert frames.shape == (3, 9, 16, 64) and mask[0, 0, 0].sum() in (42, 43)


# Clips that go on


def test_a_clip_goes_on(video):
    frames, mask = made.extended(video, None, 17, 48, 64)
    assert torch.equal(frames[:, :9], made.source(video, None, 9, 48, 64)[0])
    assert mask[0, :, 0, 0].tolist() == [0] * 9 + [1] * 8
    assert torch.equal(frames[:, 9:].unique(), grey(made.GREY))


def test_between_two_clips(video, tmp_path):
    last = open_video(still(tmp_path / "last.png", np.full((96, 128, 3), 200, np.uint8)))
    frames, mask = made.extended(video, last, 13, 48, 64)
    assert mask[0, :, 0, 0].tolist() == [0] * 9 + [1] * 3 + [0]
    assert torch.equal(frames[:, -1], grey(200).expand(3, 48, 64))
    frames, mask = made.extended(None, last, 5, 48, 64)
    assert mask[0, :, 0, 0].tolist() == [1] * 4 + [0]


def test_nothing_given_is_zeros_and_ones():
    frames, mask = made.blank(5, 32, 48)
    assert torch.equal(frames, torch.zeros(3, 5, 32, 48)) and torch.equal(mask, torch.ones(1, 5, 32, 48))


# References


def test_a_reference_is_fitted_on_white():
    tall = made.reference(np.full((80, 20, 3), 60, np.uint8), 40, 60)
    assert tall.shape == (3, 1, 40, 60)
    assert torch.allclose(tall[:, 0, :, 25:35], grey(60).expand(3, 40, 10), atol=1e-6)
    assert torch.equal(tall[..., :25], torch.ones(3, 1, 40, 25)) and torch.equal(
        tall[..., 35:], torch.ones(3, 1, 40, 25)
    )


def test_a_line_is_a_reference_too():
    assert (made.reference(np.zeros((1, 4_000, 3), np.uint8), 32, 32) == -1).any()


# From the options to the size, before anything is loaded


def sample(**options):
    return build_request({"task": SPEC.name, "ckpt_dir": ".", "prompt": "a cat", **options}).sample


def shape(**options):
    made = sample(**options)
    return made.width, made.height, made.frame_num


def test_sizes_are_told_from_headers(tmp_path, video):
    assert shape() == (832, 480, 81)
    assert shape(frame_num=17, size="480*832") == (480, 832, 17)
    assert shape(src_video=video.path, frame_num=81) == (64, 48, 9)
    assert shape(src_video=video.path, outpaint="16,0,0,32") == (80, 80, 9)
    assert shape(extend=video.path, frame_num=33) == (64, 48, 33)
    assert shape(last_frame=Image.new("RGB", (96, 64)), frame_num=5) == (96, 64, 5)
    assert shape(src_ref_images=[Image.new("RGB", (96, 64))] * 2) == (832, 480, 81)


def test_references_take_latent_frames():
    references = [Image.new("RGB", (96, 64))] * 3
    assert kind_of(SPEC).extra_frames(sample(src_ref_images=references)) == 3


def encode(pixels):
    """A VAE of nothing but its shapes."""
    _, _, frames, height, width = pixels.shape
    return pixels.new_zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)


def test_all_inputs_become_a_condition(tmp_path, video):
    """Of the run's size, whatever is mixed."""
    hole = Image.fromarray(np.full((48, 64, 3), 255, np.uint8))
    mixes = [
        {},
        {"src_video": video.path},
        {"src_video": video.path, "src_mask": hole},
        {"src_video": video.path, "inpaint": hole},
        {"src_video": video.path, "outpaint": (0, 16, 0, 0)},
        {"extend": video.path},
        {"image": hole},
        {"image": hole, "last_frame": video.path},
    ]
    for mix in mixes:
        for references in ((), (hole, Image.new("RGB", (30, 90)))):
            one = sample(**mix, src_ref_images=references or None, frame_num=17, size="64*64", context_scale=0.5)

            condition = kind_of(SPEC).condition(SPEC, one, encode)
            length = (one.frame_num - 1) // 4 + 1 + len(references)
            assert condition.context.shape == (1, 96, length, one.height // 8, one.width // 8)
            assert condition.scale == 0.5 and condition.extra_frames == len(references)


BAD = {
    "mask of another length": (
        {"src_video": "nine.avi", "src_mask": "five.avi"},
        "--src_mask has 5 frames and --src_video 9: it needs as many, or one",
    ),
    "mask of another shape": (
        {"src_video": "nine.avi", "inpaint": "wide.png"},
        "--inpaint is 96x32 and --src_video 64x48: it needs the same shape",
    ),
    "mask without a video": ({"src_mask": "wide.png"}, "--src_mask is of a video: give --src_video FILE"),
    "margins without a video": ({"outpaint": "8,0,0,0"}, "--outpaint is of a video: give --src_video FILE"),
    "two masks": (
        {"src_video": "nine.avi", "src_mask": "nine.avi", "inpaint": "nine.avi"},
        "--src_mask and --inpaint contradict each other",
    ),
    "a video and its extension": (
        {"src_video": "nine.avi", "extend": "nine.avi"},
        "--src_video and --extend both say what the frames are",
    ),
    "three margins": ({"src_video": "nine.avi", "outpaint": "1,2,3"}, "--outpaint must be four numbers of pixels"),
    "no margin": ({"src_video": "nine.avi", "outpaint": "0,0,0,0"}, "--outpaint must be four .* not all 0"),
    "a negative margin": ({"src_video": "nine.avi", "outpaint": "-8,0,0,0"}, "--outpaint must be four"),
    "half a margin": ({"src_video": "nine.avi", "outpaint": "1.5,0,0,0"}, "--outpaint must be four"),
    "margins of words": ({"src_video": "nine.avi", "outpaint": "a,b,c,d"}, "--outpaint must be four"),
    "nothing left to make": (
        {"extend": "nine.avi", "frame_num": 9},
        "9 of .* are given, and --frame_num is 9: nothing",
    ),
    "clip longer than the video": (
        {"extend": "nine.avi", "frame_num": 5},
        "9 of .* are given, and --frame_num is 5: nothing",
    ),
    "ends of unlike shapes": ({"image": "long.png", "last_frame": "tall.png"}, "too unlike"),
    "unreadable video": ({"src_video": "text.mp4"}, "cannot read video .*text.mp4: damaged"),
    "a reference that is none": ({"src_ref_images": "wide.png,text.mp4"}, "cannot read image .*text.mp4"),
    "a reference that is a video": ({"src_ref_images": "nine.avi"}, "cannot read image .*nine.avi"),
    "a reference that is gone": ({"src_ref_images": "gone.png"}, "no image file .*gone.png"),
    "a scale in words": ({"context_scale": "much"}, "--context_scale must be a number, not 'much'"),
    "a scale that is none": ({"context_scale": float("nan")}, "--context_scale must be a number, not nan"),
    "for text alone": ({"task": "t2v-tiny", "src_video": "nine.avi"}, "--src_video is for vace tasks"),
    "for another task": ({"task": "i2v-tiny", "src_ref_images": "wide.png"}, "--src_ref_images is for vace tasks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_in_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "nine.avi", ramp(9), "ffv1", "bgr0")
    write(tmp_path / "five.avi", ramp(5), "ffv1", "bgr0")
    still(tmp_path / "wide.png", ramp(1, 96, 32)[0])
    still(tmp_path / "long.png", ramp(1, 640, 16)[0])
    still(tmp_path / "tall.png", ramp(1, 16, 640)[0])
    (tmp_path / "text.mp4").write_text("no video\n")
    options, message = BAD[case]
    with pytest.raises(Exception, match=message) as caught:
        sample(**options)
    file_is_at_fault = message.startswith("cannot read")
    assert caught.value.exit_code == (1 if file_is_at_fault else 2)
    assert len(str(caught.value).splitlines()) == 1
