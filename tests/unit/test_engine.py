"""The engine: built once, many videos; what belongs where; events, cancelling, residency, a service's day."""

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common import in_fresh_process
from wan import Engine
from wan.cli import main, make_parser
from wan.errors import Cancelled, SwanError, UsageError
from wan.media import read_settings
from wan.options import FLAGS, PART_OF
from wan.options.replay import replay_options
from wan.pictures import read_image

TINY = Path(__file__).parents[2] / "wan/assets/tiny"
STRIPES = str(TINY / "loras/stripes.safetensors")
QUICK = {"prompt": "a red circle moving right on a black background", "seed": 3, "frame_num": 5, "sample_steps": 3}


@pytest.fixture(scope="module")
def engine():
    with Engine(task="t2v-tiny", device="cpu") as engine:
        yield engine


def quick(engine, **options):
    return engine.generate(**(QUICK | options))


def test_names_and_defaults_are_those_of_the_flags(engine, tmp_path, capsys):
    video = engine.generate(seed=5)
    assert video.frames.shape == (17, 64, 64, 3) and video.latents.shape == (16, 5, 8, 8)
    assert main(["--seed", "5", "--save_file", str(tmp_path / "a.mp4"), "--quiet", "--device", "cpu"]) == 0
    assert f'"sha256": "{video.report["sha256"]}"' in capsys.readouterr().out
    assert {action.dest for action in make_parser()._actions} > set(FLAGS)


def test_nothing_is_written_unless_asked(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video = quick(engine)
    assert not list(tmp_path.iterdir())
    assert video.save("a.mp4") == tmp_path / "a.mp4"
    again = engine.generate(**_of_sample(replay_options(read_settings("a.mp4"), {}, files=True)))
    assert (again.frames == video.frames).all()
    with pytest.raises(UsageError, match="--save_file must end in .mp4"):
        video.save("a.txt")


def _of_sample(options):
    return {name: value for name, value in options.items() if PART_OF[name] == "sample"}


def test_what_belongs_where(engine):
    for name, value in {"dtype": "bf16", "task": "i2v-tiny", "vae": "x", "offload": "block"}.items():
        with pytest.raises(UsageError, match=f"^{name} says what is loaded: it is for Engine"):
            quick(engine, **{name: value})
    for name in ("prompt", "size", "lora", "fbcache", "image"):
        with pytest.raises(UsageError, match=f"^{name} says what a video is like: it is for generate"):
            Engine(**{name: "x"})
    for name in ("save_file", "preview"):
        for call in (quick, lambda _, **options: Engine(**options)):
            with pytest.raises(UsageError, match=f"^{name} says what is written: see Video.save"):
                call(engine, **{name: "x.png"})
    for call in (quick, lambda _, **options: Engine(**options)):
        with pytest.raises(UsageError, match="unknown option: promt"):
            call(engine, promt="a")
    with pytest.raises(UsageError, match="--size must be"):
        quick(engine, size="big")


def test_models_are_read_once(engine, monkeypatch):
    first = quick(engine)
    monkeypatch.setattr("wan.memory.residency.load_weights", None)
    monkeypatch.setattr("wan.memory.residency.load_expert", None)
    monkeypatch.setattr("wan.memory.residency.load_text_encoder", None)
    assert (quick(engine).frames == first.frames).all()
    other = quick(engine, size="32*48", frame_num=9, sample_guide_scale=1, seed=4, prompt="a blue square")
    assert other.frames.shape == (9, 48, 32, 3)
    assert (quick(engine).frames == first.frames).all()


def test_stage_keeps_nothing():
    engine = Engine(task="t2v-tiny", device="cpu", residency="stage")
    quick(engine)
    assert not engine._pipe._models and not any(name in engine._pipe.experts for name in ("model",))


def test_what_does_not_fit_lets_go_of_what_was_used_least(monkeypatch):
    """With room for one model beside the peak of a stage, those used longest ago go, and the bits stay."""
    engine = Engine(task="t2v-tiny", device="cpu")
    plain = quick(engine)
    assert list(engine._pipe._used) == ["t5", "model", "vae"]
    planned = engine._pipe.planned

    def tight(request):
        plan = planned(request)
        peak = max(sizes["ram"] for sizes in plan["memory_bytes"].values())
        plan["machine"]["ram_bytes"] = int(peak * (1 + plan["margin"])) + 1
        return plan

    monkeypatch.setattr(engine._pipe, "planned", tight)
    assert (quick(engine).frames == plain.frames).all()
    assert "t5" not in engine._pipe._models


def test_a_video_that_cannot_fit_is_refused_before_work(engine):
    small = Engine(task="t2v-tiny", device="cpu", ram_gb=0.6)
    stages = []
    with pytest.raises(UsageError, match="needs .* more than --ram_gb 0.6"):
        quick(small, size="1024*1024", frame_num=81, vae_tile_px=0, on_event=lambda event: stages.append(event.stage))
    assert not any(stages)
    assert (quick(small).frames == quick(engine).frames).all()
    assert engine.plan(**QUICK)["steps"] == 3


def test_events(engine):
    events = []
    engine.release()
    quick(engine, on_event=events.append, preview_every=2)
    steps = [(one.done, one.total) for one in events if one.kind == "step"]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    stages = list(dict.fromkeys(one.stage for one in events if one.kind in ("stage", "step")))
    assert stages == ["encode", "load", "denoise", "decode"]
    previews = [one for one in events if one.kind == "preview"]
    assert [one.done for one in previews] == [2, 3] and previews[0].frames.shape == (2, 8, 8, 3)
    assert all(one.left is None or one.left >= 0 for one in events)


def test_a_preview_looks_like_the_video(engine):
    previews = []
    video = engine.generate(seed=1, on_event=lambda event: previews.append(event.frames), preview_every=20)
    shown = next(frames for frames in reversed(previews) if frames is not None)[2].astype(float)
    made = video.frames[8].reshape(8, 8, 8, 8, 3).mean((1, 3))
    assert np.corrcoef(shown.ravel(), made.ravel())[0, 1] > 0.6


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_preview_files(tmp_path, capsys, ending):
    path = tmp_path / f"p.{ending}"
    flags = ["--frame_num", "9", "--sample_steps", "2", "--preview_every", "1", "--quiet", "--device", "cpu"]
    assert main([*flags, "--preview", str(path), "--save_file", str(tmp_path / "a.mp4")]) == 0
    picture = Image.open(path)
    assert picture.size == (256, 256) and getattr(picture, "n_frames", 1) == (3 if ending == "gif" else 1)
    for wrong in (["--preview", str(tmp_path / "p.jpg")], ["--preview_every", "2"]):
        assert main([*wrong, "--quiet"]) == 2
    assert "--preview must end in .png or .gif" in capsys.readouterr().err


def test_pictures_may_be_paths_images_or_arrays():
    engine = Engine(task="i2v-tiny", device="cpu")
    path = next((TINY.parent / "tiny_i2v").glob("*.png"))
    picture = Image.open(path).convert("RGB")
    videos = [quick(engine, image=image) for image in (path, str(path), picture, np.asarray(picture))]
    assert all((video.frames == videos[0].frames).all() for video in videos)
    assert videos[0].request.settings()["image"] == str(path) and "image" not in videos[2].request.settings()
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 3)), 5, "no/such.png"):
        with pytest.raises(SwanError):
            quick(engine, image=wrong)


def cancelled_at(engine, stage):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        quick(engine, cancel=cancel, on_event=lambda event: event.stage == stage and cancel.set())


@pytest.mark.parametrize("at", ["encode", "load", "denoise", "decode"])
def test_cancelled_at_any_stage(engine, at):
    wanted = quick(engine).frames
    if at in ("encode", "load"):
        engine.release()
    cancelled_at(engine, at)
    assert (quick(engine).frames == wanted).all()


def test_cancelled_between_chunks_of_the_vae(engine, monkeypatch):
    quick(engine)
    cancel, vae, seen = threading.Event(), engine._pipe._models["vae"], []
    check = vae.between_chunks
    monkeypatch.setattr(vae, "between_chunks", lambda: (seen.append(1), len(seen) == 2 and cancel.set(), check()))
    with pytest.raises(Cancelled):
        quick(engine, frame_num=17, cancel=cancel)
    assert len(seen) == 2 and engine.latents is not None


def test_calls_queue_and_a_waiting_one_can_be_cancelled(engine):
    wanted = [quick(engine, seed=seed).frames for seed in range(3)]
    found, inside, most, lock = {}, [], [], threading.Lock()

    def watch(event):
        if (event.stage, event.done) == ("denoise", 0):
            with lock:
                inside.append(1)
                most.append(len(inside))
        if event.stage == "decode" and event.done == 1:
            inside.pop()

    def work(seed):
        found[seed] = quick(engine, seed=seed, on_event=watch).frames

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        quick(engine, cancel=cancel)
    for thread in threads:
        thread.join()
    assert max(most) == 1 and all((found[seed] == wanted[seed]).all() for seed in range(3))


def test_loras_of_the_engine_and_of_a_call(engine):
    base = quick(engine).latents
    engine.set_loras(STRIPES)
    striped = quick(engine).latents
    half = quick(engine, lora=f"{STRIPES}:0.5").latents
    assert torch.equal(quick(engine).latents, striped)
    engine.set_loras()
    assert torch.equal(quick(engine).latents, base)
    assert not torch.equal(striped, base) and not torch.equal(half, striped)
    with pytest.raises(UsageError, match="--lora: no file"):
        engine.set_loras("nothing.safetensors")
    assert torch.equal(quick(engine).latents, base)


@pytest.mark.parametrize("name", ["plan", "release", "close", "generate", "set_loras"])
def test_on_event_cannot_call_the_engine(engine, name):
    wanted = quick(engine).frames
    with pytest.raises(UsageError, match="cannot be called from its own on_event"):
        quick(engine, on_event=lambda event: getattr(engine, name)())
    assert (quick(engine).frames == wanted).all()


@pytest.mark.parametrize(
    "arguments",
    [{"on_event": 5}, {"cancel": True}, {"preview_every": "a"}, {"preview_every": -1}, {"preview_every": True}],
)
def test_what_a_call_takes(engine, arguments):
    with pytest.raises(UsageError, match=f"^{next(iter(arguments))} must be "):
        quick(engine, **arguments)


def test_pictures_in_two_threads_leave_stderr_alone(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((600, 800, 3), np.uint8)).save(path)
    before = os.fstat(2)
    threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(2), before)


def test_a_picture_in_memory_is_asked_for_by_a_replay(tmp_path):
    engine = Engine(task="i2v-tiny", device="cpu")
    picture = Image.new("RGB", (64, 64), "white")
    settings = read_settings(quick(engine, image=picture).save(tmp_path / "a.mp4"))
    with pytest.raises(UsageError, match="made from a picture in memory.* give it with --image"):
        replay_options(settings, {}, files=True)
    assert replay_options(settings, {"image": "a.png"}, files=True)["image"] == "a.png"


def test_a_closed_engine_says_so():
    engine = Engine(task="t2v-tiny", device="cpu")
    with engine:
        quick(engine)
    with pytest.raises(UsageError, match="the engine is closed"):
        quick(engine)


KINDS = [
    {"size": "48*48"},
    {"size": "64*32"},
    {"size": "32*32", "frame_num": 9, "sample_guide_scale": 1},
    {"size": "32*48", "lora": STRIPES},
    {"size": "32*32", "fbcache": True, "sample_steps": 10, "fb_thresh": 0.3},
    {"size": "32*32", "sample_solver": "euler", "sample_shift": 3},
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_day_of_a_service(tmp_path):
    """40 videos of mixed size, LoRA and cache, three cancelled, two failures: memory stays, and so do results."""
    used, made = in_fresh_process(day, tmp_path)
    assert not list(tmp_path.glob("*.mp4"))
    assert median(used[35:41]) <= 1.03 * median(used[5:11]), [number // 2**20 for number in used]
    for kind, options in enumerate(KINDS):
        fresh = quick(Engine(task="t2v-tiny", device="cpu"), seed=kind, **options)
        assert fresh.report["sha256"] == made[kind]


def day(folder):
    """Bytes of its own that the process holds, at first and after each video, and what each kind of video was.

    Pages of libraries come and go as the kernel likes, and it may join pages to large ones: neither is counted.
    """
    gc.freeze()
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    engine, used, made = Engine(task="t2v-tiny", device="cpu"), [_own_bytes()], {}
    for number in range(1, 41):
        kind = number % len(KINDS)
        if number in (12, 21, 33):  # cancelled at another stage each
            cancelled_at(engine, {12: "encode", 21: "denoise", 33: "decode"}[number])
        if number == 15:
            (folder / "bad.png").write_text("<html>")
            with pytest.raises(SwanError):
                quick(engine, image=folder / "bad.png")
        video = quick(engine, seed=kind, **KINDS[kind])
        if number == 27:
            with pytest.MonkeyPatch.context() as full, pytest.raises(SwanError, match="cannot write"):
                full.setattr("wan.media._write_mp4", _no_space)
                video.save(folder / "a.mp4")
        assert made.setdefault(kind, video.report["sha256"]) == video.report["sha256"]
        del video
        gc.collect()
        used.append(_own_bytes())
    return used, made


def _own_bytes():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_small_model_computes_in_one_thread(engine, two_threads):
    """Threads of kernels that take microseconds wait for each other. What came before is as it was."""
    seen = set()
    assert engine.plan(**QUICK)["threads"] == 1
    wide = engine.plan(**QUICK, size="256*256")
    quick(engine, on_event=lambda event: seen.add(torch.get_num_threads()))
    assert wide["threads"] is None and seen >= {1} and torch.get_num_threads() == 2
