"""How long a run takes, by its plan: the work that is counted, what seconds are made of, and what would take less."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from wan.cache.options import check_options

from wan.models.vae import WanVAE
from wan.options import build_request
from wan.plan import Machine, duration, format_plan, forward_flops, make_plan, start_lines
from wan.plan.runs import build, decoding, encoding, text_encoding
from wan.tasks import load_task

CPU = Machine("cpu", 1 << 40, None, 1e11, is_measured=True)
GPU = Machine("cuda", 10**12, 80 * 10**9, 5e14, is_measured=True)


# Work


def counted(call):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("task", ["t2v-tiny", "ti2v-5B"])
@pytest.mark.parametrize("frames, tile", [(17, 0), (1, 64)])
def test_work_of_the_vae_is_that_of_all_chunks_and_tiles(task, frames, tile):
    """Of which a few are run."""
    spec = load_task(task)
    stride, latent_frames = spec.vae_stride[1], 1 + frames // 4
    with torch.device("meta"):
        vae = WanVAE(**spec.vae)
        latent, video = torch.empty(1, spec.vae.z_dim, latent_frames, 10, 6), torch.empty(1, 3, frames, 160, 96)
    how = "fp32", "cpu", tile * stride // 8
    assert counted(lambda: vae.decode(latent, how[2])) == decoding(spec.vae, latent.shape[1:], *how).flops
    assert counted(lambda: vae.encode(video, how[2])) == encoding(spec.vae, *video.shape[2:], *how).flops


def test_work_of_the_text_encoder_is_that_of_all_layers():
    spec = load_task("t2v-tiny")
    encoder, ids = build("t5", {**spec.text, "num_layers": 5}), torch.empty(2, 11, dtype=torch.long, device="meta")
    assert counted(lambda: encoder(input_ids=ids)) == text_encoding({**spec.text, "num_layers": 5}, 2, 11, "fp32").flops


# Seconds


def plan_of(tmp_path, monkeypatch, machine=CPU, world=1, **options):
    monkeypatch.chdir(tmp_path)
    request = build_request({"prompt": "a cat", "ckpt_dir": str(tmp_path), **options}, world)
    return make_plan(request, load_task(request.load.task), machine)


def test_seconds_are_of_each_stage_and_follow_the_work(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, monkeypatch, task="t2v-1.3B", sample_steps=10)
    seconds = plan["seconds"]
    assert list(seconds) == ["encode_text", "load", "denoise", "decode", "total"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2)
    work = forward_flops(load_task("t2v-1.3B"), (16, 21, 60, 104)).total
    assert seconds["denoise"] == pytest.approx(20 * work / 1e11 / 0.85)  # what is reached of the rate
    assert seconds["load"] == pytest.approx(2 * 1_418_996_800 / CPU.disk_rate)  # of files that are not there yet
    vae = decoding(load_task("t2v-1.3B").vae, (16, 21, 60, 104), "fp32", "cpu").flops
    assert seconds["decode"] == pytest.approx(vae / 1e11, rel=0.01)
    twice = plan_of(tmp_path, monkeypatch, replace(CPU, flops=2e11, vae_flops=1e11), task="t2v-1.3B", sample_steps=10)
    assert twice["seconds"]["denoise"] == pytest.approx(seconds["denoise"] / 2)
    assert twice["seconds"]["decode"] == pytest.approx(seconds["decode"])
    single = plan_of(tmp_path, monkeypatch, task="t2v-1.3B", sample_steps=10, sample_guide_scale=1)
    assert single["seconds"]["denoise"] == pytest.approx(seconds["denoise"] / 2)


def test_processes_share_the_work(tmp_path, monkeypatch):
    options = {"task": "t2v-14B", "size": "832*480"}
    alone = plan_of(tmp_path, monkeypatch, GPU, **options)["seconds"]
    for grid in ({}, {"cfg_parallel": True}):
        shared = plan_of(tmp_path, monkeypatch, GPU, world=4, **options, **grid)["seconds"]
        assert shared["denoise"] == pytest.approx(alone["denoise"] / 4)


def test_blocks_that_are_waited_for_count(tmp_path, monkeypatch):
    options = {"task": "t2v-14B", "size": "832*480", "offload": "block", "resident_blocks": 0}
    plans = [plan_of(tmp_path, monkeypatch, replace(GPU, transfer_rate=rate), **options) for rate in (1e12, 1e9)]
    waited = plans[1]["transfers"]["exposed_seconds_per_forward"]
    assert waited > 10
    quick, slow = (plan["seconds"]["denoise"] for plan in plans)
    assert slow == pytest.approx(quick + plans[1]["forwards"] * waited)


def test_the_image_counts(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (832, 480)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    seconds = plan_of(tmp_path, monkeypatch, task="i2v-14B", image=image, size="832*480")["seconds"]
    one = plan_of(tmp_path, monkeypatch, task="ti2v-5B", image=image, size="832*480")["seconds"]
    assert seconds["encode_image"] > 1000 > one["encode_image"] > 0  # of 5B only the first frame is encoded


def test_the_plan_and_the_start_say_how_long(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, monkeypatch, task="t2v-1.3B")
    [line] = [line for line in start_lines(plan) if line.startswith("time: ")]
    assert line.startswith("time: about 3 days 21 h on this machine (encode_text ")
    for stage in ("load", "denoise", "decode"):
        assert f"{stage} " in line
    assert "an estimate, rates measured, but for the disk's" in line
    assert f"time        {line.removeprefix('time: ')}" in format_plan(plan)


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0.2, "<1 s"),
        (1, "1 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3560, "59 min"),
        (3600, "1 h"),
        (3 * 3600 + 60, "3 h 1 min"),
    ]
    + [(11.4 * 3600, "11 h"), (50 * 3600, "2 days 2 h"), (48 * 3600, "2 days"), (40 * 86400, "40 days")],
)
def test_durations_read_well(seconds, told):
    assert duration(seconds) == told


# What would take less


def shorter(tmp_path, monkeypatch, machine=CPU, **options):
    plan = plan_of(tmp_path, monkeypatch, machine, **options)
    assert all(one["seconds"] is None or one["seconds"] < plan["seconds"]["total"] for one in plan["shorter"])
    return [one["change"] for one in plan["shorter"]], plan


def test_long_runs_say_what_would_shorten_them(tmp_path, monkeypatch):
    changes, plan = shorter(tmp_path, monkeypatch, task="t2v-14B")
    flags = [change.split()[0] for change in changes]
    assert flags == ["--size", "--frame_num", "--sample_steps", "--preset", "a", "--task"]
    assert any(line.startswith("shorter: --size ") for line in start_lines(plan))
    assert "(about " in format_plan(plan).split("shorter ")[1]
    quick = plan_of(tmp_path, monkeypatch, replace(GPU, flops=5e15, vae_flops=5e15), task="t2v-14B")
    assert quick["shorter"] == [] and not any("shorter" in line for line in start_lines(quick))


def test_what_is_offered_is_possible(tmp_path, monkeypatch):
    """Each flag makes a request, of as much work as was promised."""
    changes, plan = shorter(tmp_path, monkeypatch, task="t2v-A14B", size="720*1280")
    told = {one["change"]: one["seconds"] for one in plan["shorter"]}
    for change in changes:
        words = change.removeprefix("a cache, such as ").split(" with ")[0].replace("--", "").split()
        options = dict(zip(words[::2], [*words[1::2], True]))
        again = plan_of(tmp_path, monkeypatch, **{"task": "t2v-A14B", "size": "720*1280"} | options)
        if told[change] is not None:
            assert again["seconds"]["total"] == pytest.approx(told[change], rel=0.02), change
    [size] = [change for change in changes if change.startswith("--size")]
    width, height = map(int, size.split()[1].split("*"))
    assert height > width  # a video that stands stays so


def test_what_is_not_possible_is_not_offered(tmp_path, monkeypatch):
    base = {"task": "t2v-1.3B", "size": "832*480"}
    kinds = {" ".join(one.split()[:2]) for one in shorter(tmp_path, monkeypatch, **base)[0]}
    assert not any(one.startswith("--task") for one in kinds)  # there is none smaller
    assert "--frame_num 1" not in kinds
    cached, _ = shorter(tmp_path, monkeypatch, **base, teacache=True)
    assert not any(one.startswith(("a cache", "--preset", "--sample_steps")) for one in cached)
    distilled, _ = shorter(tmp_path, monkeypatch, replace(CPU, flops=1e10), **base, preset="distill-4step")
    assert not any(one.startswith(("--preset", "--sample_steps", "a cache")) for one in distilled)
    own, _ = shorter(tmp_path, monkeypatch, task="t2v-14B", dit=__file__)
    assert not any(one.startswith("--task") for one in own)  # the file is of this one
    still, _ = shorter(tmp_path, monkeypatch, replace(CPU, flops=1e8), **base, frame_num=1)
    assert not any(one.startswith("--frame_num") for one in still)
    with pytest.raises(ValueError):
        check_options({"fbcache": True}, 4)


# Progress


def test_the_bar_counts_from_where_it_begins_and_shows_the_estimate_before(capsys):
    from wan.distributed.signals import Signals

    from wan.cli import _Progress
    from wan.engine import _Stages

    plan = {"seconds": {"encode_text": 60, "load": 60, "denoise": 7200, "decode": 60}}
    with _Progress(False, types.SimpleNamespace(stage=""), Signals()) as progress:
        stages = _Stages(progress, plan)
        stages("load", 0, 1)
        stages("load", 1, 1)
        stages("denoise", 2, 4)
        assert progress.bar.format_dict["elapsed"] < 30  # loading is not in it
        before = capsys.readouterr().err
        stages("denoise", 3, 4)
        stages("denoise", 4, 4)
    after = capsys.readouterr().err
    assert "load: 100%" in before and "denoise:  50%" in before and "about 1 h left, by the plan" in before
    assert "about" not in after.split("\r")[-1] and "denoise: 100%" in after


# Memory that is in use


def test_memory_that_this_process_holds_is_not_free(monkeypatch):
    """On a GPU that is made up: another pipeline has 30 GB of it, of which torch could give back 2."""
    from wan.plan import machine, measure

    gigabyte = 10**9
    has = {"memory_reserved": 30 * gigabyte, "memory_allocated": 28 * gigabyte}
    for name, value in has.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * gigabyte, 80 * gigabyte))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "_gpu_flops", lambda device, dtype: 1e14)
    monkeypatch.setattr(machine, "_transfer_rate", lambda device: 1e10)
    asked = torch.device("cuda"), build_request({}), load_task("t2v-tiny")
    assert measure(*asked).vram_bytes == 52 * gigabyte + machine.CONTEXT_BYTES
    held = machine.Held(device=20 * gigabyte, ram=3 * gigabyte)  # by models of ours, which can be let go of
    assert measure(*asked, held=held).vram_bytes == 72 * gigabyte + machine.CONTEXT_BYTES


def test_memory_of_another_pipeline_is_not_free(monkeypatch):
    from wan import plan
    from wan.plan import machine

    monkeypatch.setattr(machine, "free_ram", lambda: 8 * 10**9)
    held = torch.ones(400 << 20, dtype=torch.uint8)  # beyond what a bare process takes
    ram = machine.look(build_request({"device": "cpu"})).ram_bytes
    assert 8 * 10**9 < ram <= 8 * 10**9 + machine.PROCESS_BYTES
    asked = torch.device("cpu"), build_request({}), load_task("t2v-tiny")
    ours = machine.Held(ram=10**9)  # by models that can be let go of
    assert plan.measure(*asked, held=ours).ram_bytes == ram + 10**9
    assert len(held) and "torch" in sys.modules
