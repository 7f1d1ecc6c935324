"""The films of animate-tiny: shown to the network as inference shows them, and on their path."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from wan.cache import StepContext

from benchmarks.tiny_world_animate import WITHIN, all_cases, measure, run
from tools.tiny import train_animate
from tools.tiny.fit import load_vae
from tools.tiny.train_animate import (
    KNOWN,
    MARGIN,
    MOUTHS,
    SHORT,
    act,
    build,
    example_act,
    examples,
    face_picture,
    faces,
    path,
    radii,
    write_inputs,
)
from tools.tiny.world import NUM_FRAMES, SIZES, picture, render_moved, still_words
from wan.cli import main
from wan.conditioning.animate import AnimateFilm, AnimateInputs
from wan.models.dit import WanModel
from wan.models.dit.adapters.animate import Face
from wan.tasks import embedded_checkpoint, load_task
from wan.video import open_video
from wan.weights.locate import locate
from wan.weights.source import open_source

TASK = load_task("animate-tiny")
FOLDER = embedded_checkpoint(TASK)
FILES = locate(FOLDER, TASK)
COND = StepContext(step=0, steps=1, timestep=999.0, sigma=0.999, expert="model", branch="cond")
OWN = ("pose_patch_embedding.", "motion_encoder.", "face_encoder.", "face_adapter.", "patch_embedding.")


def test_only_what_follows_comes_with_the_task():
    base, own = (open_source([path]) for path in FILES.dit["model"])
    assert all(name.startswith(OWN) for name in own.keys())
    assert set(base.keys()) & set(own.keys()) == {"patch_embedding.weight", "patch_embedding.bias"} == own.replaces
    assert open_source(FILES.dit["model"]).info("patch_embedding.weight").shape[1] == TASK.dit.in_dim
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000


def fresh(task, make=lambda model: model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(WanModel(**load_task(task).dit))


def test_one_that_is_not_trained_changes_nothing():
    base = fresh("t2v-tiny")
    model = fresh("t2v-tiny", lambda model: build(model, TASK))
    x, text = torch.randn(1, 16, 3, 4, 4), [torch.randn(3, TASK.dit.text_dim)]
    side = TASK.dit.face_px
    inputs = {"pose_latents": torch.randn(1, 16, 2, 4, 4), "face_pixel_values": torch.rand(1, 3, 5, side, side)}
    with torch.no_grad():
        alone = base(x, torch.tensor([500.0]), text)
        together = model(x, torch.tensor([500.0]), text, y=torch.randn(1, 20, 3, 4, 4), **inputs)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(OWN)}


def test_faces_of_training_are_encoded_as_those_of_inference():
    model = fresh("t2v-tiny", lambda model: build(model, TASK))
    pictures = torch.rand(MOUTHS + 1, 3, TASK.dit.face_px, TASK.dit.face_px) * 2 - 1
    mouths = torch.tensor([[0, 3, 3, 1, MOUTHS], [2, 2, 2, 2, 2]])
    with torch.no_grad():
        found = faces(model, pictures, mouths).tokens
        theirs = Face(pictures[mouths].transpose(1, 2))
        wanted = model.adapters[0]._encode(theirs, 3, torch.zeros(2, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [n for n, _ in KNOWN])
def test_training_shows_a_film_as_inference_does(tmp_path, monkeypatch, known):
    """But for what lossy compression does to the videos."""
    monkeypatch.setattr(train_animate, "SIZES", SIZES[:1])
    monkeypatch.setattr(train_animate, "KNOWN", [(known, 1.0)])
    vae = load_vae(FILES, TASK, torch.float32)
    found = examples(vae, random.Random(0), 1)[SIZES[0]]
    rng = random.Random(0)
    clip, centers, mouths = act(rng, still_words()[0])
    assert found.clips[0] == clip
    write_inputs(tmp_path, clip, centers, mouths, 64, 64, TASK)
    videos = (open_video(tmp_path / f"src_{name}.mp4") for name in ("pose", "face"))
    sample = SimpleNamespace(frame_num=NUM_FRAMES, height=64, width=64, seed=0, trim_first_frames=0)
    inputs = AnimateInputs(picture(clip, 64, 64), *videos)
    film = AnimateFilm(sample, inputs, known or 1, TASK.dit.face_px, clip=False)
    made = render_moved(clip, 64, 64, centers, radii(mouths))
    if known:  # what is known is the end of the clip before
        film.state["overlap"], film.stride = made[:, :known], 0
    condition = film.condition(1 if known else 0, vae.encode)
    torch.testing.assert_close(found.conditions[:1], condition.y, rtol=0, atol=0.05)
    assert (found.poses[:1] - condition.pose).abs().mean() < 0.05
    torch.testing.assert_close(found.latents[:1, :, 1:], vae.encode(made[None]), rtol=1e-3, atol=1e-3)
    shown = [face_picture(level / (MOUTHS - 1), TASK.dit.face_px) for level in found.mouths[0]]
    ours = torch.from_numpy(np.stack(shown)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    assert (ours - condition.inputs(COND)["face_pixel_values"].pixels).abs().mean() < 0.05
    assert condition.clip_images == ()


@pytest.mark.parametrize("frames", [NUM_FRAMES, 2 * NUM_FRAMES - 1])
def test_paths_stay_in_the_frame(frames):
    for seed in range(20):
        found = path(random.Random(seed), frames)
        assert found.shape == (frames, 2) and found.min() >= MARGIN - 1e-6 and found.max() <= 1 - MARGIN + 1e-6
        assert (found[0] - found[-1]).norm() > 0 and found.diff(dim=0).norm(dim=1).max() < 0.12


def test_the_benchmark_asks_for_what_was_never_trained_on():
    asked = all_cases()
    assert len(asked) == 32 and all((one.clip.color, one.clip.shape) in still_words()[1] for one in asked)
    assert {len(one.centers) for one in asked} == {17, 33} and {one.prompt for one in asked[1::2]} == {SHORT[0]}


def test_the_benchmark_knows_a_path_that_was_followed():
    for case in all_cases()[:4]:
        video = render_moved(case.clip, 64, 64, case.centers, radii(case.mouths))
        frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        right = measure(case, frames, 0.0)
        assert right.path_error < 0.02 and right.mouth > 0.9
        assert right.outcome.right("color") and right.outcome.right("shape")
        assert measure(case, frames[::-1], 0.0).path_error > WITHIN  # the way back
        assert measure(case, frames * 0, 0.0).path_error == 1


@pytest.fixture(scope="module")
def made():
    return run(3, None, None)[0]


def test_a_shape_follows_the_path(made):
    assert {len(one.case.centers) for one in made} == {17, 33}
    assert all(one.path_error <= WITHIN for one in made), [one.path_error for one in made]
    assert all(one.outcome.right("color") for one in made[::2])  # whose prompts name it


def test_its_own_example_by_the_command_line(tmp_path, capsys):
    flags = ["--task", "animate-tiny", "--sample_steps", "8", "--seed", "1", "--quiet"]
    assert main([*flags, "--save_file", str(tmp_path / "a.mp4")]) == 0
    report = json.loads(capsys.readouterr().out)
    _, centers, _ = example_act()
    assert (report["clips"], report["frames"], report["size"]) == (2, len(centers), "64x64")


def test_some_of_its_inputs_are_not_mixed_with_the_examples(tmp_path, capsys):
    pose = str(FOLDER / TASK.src_root_path / "src_pose.mp4")
    assert main(["--task", "animate-tiny", "--src_pose", pose, "--save_file", str(tmp_path / "a.mp4")]) == 2
    assert "animate needs --src_root_path DIR with src_face.mp4, or --src_face FILE" in capsys.readouterr().err
