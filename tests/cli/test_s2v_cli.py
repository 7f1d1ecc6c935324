"""Speech to video by the command line: sound in the file, in step with the picture; a film that is gone on with."""

import json

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.unit.sound_helpers import tone, write_sound
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from tests.unit.video_helpers import ramp
from wan import tasks
from wan.audio import RATE
from wan.cli import main
from wan.conditioning.s2v import S2VFilm
from wan.media import read_settings

BEGINS = 0.5  # s, of the tone in the audio
FPS = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A checkpoint of little width, its task, a face and audio that is silent at first."""
    spec, folder = shrunk("s2v-14B"), tmp_path_factory.mktemp("s2v")
    write_checkpoint(folder, spec)
    Image.fromarray(ramp(1, 70, 64)[0]).save(folder / "face.png")
    sound = tone(RATE, 1.4, channels=2)
    sound[:, : int(BEGINS * RATE)] = 0
    write_sound(folder / "speech.wav", sound, RATE, layout="stereo")
    (folder / "configs/tasks").mkdir(parents=True)
    (folder / "configs/tasks/s2v-14B.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(spec))))
    return folder


@pytest.fixture(autouse=True)
def small(inputs, monkeypatch):
    real = tasks.config_dir
    monkeypatch.setattr(tasks, "config_dir", lambda kind: inputs / "configs/tasks" if kind == "tasks" else real(kind))


def run(inputs, file, *more):
    flags = [
        "--task",
        "s2v-14B",
        "--ckpt_dir",
        inputs,
        "--image",
        inputs / "face.png",
        "--audio",
        inputs / "speech.wav",
    ]
    flags += ["--prompt", "she speaks", "--size", "64*64", "--infer_frames", 8, "--sample_steps", 2, "--seed", 1]
    return main([str(flag) for flag in (*flags, "--dtype", "fp32", "--quiet", "--save_file", file, *more)])


def begins(file):
    """(seconds at which the sound begins, seconds of the video, its frames)"""
    with av.open(str(file)) as container:
        heard = np.concatenate([frame.to_ndarray().mean(0) for frame in container.decode(audio=0)])
        rate = container.streams.audio[0].rate
    with av.open(str(file)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        seconds = float(container.streams.video[0].duration * container.streams.video[0].time_base)
    return np.flatnonzero(np.abs(heard) > 0.1)[0] / rate, seconds, frames


@pytest.mark.parametrize(
    ("more", "late", "frames"),
    [
        ([], -3 / FPS, 21),
        (["--audio_sync", "official"], 0, 21),
        (["--start_from_ref"], 0, 24),
        (["--num_clip", "1"], -3 / FPS, 5),
        (["--trim_first_frames", "2"], -5 / FPS, 19),
    ],
)
def test_sound_is_in_step_with_the_picture(inputs, tmp_path, more, late, frames):
    file = tmp_path / "a.mp4"
    assert run(inputs, file, *more) == 0
    if frames / FPS > BEGINS:
        heard, seconds, found = begins(file)
        assert abs(heard - BEGINS - late) < 1 / FPS and abs(seconds - frames / FPS) < 1e-3 and found == frames
    assert read_settings(file)["audio"] == str(inputs / "speech.wav")


def test_a_film_that_ended_early_is_gone_on_with(inputs, tmp_path, monkeypatch, capsys):
    assert run(inputs, tmp_path / "whole.mp4") == 0
    real = S2VFilm.noise

    def noise(film, clip, shape):
        if clip == 2:
            raise KeyboardInterrupt
        return real(film, clip, shape)

    with monkeypatch.context() as ended:
        ended.setattr(S2VFilm, "noise", noise)
        assert run(inputs, tmp_path / "a.mp4") == 130
    assert main(["--resume", str(tmp_path / "a.mp4.unfinished"), "--quiet"]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    whole, rest = map(json.loads, capsys.readouterr().out.splitlines())
    assert whole["sha256"] == rest["sha256"] and whole["frames"] == rest["frames"] == 21


def test_inputs_that_have_moved_may_be_given_again(inputs, tmp_path, monkeypatch, capsys):
    face, speech = tmp_path / "face.png", tmp_path / "speech.wav"
    face.write_bytes((inputs / "face.png").read_bytes())
    speech.write_bytes((inputs / "speech.wav").read_bytes())
    given = ("--image", face, "--audio", speech)
    assert run(inputs, tmp_path / "whole.mp4", *given) == 0
    with monkeypatch.context() as ended:
        ended.setattr(S2VFilm, "latents", fails_at(1, S2VFilm.latents))
        assert run(inputs, tmp_path / "a.mp4", *given) == 1
    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in (face, speech)]
    resume = ["--resume", str(tmp_path / "a.mp4.unfinished"), "--quiet"]
    assert main(resume) == 2 and "face.png" in capsys.readouterr().err
    assert main([*resume, "--image", str(moved[0]), "--audio", str(moved[1])]) == 0
    assert list(_frames(tmp_path / "a.mp4"))[-1].tolist() == list(_frames(tmp_path / "whole.mp4"))[-1].tolist()


def fails_at(clip, real):
    def latents(film, at, made):
        if at == clip:
            raise RuntimeError("out of luck")
        return real(film, at, made)

    return latents


def test_prompts_that_are_too_many_are_told(inputs, tmp_path, capsys):
    (tmp_path / "acts.txt").write_text("one\ntwo\nthree\n")
    flags = ["--task", "s2v-14B", "--ckpt_dir", str(inputs), "--image", str(inputs / "face.png")]
    flags += ["--audio", str(inputs / "speech.wav"), "--num_clip", "2", "--infer_frames", "8", "--dry_run"]
    assert main([*flags, "--prompts", str(tmp_path / "acts.txt"), "--size", "64*64"]) == 0
    assert "--prompts has 3 prompts, and the film 2 clips" in capsys.readouterr().err


def test_each_clip_has_its_prompt(inputs, tmp_path):
    (tmp_path / "acts.txt").write_text("she speaks\nshe laughs\n")
    assert run(inputs, tmp_path / "a.mp4") == 0
    flags = [flag for flag in ("--task s2v-14B --size 64*64 --infer_frames 8 --sample_steps 2 --seed 1").split()]
    flags += ["--ckpt_dir", str(inputs), "--image", str(inputs / "face.png"), "--audio", str(inputs / "speech.wav")]
    flags += ["--dtype", "fp32", "--quiet", "--prompts", str(tmp_path / "acts.txt")]
    assert main([*flags, "--save_file", str(tmp_path / "b.mp4")]) == 0
    assert read_settings(tmp_path / "b.mp4")["prompts"] == ["she speaks", "she laughs"]
    one, other = (np.stack(list(_frames(tmp_path / name))) for name in ("a.mp4", "b.mp4"))
    assert (one[:5] == other[:5]).all() and (one[5:] != other[5:]).any()


def _frames(file):
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
