"""Films that go on from a video, or act by act: i2v, ti2v, VACE."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan import Engine
from wan.conditioning.image import begun_condition, frame_mask, image_condition
from wan.conditioning.latent import FrameCondition
from wan.conditioning.vace_inputs import begun
from wan.errors import UsageError
from wan.media import write_video
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.tasks.kinds import kind_of

TASKS = {
    "i2v-14B": 1,
    "i2v-A14B": 1,
    "ti2v-5B": 5,
    "vace-1.3B": 5,
}  # -> frames that a clip which goes on has by default
ACTS = ["a cat wakes", "it yawns", "it walks off"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Seven frames, each of another grey level."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.empty((7, 64, 64, 3), np.uint8)
    frames[:] = 30 * np.arange(7)[:, None, None, None]
    write_video(path, frames, 16, {"task": "x"})
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def of(task):
        if task not in made:
            spec = shrunk(task)
            made[task] = spec, str(write_checkpoint(tmp_path_factory.mktemp(task), spec))
        return made[task]

    return of


def request(checkpoint, task, **options):
    spec, folder = checkpoint(task)
    options = {"prompt": ACTS[0], "size": "64*64", "frame_num": 9, "sample_steps": 2, "seed": 3} | options
    return spec, build_request({"task": task, "ckpt_dir": folder, "device": "cpu", "dtype": "fp32", **options})


@pytest.mark.parametrize("task", TASKS)
def test_a_clip_begins_with_the_last_frames_of_a_video(checkpoint, clip, task):
    spec, asked = request(checkpoint, task, continue_from=clip)
    overlap, seen = TASKS[task], []

    def encode(video):
        seen.append(video)
        return torch.zeros(1, spec.vae.z_dim, (video.shape[2] + 3) // 4, 4, 4)

    assert asked.sample.overlap == overlap
    film = kind_of(spec).film(spec, asked.sample)
    film.condition(0, encode)
    given = ((seen[0][0, 0, :overlap].mean((1, 2)) + 1) * 127.5).tolist()
    assert np.abs(np.subtract(given, [30 * at for at in range(7)][-overlap:])).max() < 3
    frames = torch.linspace(-1, 1, 9)[None, :, None, None].expand(3, 9, 64, 64)
    made = film.frames(0, frames.clone())
    new = min(overlap, 9 - overlap)  # of the frames that the next clip begins with
    assert torch.equal(made, frames[:, overlap:]) and torch.equal(film.state["last"][:, -new:], frames[:, -new:])
    assert film.state["last"].shape[1] == overlap


@pytest.mark.parametrize("task", TASKS)
def test_acts_go_on_from_each_other(checkpoint, clip, task):
    options = {"prompt": None, "prompts": ACTS}
    if task.startswith("i2v"):
        options["image"] = Image.new("RGB", (64, 64), "teal")
    spec, asked = request(checkpoint, task, **options)
    pipe, clips = WanPipeline.from_request(asked, spec), []
    whole = pipe(asked, on_clip=lambda frames, made: clips.append((frames, made)))
    overlap = TASKS[task]
    assert [len(frames) for frames, _ in clips] == [9, 9 - overlap, 9 - overlap]
    assert pipe.plan["frames"] == whole.made.frames == 27 - 2 * overlap and pipe.plan["clips"] == 3
    rest = []
    pipe(asked, on_clip=lambda frames, made: rest.append(frames), made=clips[0][1])
    assert all((one == other[0]).all() for one, other in zip(rest, clips[1:], strict=True))


def test_replay_and_rank_checks_know_the_video(checkpoint, clip):
    spec, asked = request(checkpoint, "i2v-A14B", continue_from=clip, overlap=5)
    settings = asked.settings()
    assert settings["continue_from"] == clip and settings["overlap"] == 5
    with pytest.raises(UsageError, match="add --.*continue_from"):
        replay_options(settings, {"ckpt_dir": checkpoint("i2v-A14B")[1]})


BAD = [
    ("i2v-A14B", {"continue_from": "gone.mp4"}, "no video file gone.mp4"),
    ("i2v-A14B", {"continue_from": "clip", "overlap": 9}, "--overlap must be a whole number from 1 to 8"),
    ("i2v-A14B", {"continue_from": "clip", "overlap": 2}, "--overlap must be 1, 5, 9"),
    ("ti2v-5B", {"continue_from": "clip", "frame_num": 13, "overlap": 9}, "--overlap 9: --continue_from has 7 frames"),
    ("ti2v-5B", {"overlap": 5}, "--overlap is for --continue_from"),
    ("i2v-A14B", {"continue_from": "clip", "image": "clip"}, "--continue_from makes a film that goes on, and --image"),
    ("i2v-A14B", {"continue_from": "clip", "last_frame": "clip"}, "--continue_from makes .* and --last_frame"),
    ("vace-1.3B", {"continue_from": "clip", "last_frame": "clip"}, "--continue_from makes .* and --last_frame"),
    ("vace-1.3B", {"continue_from": "clip", "src_video": "clip"}, "--continue_from makes a film .* and --src_video"),
    ("ti2v-5B", {"prompts": ACTS, "prompt": None, "video": "clip"}, "--prompts makes a film that goes on, and --video"),
    ("i2v-A14B", {"prompts": ACTS, "prompt": None}, "needs --image FILE"),
    ("t2v-14B", {"continue_from": "clip"}, "--continue_from is for i2v, ti2v and vace tasks, not for t2v-14B"),
    ("flf2v-14B", {"continue_from": "clip"}, "--continue_from is for i2v"),
    ("t2v-14B", {"prompts": ACTS, "prompt": None}, "--prompts is for i2v, ti2v, vace, s2v and animate tasks"),
]


@pytest.mark.parametrize(("task", "options", "line"), BAD)
def test_bad_options(checkpoint, clip, task, options, line):
    options = {name: clip if value == "clip" else value for name, value in options.items()}
    with pytest.raises(UsageError, match=line) as error:
        request(checkpoint, task, **options)
    assert "\n" not in str(error.value)


def test_one_given_frame_is_the_condition_of_a_picture():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)

    def encode(video):
        return video[:, :, ::4, ::8, ::8]

    wanted = image_condition(encode, image, num_frames=9, height=32, width=48, clip=True)
    given = torch.from_numpy(image).permute(2, 0, 1)[:, None].float().div(255).sub(0.5).div(0.5)
    found = begun_condition(encode, given, 9, clip=True)
    torch.testing.assert_close(found.y, wanted.y)
    assert torch.equal(found.clip_images[0], wanted.clip_images[0])


def test_masks_of_several_given_frames():
    mask = frame_mask(9, 1, 1, first=5)[..., 0, 0]
    assert mask.T.tolist() == [[1] * 4, [1] * 4, [0] * 4]
    frames, where = begun(torch.ones(3, 5, 2, 2), 9)
    assert where[0, :, 0, 0].tolist() == [0] * 5 + [1] * 4 and frames[:, 5:].unique().numel() == 1


def test_several_clean_latents_stay_and_have_no_noise():
    condition = FrameCondition(torch.full((1, 2, 2, 4, 4), 7.0), num_latent_frames=3)
    latent = condition.restore(torch.zeros(1, 2, 3, 4, 4))
    assert (latent[:, :, :2] == 7).all() and (latent[:, :, 2:] == 0).all()
    assert condition.timesteps(500).tolist() == [[0.0] * 8 + [500.0] * 4]


def test_a_film_from_a_video_made_here(tmp_path):
    with Engine(task="i2v-tiny", device="cpu") as engine:
        options = {"size": "32*32", "frame_num": 5, "sample_steps": 2, "seed": 1}
        first = engine.generate(**options)
        first.save(tmp_path / "first.mp4")
        more = engine.generate(**options, continue_from=str(tmp_path / "first.mp4"))
    assert first.frames.shape[1:] == more.frames.shape[1:] and len(more.frames) == 4
