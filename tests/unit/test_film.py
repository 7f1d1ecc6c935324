"""Films: clips that are sampled one after another, written as they are made, and gone on with after an end."""

import hashlib
import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from wan import Engine, media
from wan.cli import main
from wan.conditioning.film import Film, Made
from wan.errors import SwanError, UsageError
from wan.tasks.kind import Kind
from wan.tasks.kinds import KINDS
from wan.unfinished import Unfinished

PROMPT = "a red circle moving right on a black background"
QUICK = {"prompt": PROMPT, "seed": 3, "frame_num": 5, "sample_steps": 2, "size": "32*32"}
FLAGS = [text for name, value in QUICK.items() for text in (f"--{name}", str(value))]


class Chain(Film):
    """Each clip begins with noise to which the last frame of the one before is added, and drops its first frame."""

    def noise(self, clip, shape):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.sample.seed + clip))
        return noise + self.state["last"].mean() if clip else noise

    def frames(self, clip, video):
        self.state = {"last": video[:, -1:].clone()}
        return video[:, 1:]


class Chained(Kind):
    inputs = ("prompts",)
    fails_at = None

    def clips(self, spec, sample):
        return 4

    def film(self, spec, sample):
        film = Chain(sample, lambda encode: self.condition(spec, sample, encode), self.clips(spec, sample))
        make = film.condition

        def condition(clip, encode):
            if clip == self.fails_at:
                raise self.error
            return make(clip, encode)

        film.condition = condition
        return film


@pytest.fixture
def kind(monkeypatch):
    kind = Chained()
    monkeypatch.setitem(KINDS, "t2v", kind)
    return kind


def frames_of(path):
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        times = []
        frames = []
        for frame in file.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            times.append(float(frame.pts * stream.time_base))
    return np.stack(frames), times


def test_clips_follow_each_other(kind):
    engine, clips = Engine(task="t2v-tiny", device="cpu"), []
    whole = engine.generate(**QUICK)
    assert whole.frames.shape == (16, 32, 32, 3) and whole.report["frames"] == 16
    streamed = engine.generate(**QUICK, on_clip=clips.append)
    assert (np.concatenate([clip.frames for clip in clips]) == whole.frames).all()
    assert [clip.made.frames for clip in clips] == [4, 8, 12, 16] and not len(streamed.frames)
    digests = [hashlib.sha256(clip.frames.tobytes()).hexdigest() for clip in clips]
    assert clips[-1].made.sha256 == tuple(digests)
    assert streamed.report["sha256"] == whole.report["sha256"] == hashlib.sha256("".join(digests).encode()).hexdigest()
    with pytest.raises(UsageError, match="were handed to on_clip"):
        streamed.save("a.mp4")
    rest = []
    engine.make(streamed.request, on_clip=rest.append, made=clips[1].made)
    assert all((one.frames == other.frames).all() for one, other in zip(rest, clips[2:], strict=True))


def test_progress_is_of_the_film(kind):
    seen = []
    Engine(task="t2v-tiny", device="cpu").generate(**QUICK, on_event=seen.append)
    steps = [(event.done, event.total) for event in seen if event.kind == "step"]
    assert steps == [(done, 8) for done in range(1, 9)]
    decoded = [(event.done, event.total) for event in seen if event.stage == "decode"]
    assert decoded == [(done, 4) for clip in range(4) for done in (clip, clip + 1)]


def test_a_film_is_written_as_it_is_made(kind, tmp_path, capsys):
    file = tmp_path / "a.mp4"
    assert main([*FLAGS, "--save_file", str(file), "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    frames, times = frames_of(file)
    assert len(frames) == 16 and np.allclose(times, np.arange(16) / 8)
    made = Engine(task="t2v-tiny", device="cpu").generate(**QUICK)
    assert json.loads(capsys.readouterr().out)["sha256"] == made.report["sha256"]
    assert np.abs(frames.astype(int) - made.frames).mean() < 6
    assert media.read_settings(file)["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("out of luck"), 1), (KeyboardInterrupt(), 130)], ids=["failed", "interrupted"]
)
def test_an_ended_run_is_gone_on_with(kind, tmp_path, capsys, error, code):
    whole, file = tmp_path / "whole.mp4", tmp_path / "it's one.mp4"
    assert main([*FLAGS, "--save_file", str(whole), "--quiet"]) == 0
    kind.fails_at, kind.error = 2, error
    assert main([*FLAGS, "--save_file", str(file), "--quiet"]) == code
    folder = f"{file}.unfinished"
    told = capsys.readouterr().err
    assert "2 clips are kept: go on with --resume" in told and not file.exists()
    assert main([*FLAGS, "--save_file", str(file), "--quiet"]) == 2  # nothing is lost
    assert "is left of another run" in capsys.readouterr().err
    kind.fails_at = None
    assert main(["--resume", folder, "--quiet"]) == 0
    assert file.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.mp4", "it's one.mp4"}
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert reports[-1]["file"] == str(file) and reports[-1]["frames"] == 16


def test_a_run_without_a_clip_leaves_nothing(kind, tmp_path, capsys):
    kind.fails_at, kind.error = 0, RuntimeError("out of luck")
    assert main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"]) == 1
    assert not list(tmp_path.iterdir())


def test_bad_folders(kind, tmp_path, capsys):
    kind.fails_at, kind.error = 2, RuntimeError("out of luck")
    main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"])
    folder = tmp_path / "a.mp4.unfinished"
    for argv, code, line in [
        (["--resume", str(tmp_path)], 2, "must be the folder of a film that is not finished: NAME.mp4.unfinished"),
        (["--resume", str(tmp_path / "b.mp4.unfinished")], 2, "is no folder of a film that is not finished"),
        (["--resume", str(folder), "--save_file", "c.mp4"], 2, "--save_file cannot be given with it"),
        (["--resume", str(folder), "--replay", "c.mp4"], 2, "--resume and --replay contradict each other"),
        (["--resume", str(folder), "--seed", "4"], 2, "--seed cannot be given with it"),
    ]:
        capsys.readouterr()
        assert main(argv) == code and line in capsys.readouterr().err
    (folder / "clip-0002.mp4").unlink()
    assert main(["--resume", str(folder)]) == 1 and "clip-0002.mp4 is gone" in capsys.readouterr().err
    (folder / "state.safetensors").write_bytes(b"1234")
    assert main(["--resume", str(folder)]) == 1 and "is damaged" in capsys.readouterr().err


def test_a_film_whose_clips_are_all_made_is_only_joined(kind, tmp_path, capsys, monkeypatch):
    file, real = tmp_path / "new\nline" / "a.mp4", media.join_videos
    file.parent.mkdir()

    def no_space(*_):
        raise SwanError("cannot write: no space")

    with monkeypatch.context() as full:
        full.setattr(media, "join_videos", no_space)
        assert main([*FLAGS, "--save_file", str(file), "--quiet"]) == 1
    assert "4 clips are kept" in capsys.readouterr().err and media.join_videos is real
    (file.parent / "a.mp4.unfinished/notes.txt").write_text("mine")
    assert main(["--resume", f"{file}.unfinished", "--quiet"]) == 0
    assert len(frames_of(file)[0]) == 16
    assert [path.name for path in (file.parent / "a.mp4.unfinished").iterdir()] == ["notes.txt"]  # what is not ours


def test_a_full_disk_is_told_in_one_line(kind, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"]) == 1
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("error: cannot write ") and "state.safetensors: " in error and "No space left" in error


def test_what_was_left_before_the_first_clip_is_taken_over(kind, tmp_path):
    folder = tmp_path / "a.mp4.unfinished"
    folder.mkdir()
    (folder / "clip-0001.mp4").write_bytes(b"half")
    assert main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_two_runs_do_not_share_a_folder(kind, tmp_path, capsys):
    first = Unfinished(tmp_path / "a.mp4")
    first.begin()
    assert main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"]) == 2
    assert "belongs to a run that is at work" in capsys.readouterr().err and first.folder.is_dir()
    first.let_go()
    assert main([*FLAGS, "--save_file", str(tmp_path / "a.mp4"), "--quiet"]) == 0


def test_a_state_that_does_not_fit_is_refused(kind, tmp_path, capsys):
    film = Chain(SimpleNamespace(seed=1, trim_first_frames=0), None, clips=2)
    for made in (Made(3, 3, (), {}), Made(1, 1, (), {"last": torch.zeros(3)})):
        film.state = {"last": torch.zeros(3, 1, 8, 8)}
        with pytest.raises(SwanError, match="does not fit it"):
            film.resume(made)


def test_sound_is_as_long_as_the_picture(tmp_path):
    frames, sound = np.zeros((16, 32, 32, 3), np.uint8), tmp_path / "beep.wav"
    with av.open(str(sound), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        time = np.arange(16000) / 16000  # one second: the picture has two
        wave = (np.where(time >= 0.5, 20000, 0) * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    for start, begins in ((0, 0.5), (0.25, 0.25)):
        media.write_video(tmp_path / "a.mp4", frames, 8, {"task": "x"}, media.Sound(str(sound), start))
        with av.open(str(tmp_path / "a.mp4")) as file:
            heard = np.concatenate([one.to_ndarray()[0] for one in file.decode(audio=0)])
            rate = file.streams.audio[0].rate
            assert abs(float(file.duration) / av.time_base - 2) < 0.1
        loud = np.flatnonzero(np.abs(heard) > 0.1)
        assert abs(loud[0] / rate - begins) < 1 / 16
    assert len(frames_of(tmp_path / "a.mp4")[0]) == 16


ACTS = [PROMPT, "a green circle moving right on a black background", "a blue square moving up on a white background"]


def test_each_clip_has_its_prompt(kind, tmp_path, capsys):
    engine, told = Engine(task="t2v-tiny", device="cpu"), {key: QUICK[key] for key in QUICK if key != "prompt"}
    same = engine.generate(**QUICK)
    acts = engine.generate(**told, prompts=ACTS)
    assert (acts.frames[:4] == same.frames[:4]).all() and (acts.frames[4:] != same.frames[4:]).any()
    assert acts.request.sample.prompt == PROMPT and acts.request.settings()["prompts"] == tuple(ACTS)
    last = engine.generate(**told, prompts=[*ACTS, ACTS[-1]])  # which stays
    assert (last.frames == acts.frames).all()
    (tmp_path / "acts.txt").write_text("\ufeff" + "\n\n".join(ACTS) + "\n", encoding="utf-8")
    flags = [*FLAGS[2:], "--prompts", str(tmp_path / "acts.txt"), "--save_file", str(tmp_path / "a.mp4"), "--quiet"]
    assert main(flags) == 0
    assert main(["--replay", str(tmp_path / "a.mp4"), "--save_file", str(tmp_path / "b.mp4"), "--quiet"]) == 0
    sums = [json.loads(line)["sha256"] for line in capsys.readouterr().out.splitlines()]
    assert sums == [acts.report["sha256"]] * 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompts": ACTS[1:]}, "--prompt and --prompts both say"),
        ({"prompt": None, "prompts": []}, "--prompts must be 1 to 1000 texts, not 0"),
        ({"prompt": None, "prompts": ["a", " "]}, "--prompts: text 2 is empty"),
        ({"prompt": None, "prompts": "gone.txt"}, "--prompts: no file gone.txt"),
        ({"prompt": None, "prompts": 5}, "--prompts must be a path"),
        ({"prompt": None, "prompts": [None]}, "--prompts: text 1 is empty"),
    ],
)
def test_bad_prompts(kind, options, line):
    with pytest.raises(UsageError, match=line):
        Engine(task="t2v-tiny", device="cpu").plan(**(QUICK | options))


def test_prompts_are_for_films():
    with pytest.raises(UsageError, match="--prompts is for"):
        Engine(task="t2v-tiny", device="cpu").plan(prompts=ACTS)
