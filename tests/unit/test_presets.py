"""Presets: options of a kind of model, below what the user gives."""

from pathlib import Path

import pytest
import torch

from wan.denoise import denoise
from wan.errors import UsageError
from wan.options import build_request
from wan.options.replay import replay_options
from wan.plan import look, make_plan
from wan.solvers import make_solver
from wan.tasks import load_preset, load_task, preset_names

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("task", ["t2v-tiny", "i2v-tiny", "t2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_what_its_file_says(task, name):
    spec = load_task(task)
    options = load_preset(name, spec)
    request = build_request({"task": task, "preset": name, "prompt": "a cat", "ckpt_dir": "org/name"})
    settings = request.settings()
    for flag, value in options.items():
        if isinstance(value, list):
            assert list(settings[flag]) == value and request.sample.steps == len(value)
        else:
            assert settings[flag] == value
    last = request.sample.by_phase[-1]
    assert last.guide_scale == (1, 1) and last.lora == (1,)
    assert build_request(replay_options(settings, {"ckpt_dir": "org/name"})).sample == request.sample


def test_flags_count_for_more():
    request = build_request({"preset": "distill-4step", "sample_shift": 7, "sample_guide_scale": 2})
    assert request.sample.shift == 7 and request.sample.guide_scale == (2, 2) and request.sample.steps == 4


@pytest.mark.parametrize(
    "given, steps, shift",
    [({"sample_steps": 8}, 8, 5), ({"sigmas": "1,0.5"}, 2, None), ({"denoising_step_list": "1000,250"}, 2, 5)],
)
def test_other_steps_take_the_place_of_the_presets(given, steps, shift):
    sample = build_request({"task": "i2v-tiny", "preset": "distill-4step", **given}).sample
    assert (sample.steps, sample.shift, sample.boundary_step_index, sample.guide_scale) == (steps, shift, None, (1, 1))


def test_as_many_steps_are_the_presets_own():
    sample = build_request({"preset": "distill-4step", "sample_steps": 4}).sample
    assert sample == build_request({"preset": "distill-4step", "seed": sample.seed}).sample


def test_a_preset_has_its_own_steps_in_a_replay():
    stored = build_request({"preset": "distill-4step"}).settings()
    lora = str(REPO / "wan/assets/tiny/loras/distill-4step.safetensors")
    again = build_request(replay_options(stored, {"preset": "distill-motion", "lora": lora}))
    assert again.sample.steps == 6 and again.sample.denoising_step_list is None


def test_cache_auto_doubts_what_it_was_not_measured_with():
    request = build_request({"cache": "auto", "sample_shift": 2})
    assert [line for line in request.warnings if "was measured without --sample_shift" in line]
    assert not [line for line in build_request({"cache": "auto"}).warnings if "measured without" in line]


def test_another_solver_takes_the_presets_shift_along():
    assert build_request({"preset": "distill-4step", "sample_solver": "rcm"}).sample.shift == 5  # its steps are listed
    sample = build_request({"preset": "rcm-4step", "sample_solver": "euler"}).sample
    assert sample.sigma_max is None and sample.steps == 4


def test_a_preset_counts_for_more_than_a_stored_run():
    stored = build_request({"sample_shift": 3, "seed": 5}).settings()
    request = build_request(replay_options(stored, {"preset": "distill-4step"}))
    assert request.sample.shift == 5 and request.sample.seed == 5 and request.sample.steps == 4
    again = build_request(replay_options(request.settings(), {}))
    assert again.sample.shift == 5 and again.sample.steps == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "fast"}, "unknown --preset 'fast'; choose one of: distill-2step, distill-4step"),
        ({"boundary": 0.5}, "--boundary is for tasks with two experts; t2v-tiny has one"),
        ({"task": "i2v-tiny", "boundary": 1.1}, "--boundary must be a noise level from 0 to 1, not 1.1"),
        ({"task": "i2v-tiny", "boundary": 1, "boundary_step_index": 2}, "--boundary and --boundary_step_index both"),
        ({"boundary_step_index": 1}, "--boundary_step_index is for tasks with two experts; t2v-tiny has one"),
        ({"task": "i2v-tiny", "boundary_step_index": 21}, "--boundary_step_index must be a whole number from 0 to 20"),
        ({"trim_first_frames": 17}, "--trim_first_frames must be a whole number from 0 to 16, not 17"),
        ({"sigmas": "1,,0.5"}, "--sigmas must be falling noise levels"),
        ({"tae": ""}, "--tae: no file ''"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message):
    with pytest.raises(UsageError) as error:
        build_request(options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_the_low_noise_expert_begins_at_the_boundary_step(index):
    experts = []

    def predict(latent, times, ctx):
        experts.append(ctx.expert)
        return torch.zeros_like(latent)

    request = build_request({"task": "i2v-tiny", "preset": "distill-4step", "boundary_step_index": index})
    solver = make_solver("euler", steps=4, shift=5.0, denoising_step_list=request.sample.denoising_step_list)
    latent = torch.zeros(1, 1, 1, 2, 2)
    denoise(
        predict, solver, latent, guide_scale=1, boundary=0.9, boundary_step_index=request.sample.boundary_step_index
    )
    assert experts == ["high"] * index + ["low"] * (4 - index)
    assert make_plan(request, load_task("i2v-tiny"), look(request))["steps_by_expert"] == {
        "high": index,
        "low": 4 - index,
    }
