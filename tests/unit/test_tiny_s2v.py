"""The films of s2v-tiny: shown to the network as inference shows them, and in step with the sound."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from wan.cache import StepContext

from benchmarks.tiny_world_s2v import all_cases, measure, prompt_of, run, summary
from tools.tiny import train_s2v
from tools.tiny.fit import load_vae
from tools.tiny.sound import loudness, make_sound, write_wav
from tools.tiny.train_s2v import LARGE, SIDE, SMALL, build, examples, radii
from tools.tiny.world import picture, render_moved, still_words
from wan.audio import open_audio
from wan.cli import main
from wan.conditioning.s2v import S2VFilm
from wan.media import Sound, write_video
from wan.models.audio import load_audio_encoder
from wan.models.dit import WanModel
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.locate import locate
from wan.weights.source import open_source

TASK = load_task("s2v-tiny")
FOLDER = embedded_checkpoint(TASK)
FILES = locate(FOLDER, TASK)
FPS, FRAMES = TASK.sampling.fps, TASK.sampling.infer_frames
COND = StepContext(step=0, steps=1, timestep=999.0, sigma=0.999, expert="model", branch="cond")


def test_only_what_hears_comes_with_the_task():
    base, own = (open_source([path]) for path in FILES.dit["model"])
    hears = ("cond_encoder.", "casual_audio_encoder.", "audio_injector.", "trainable_cond_mask.")
    assert all(name.startswith(hears) for name in own.keys()) and not set(base.keys()) & set(own.keys())
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000


def test_training_touches_nothing_of_the_base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(WanModel(**load_task("t2v-tiny").dit), TASK)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(open_source(FILES.dit["model"][1:]).keys())


@pytest.mark.parametrize("goes_on", [False, True])
def test_training_shows_a_film_as_inference_does(tmp_path, monkeypatch, goes_on):
    vae, hear = load_vae(FILES, TASK, torch.float32), load_audio_encoder(open_source(FILES.wav2vec))
    sound = make_sound(random.Random(1), 2.6)
    monkeypatch.setattr(train_s2v, "make_sound", lambda rng, seconds: sound)
    monkeypatch.setattr(random.Random, "randrange", lambda self, low, high: FRAMES)  # begin as the second clip does
    found = examples(vae, hear, TASK, random.Random(0), 8, goes_on)
    clip = found.clips[0]
    center = torch.tensor([[clip.x, clip.y]])
    options = {"seed": 0, "num_clip": 2, "infer_frames": FRAMES, "start_from_ref": False, "trim_first_frames": 0}
    reference = render_moved(clip, SIDE, SIDE, center, torch.tensor(clip.radius))[:, 0]
    frames = TASK.dit.motion_frames
    write_wav(tmp_path / "a.wav", sound)
    audio, how = open_audio(tmp_path / "a.wav"), {"fps": FPS, "motion_frames": frames}
    film = S2VFilm(SimpleNamespace(**options), reference, audio, **how)
    film.heard = {window: film.hear(hear, window, torch.float32) for window in film.unheard(int(goes_on))}
    if goes_on:
        before = np.arange(FRAMES - frames, FRAMES)
        film.state["motion"] = render_moved(clip, SIDE, SIDE, center.expand(frames, 2), radii(sound, before, FPS))
    theirs = film.condition(int(goes_on), vae.encode).inputs(COND)
    torch.testing.assert_close(found.pictures[:1], theirs["ref_latents"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.features[:1], theirs["audio_input"], rtol=1e-3, atol=1e-3)
    assert theirs["motion_frames"] == (frames, 3) and not theirs["cond_states"].any()
    if goes_on:
        torch.testing.assert_close(found.motion[:1], theirs["motion_latents"], rtol=1e-3, atol=1e-3)
    else:
        assert theirs["motion_latents"] is None


def test_a_shape_is_as_large_as_the_sound_is_loud_whatever_its_volume():
    sound = make_sound(random.Random(3), 2.0)
    frames = np.arange(-2, 30)
    found = radii(sound, frames, FPS)
    assert found[0] == found.min() >= SMALL and found.max() <= LARGE
    torch.testing.assert_close(radii(sound * 0.1, frames, FPS), found)
    assert np.corrcoef(found, loudness(sound, frames / FPS))[0, 1] > 0.95
    assert not loudness(sound, np.array([-0.5, 2.5])).any()  # before and behind it


def film_of(clip, sound, file, late=0):
    """An mp4 as it should be, but for a picture that comes so many frames late."""
    shown = np.arange(36)
    centers = torch.tensor([[clip.x, clip.y]]).expand(len(shown), 2)
    video = render_moved(clip, SIDE, SIDE, centers, radii(sound, shown - late, FPS))
    frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
    write_wav(file.with_suffix(".wav"), sound)
    write_video(file, frames, FPS, {}, Sound(str(file.with_suffix(".wav")), 0.0))


@pytest.mark.parametrize("late", [0, 2, -1])
def test_the_benchmark_sees_by_how_much_the_picture_is_late(tmp_path, late):
    results = []
    for clip, sound, _ in all_cases()[:3]:
        film_of(clip, sound, tmp_path / "a.mp4", late)
        results.append(measure(str(tmp_path / "a.mp4"), clip, 0.0))
    found = summary(results)
    assert abs(found["lag_frames"]["all"] - late) <= 0.5
    assert found["correlation"] > 0.95 if not late else found["correlation"] < 0.95
    assert found["color"] == found["shape"] == 1


def test_the_benchmark_asks_for_what_was_never_trained_on():
    asked = all_cases()
    unseen = still_words()[1]
    assert len(asked) == 32 and all((clip.color, clip.shape) in unseen for clip, _, _ in asked)
    assert {clip.shape for clip, _, _ in asked} == {shape for _, shape in unseen}


@pytest.fixture(scope="module")
def made():
    return run(1, None, None)[0]


def test_a_shape_pulses_with_the_sound(made):
    assert all(one.correlation >= 0.7 for one in made)
    assert all(one.outcome.right("color") and one.outcome.right("background") for one in made)


def test_sound_and_picture_are_in_step_within_a_frame(made):
    """By the pulses that are seen, and heard in the mp4 that was written (`--audio_sync exact`)."""
    assert abs(summary(made)["lag_frames"]["all"]) <= 1


def test_a_film_by_the_command_line(tmp_path, capsys):
    """Two clips, and one line of what the cache did for both."""
    clip, sound, seed = all_cases()[0]
    write_wav(tmp_path / "a.wav", sound)
    Image.fromarray(picture(clip, SIDE, SIDE)).save(tmp_path / "a.png")
    flags = ["--task", "s2v-tiny", "--prompt", prompt_of(clip), "--audio", str(tmp_path / "a.wav")]
    flags += ["--image", str(tmp_path / "a.png"), "--sample_steps", "10", "--seed", str(seed), "--fbcache"]
    assert main([*flags, "--fb_thresh", "0.15", "--save_file", str(tmp_path / "a.mp4")]) == 0
    out, errors = capsys.readouterr()
    report = json.loads(out)
    summaries = [line for line in errors.splitlines() if line.startswith("CacheManager[")]
    assert len(summaries) == 1 and "of 20 skipped" in summaries[0]
    assert (report["clips"], report["frames"], report["cache"]["model"]["cond"]["total"]) == (2, 37, 20)


def test_without_inputs_it_has_its_own(tmp_path, capsys):
    flags = ["--task", "s2v-tiny", "--sample_steps", "1", "--num_clip", "1", "--save_file", str(tmp_path / "a.mp4")]
    assert main([*flags, "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == TASK.sampling.frame_num


def test_sounds_differ_and_may_be_written(tmp_path):
    sounds = [make_sound(random.Random(seed), 1.0) for seed in range(4)]
    assert all(len(one) == 16_000 and 0 < abs(one).max() < 1 for one in sounds)
    assert len({one.tobytes() for one in sounds}) == 4
