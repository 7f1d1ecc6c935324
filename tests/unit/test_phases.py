"""Phases: steps with guidance, strengths of LoRAs, a solver and an expert of their own."""

import json

import pytest
import torch

from benchmarks.tiny_world_lora import I2V, lora
from wan import Engine
from wan.errors import UsageError
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.plan import look, make_plan
from wan.solvers import solver_of
from wan.tasks import load_task
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

QUICK = {"size": "32*48", "frame_num": 5, "prompt": "a red circle", "seed": 5, "device": "cpu"}
STRIPES = lora("stripes")


def pipe_for(**options):
    request = build_request(QUICK | options)
    return request, WanPipeline.from_request(request, load_task(request.load.task))


def latents(**options):
    request, pipe = pipe_for(**options)
    return pipe(request).latents


@pytest.fixture(scope="module")
def engine():
    with Engine(device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def made(engine):
    """made(phases, ...) -> latents of a short run of t2v-tiny."""
    options = {name: value for name, value in QUICK.items() if name != "device"}
    return lambda **more: engine.generate(**options, **more).latents


@pytest.mark.parametrize("phases", ["steps=4", "steps=1 | steps=3", "steps=2,guide=5|steps=2,lora=1,solver=unipc"])
def test_phases_that_change_nothing_are_none_bit_for_bit(made, phases):
    plain = {"sample_steps": 4, "sample_guide_scale": 5, "lora": [(STRIPES, 0.5)]}
    given = {name: value for name, value in plain.items() if name != "sample_steps"}
    assert torch.equal(made(**given, phases=phases), made(**plain))


def test_guidance_by_phase(made):
    sample = build_request(QUICK | {"phases": "steps=2,guide=3.5|steps=2,guide=1"}).sample
    assert [phase.guide_scale for phase in sample.phase_of_step] == [(3.5, 3.5)] * 2 + [(1, 1)] * 2
    assert torch.equal(made(phases="steps=2,guide=1|steps=2,guide=1"), made(sample_steps=4, sample_guide_scale=1))
    mixed = made(phases="steps=2,guide=3.5|steps=2,guide=1")
    assert not torch.equal(mixed, made(sample_steps=4, sample_guide_scale=1))
    assert not torch.equal(mixed, made(sample_steps=4, sample_guide_scale=3.5))


def test_the_uncond_branch_is_computed_where_there_is_guidance():
    request = build_request(QUICK | {"phases": "steps=3,guide=3|steps=4,guide=1", "sample_guide_scale": 1})
    spec = load_task("t2v-tiny")
    assert make_plan(request, spec, look(request))["forwards"] == 3 * 2 + 4
    pipe, branches = WanPipeline.from_request(request, spec), []
    model = pipe.experts["model"]
    model.register_forward_hook(lambda *_: branches.append(1))
    pipe(request)
    assert len(branches) == 10


def test_the_plan_counts_the_weights_that_are_written_anew():
    def denoising(phases, task="t2v-tiny", **loras):
        request, spec = build_request(QUICK | {"task": task, "phases": phases} | loras), load_task(task)
        return make_plan(request, spec, look(request))["seconds"]["denoise"]

    once, never = (denoising(f"steps=2,lora={x}|steps=3", lora=STRIPES) for x in (0, 1))
    assert denoising("steps=1,lora=0|steps=1|steps=3,lora=0", lora=STRIPES) - never == pytest.approx(2 * (once - never))
    assert once > never
    split = "steps=2,expert=high,lora=0|steps=2,expert=low"  # each has the same in all of its steps
    assert denoising(split, I2V, lora_low=lora("stripes-low", I2V)) == denoising(split.replace("0", "1"), I2V)


def by_hand(strengths, **options):
    """Latents of a run whose LoRA is changed between its steps, one for each."""
    request, pipe = pipe_for(sample_steps=len(strengths), **options)
    pipe.set_loras((STRIPES, strengths[0]))

    def progress(stage, done, total):
        if stage == "denoise" and 0 < done < total:
            pipe.set_loras((STRIPES, strengths[done]))

    return pipe(request, progress).latents


@pytest.mark.parametrize("offload", [{}, {"offload": "block", "resident_blocks": 0}, {"offload": "model"}])
def test_strengths_by_phase_are_those_set_by_hand(offload):
    phases = "steps=1,lora=0 | steps=2 | steps=1,lora=0.5"
    ours = latents(phases=phases, lora=[(STRIPES, 0.8)], **offload)
    assert torch.equal(ours, by_hand([0, 0.8, 0.8, 0.4]))


def test_packed_weights_have_them_beside(tmp_path):
    export_gguf(open_source("wan/assets/tiny/diffusion_pytorch_model.safetensors"), tmp_path / "dit.gguf", "Q8_0")
    packed = {"gguf": str(tmp_path / "dit.gguf"), "gguf_mode": "stream"}
    ours = latents(phases="steps=1,lora=0 | steps=2", lora=STRIPES, **packed)
    assert torch.equal(ours, by_hand([0, 1, 1], **packed))


def test_the_next_video_begins_with_its_own_strengths(engine, made):
    """And one without phases has the LoRAs as they were set."""
    phased = {"phases": "steps=1,lora=0 | steps=2", "lora": STRIPES}
    first, plain = made(**phased), made(sample_steps=3, lora=STRIPES)
    assert torch.equal(made(**phased), first)
    assert torch.equal(made(sample_steps=3, lora=STRIPES), plain)
    assert torch.equal(made(sample_steps=3), made(phases="steps=3,lora=0", lora=STRIPES))
    engine.set_loras(STRIPES)
    assert torch.equal(made(phases=phased["phases"]), first)
    engine.set_loras()


def test_several_loras_have_a_strength_each(made):
    other = lora("distill-4step")
    both = made(phases="steps=2,lora=1/0 | steps=2,lora=0/1", lora=[STRIPES, (other, 0.7)], sample_solver="euler")
    assert both.isfinite().all()
    assert torch.equal(made(phases="steps=3,lora=1/0", lora=[STRIPES, other]), made(sample_steps=3, lora=STRIPES))


def called(load, then):
    def loaded(*arguments):
        model = load(*arguments)
        then(model, *arguments)
        return model

    return loaded


def test_experts_by_phase():
    phases = "steps=1,expert=high,lora=0|steps=2,expert=high|steps=1,expert=low,guide=1"
    loras = {f"lora_{name}": lora(f"stripes-{name}", I2V) for name in ("high", "low")}
    request, pipe = pipe_for(task=I2V, phases=phases, **loras)
    assert request.sample.boundary_step_index == 3
    stored = json.loads(json.dumps(request.settings()))
    assert build_request(replay_options(stored, {}, files=True)).sample == request.sample
    used = []

    def watch(model, name, *_):
        model.register_forward_hook(lambda *_: used.append(f"{name} {pipe.loras[name][0][1]:g}"))

    pipe.experts._load = called(pipe.experts._load, watch)
    first = pipe(request).latents
    assert used == ["high 0", "high 0", "high 1", "high 1", "high 1", "high 1", "low 1"]
    assert torch.equal(pipe(request).latents, first)  # high is back at 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"phases": ""},
            "--phases: phase 1 has ''; it may have steps=..., guide=..., lora=..., solver=..., expert=...",
        ),
        ({"phases": "steps=2|"}, "--phases: phase 2 has ''"),
        ({"phases": "steps=2,cfg=3"}, "--phases: phase 1 has 'cfg=3'; it may have"),
        ({"phases": "steps=2 guide=3"}, "--phases: steps must be a whole number from 1 to 1000, not '2 guide=3'"),
        ({"phases": "guide=3"}, "--phases: phase 1 does not say how many steps it has: steps=N"),
        ({"phases": "steps=2,steps=3"}, "--phases: phase 1 says steps twice"),
        ({"phases": "steps=0"}, "--phases: steps must be a whole number from 1 to 1000, not 0"),
        ({"phases": "steps=600|steps=600"}, "--phases: at most 1000 steps in all"),
        ({"phases": "steps=2,guide=-1"}, "--phases: guide must be a number of at least 0, not -1"),
        ({"phases": "steps=2,guide=nan"}, "--phases: guide must be a number of at least 0, not nan"),
        ({"phases": "steps=2,lora=2000"}, "--phases: lora must be numbers from -1000 to 1000"),
        ({"phases": "steps=2,lora=1/"}, "--phases: lora must be numbers from -1000 to 1000"),
        ({"phases": "steps=2,solver=heun"}, "unknown --phases: solver 'heun'; choose one of: unipc, dpm++, euler"),
        ({"phases": "steps=2,expert=high"}, "--phases: expert is for tasks with two experts; t2v-tiny has one"),
        ({"task": I2V, "phases": "steps=2,expert=high|steps=2"}, "--phases: name the expert of every phase or of none"),
        (
            {"task": I2V, "phases": "steps=2,expert=low|steps=2,expert=high"},
            "--phases: name the expert of every phase or of none, and high before low",
        ),
        (
            {"task": I2V, "phases": "steps=2,expert=high|steps=2,expert=low", "boundary_step_index": 3},
            "--boundary_step_index 3 contradicts --phases, whose low-noise expert begins at 2",
        ),
        ({"phases": "steps=2|steps=2", "sample_steps": 5}, "--sample_steps 5 contradicts --phases, which has 4 steps"),
        ({"phases": "steps=2", "sigmas": "1,0.6,0.3"}, "--phases has 2 steps in all, and --sigmas 3"),
        ({"phases": "steps=20|steps=20", "teacache": True}, "a cache is for runs of one phase"),
        ({"phases": 3}, "--phases must be text, not 3"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UsageError) as error:
        build_request(options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"phases": "steps=1,lora=0|steps=2"}, "--phases: phase 1 has a strength for LoRAs, and there is none"),
        ({"phases": "steps=1,lora=0/1|steps=2", "lora": STRIPES}, "--phases: phase 1 has 2 strengths for 1 LoRAs"),
    ],
)
def test_strengths_of_loras_that_are_not_there(made, options, message):
    with pytest.raises(UsageError, match=message):
        made(**options)


def test_phases_split_a_list_of_steps_and_one_cache_goes_with_one_phase():
    options = {"denoising_step_list": "1000,750,500,250", "sample_shift": 5}
    whole, split = (build_request(QUICK | options | more).sample for more in ({}, {"phases": "steps=1 | steps=3"}))
    assert torch.equal(solver_of(split).sigmas, solver_of(whole).sigmas)
    assert build_request({"phases": "steps=20", "teacache": True}).sample.cache
