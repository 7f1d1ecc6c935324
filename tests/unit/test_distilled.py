"""Samplers of distilled models, each beside its published formula in fp64, written here anew."""

import hashlib
import math

import pytest
import torch

from wan.denoise import experts_of
from wan.errors import UsageError
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.solvers import make_solver, solver_of
from wan.solvers.schedule import Schedule
from wan.solvers.unipc import UniPC2
from wan.tasks import load_task

SHAPE = (1, 3, 2, 4, 5)
RCM = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(80), 1.5, 1.4, 1.0)]


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """A velocity that depends on all that it should, in whatever type x has."""
    return torch.tanh(1.3 * x - 0.4) * (0.2 + t / 700) + 0.1 * x.flip(-1)


def sampled(solver):
    x = noise(0) * solver.noise_scale
    for t in solver.timesteps.tolist():
        x = solver.step(network(x, t), x)
    return x


class Drawn:
    """The noise that is added, kept."""

    def __init__(self):
        self.made = []

    def __call__(self, shape):
        self.made.append(noise(len(self.made) + 1))
        assert shape == SHAPE
        return self.made[-1]


@pytest.mark.parametrize(
    "options, sigmas, begin",
    [
        # CausVid and FastWan: unshifted levels; x' = (1 - s) x0 + s e
        ({"name": "dmd", "steps": 3, "sigmas": [1, 0.757, 0.522]}, [1, 0.757, 0.522], 1),
        # Self-Forcing: 1000, 750, 500, 250 warped by shift 5
        (
            {"name": "dmd", "steps": 4, "shift": 5.0, "denoising_step_list": [1000, 750, 500, 250]},
            [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)],
            1,
        ),
        ({"name": "rcm", "steps": 4}, RCM, RCM[0]),
        ({"name": "rcm", "steps": 2}, RCM[:2], RCM[0]),
    ],
)
def test_the_stochastic_step(options, sigmas, begin):
    draw = Drawn()
    ours = sampled(make_solver(**options, draw=draw))
    assert len(draw.made) == len(sigmas) - 1  # none is drawn for the last step
    x = noise(0).double() * begin
    for now, then, fresh in zip(sigmas, [*sigmas[1:], 0], [*draw.made, torch.zeros(SHAPE)]):
        clean = x - now * network(x, 1000 * now)
        x = (1 - then) * clean + then * fresh.double()
    torch.testing.assert_close(ours.double(), x, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sigma_max", [80.0, 200.0, 1600.0])
def test_rcm_as_an_ode(sigma_max):
    sigmas = [math.tan(t) / (1 + math.tan(t)) for t in (math.atan(sigma_max), 1.5, 1.4, 1.0)]
    assert make_solver("rcm", steps=4, sigma_max=sigma_max).sigmas.tolist() == pytest.approx([*sigmas, 0], abs=1e-7)
    x = noise(0).double() * sigmas[0]
    for now, then in zip(sigmas, [*sigmas[1:], 0]):
        x = x - (now - then) * network(x, 1000 * now)
    ours = sampled(make_solver("rcm-ode", steps=4, sigma_max=sigma_max))
    torch.testing.assert_close(ours.double(), x, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [5.0, 7.0])
def test_steps_of_lightx2v(shift):
    """Deterministic: x' = x0 + sigma' v, at the shifted levels of the listed timesteps."""
    listed = [1000, 750, 500, 250]
    sigmas = [shift * t / 1000 / (1 + (shift - 1) * t / 1000) for t in listed]
    x = noise(0).double()
    for now, then in zip(sigmas, [*sigmas[1:], 0]):
        v = network(x, 1000 * now)
        x = x - now * v + then * v
    ours = sampled(make_solver("euler", steps=4, shift=shift, denoising_step_list=listed))
    torch.testing.assert_close(ours.double(), x, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_sigmas_are_the_same_steps_as_a_list_of_timesteps(name):
    listed = make_solver(name, steps=3, shift=5.0, denoising_step_list=[1000, 600, 100])
    levels = [5 * s / (1 + 4 * s) for s in (1.0, 0.6, 0.1)]
    given = make_solver(name, steps=3, shift=1.0, sigmas=[*levels, 0])
    assert torch.equal(given.sigmas, listed.sigmas) and torch.equal(given.timesteps, listed.timesteps)
    assert torch.equal(sampled(given), sampled(listed))


def test_solvers_one_after_another():
    """Each begins anew where the other ends, at levels of its own part of the steps."""
    request = build_request({"sample_shift": 3.0, "phases": "steps=3,solver=unipc|steps=2,solver=euler"})
    solver = solver_of(request.sample)
    first, second = (make_solver(name, steps=5, shift=3.0) for name in ("unipc", "euler"))
    assert solver.timesteps.tolist() == [*first.timesteps.tolist()[:3], *second.timesteps.tolist()[3:]]
    x, levels = noise(0), [*first.sigmas.tolist()[:3], *second.sigmas.tolist()[3:]]
    assert solver.sigmas.tolist() == levels
    alone = UniPC2(Schedule(solver.timesteps[:3], torch.tensor(levels[:4])))
    for t in solver.timesteps.tolist()[:3]:
        x = alone.step(network(x, t), x)
    for t, now, then in zip(solver.timesteps.tolist()[3:], levels[3:], levels[4:]):
        v = network(x, t)
        x = x + (then - now) * v
    torch.testing.assert_close(sampled(solver_of(request.sample)), x, atol=1e-5, rtol=1e-5)
    with pytest.raises(IndexError):
        sampled(solver) + solver.step(x, x)


def test_phases_that_say_nothing_are_one_solver_with_one_history():
    whole, split = (build_request({"phases": text}).sample for text in ("steps=5", "steps=2 | steps=3"))
    assert torch.equal(sampled(solver_of(whole)), sampled(solver_of(split)))
    assert type(solver_of(split)) is type(make_solver("unipc", steps=5, shift=3.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sigmas": "1,0.5,0.7"}, "--sigmas must be falling noise levels"),
        ({"sigmas": "1.2,0.5"}, "--sigmas must be falling noise levels"),
        ({"sigmas": "0"}, "--sigmas must be falling noise levels"),
        ({"sigmas": "1,0.5,0,0"}, "--sigmas must be falling noise levels"),
        ({"sigmas": "nan"}, "--sigmas must be falling noise levels"),
        ({"sigmas": "1,0.5", "denoising_step_list": "1000,500"}, "--sigmas and --denoising_step_list both list"),
        ({"sigmas": "1,0.5", "sample_steps": 3}, "--sample_steps 3 contradicts --sigmas, which has 2 steps"),
        ({"sigmas": "1,0.5", "sample_shift": 3}, "--sample_shift has no effect: --sigmas are not shifted"),
        ({"preset": "rcm-4step", "sample_shift": 3}, "--sample_shift has no effect: the steps of rcm are not shifted"),
        ({"sample_solver": "rcm", "sample_steps": 5}, "rcm has 1 to 4 steps of its own, not 5; --sigmas lists others"),
        (
            {"sample_solver": "rcm", "sample_steps": 4, "sigma_max": 14},
            "the sigma_max of rcm must be above 14.1, got 14",
        ),
        (
            {"sample_solver": "rcm", "sample_steps": 4, "sigma_max": "-1"},
            "--sigma_max must be a number above 0, not -1",
        ),
        (
            {"phases": "steps=2|steps=2,solver=rcm", "sample_shift": 1},
            "the noise levels of these solvers do not fall one after another",
        ),
        ({"sample_solver": "dmd", "sigma_max": 80}, "--sigma_max is for --sample_solver rcm and rcm-ode"),
        ({"sample_solver": "lcm"}, "unknown --sample_solver 'lcm'; choose one of: unipc, dpm++, euler, dmd, rcm"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UsageError) as error:
        solver_of(build_request(options).sample)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_list_may_end_in_zero_and_replay_takes_what_is_given_now():
    stored = build_request({"sigmas": "1.0, 0.757, 0.522, 0.0", "sample_solver": "dmd", "seed": 3})
    assert stored.sample.sigmas == (1.0, 0.757, 0.522) and stored.sample.steps == 3 and stored.sample.shift is None
    assert build_request(replay_options(stored.settings(), {})).sample == stored.sample
    other = build_request(replay_options(stored.settings(), {"sample_steps": "7"})).sample
    assert other.sigmas is None and other.steps == 7 and other.shift == 7.0
    plain = build_request({"seed": 3}).settings()
    now = build_request(replay_options(plain, {"sigmas": "1,0.5"})).sample
    assert now.steps == 2 and now.shift is None
    rcm = build_request(replay_options(plain, {"sample_solver": "rcm", "sample_steps": 4})).sample
    assert rcm.shift is None and solver_of(rcm).sigmas[0] == pytest.approx(80 / 81)


def test_rcm_has_four_steps_unless_others_are_asked():
    assert build_request({"sample_solver": "rcm"}).sample.steps == 4
    assert build_request({"sample_solver": "rcm", "sample_steps": 2}).sample.steps == 2
    assert build_request({"sample_solver": "rcm", "sigmas": "1,0.5,0.2"}).sample.steps == 3


@pytest.mark.parametrize("task, sigma_max", [("t2v-14B", 80), ("t2v-A14B", 200)])
def test_rcm_begins_higher_with_two_experts_which_change_by_noise(task, sigma_max):
    spec = load_task(task)
    sample = build_request({"task": task, "prompt": "a", "ckpt_dir": "a/b", "preset": "rcm-4step"}).sample
    solver = solver_of(sample)
    assert solver.sigmas[0] == pytest.approx(sigma_max / (sigma_max + 1))
    experts = experts_of(solver.timesteps.tolist(), spec.get("boundary"), sample.boundary_step_index)
    assert experts == (["high", "high", "low", "low"] if "experts" in spec else ["model"] * 4)


QUICK = {"size": "32*48", "frame_num": 5, "prompt": "a red circle", "seed": 5, "device": "cpu"}


def pipe_and(request):
    return WanPipeline.from_request(request, load_task(request.load.task))


def test_one_seed_is_one_video_however_it_is_made():
    request = build_request(QUICK | {"preset": "rcm-4step"})
    pipe = pipe_and(request)
    once = pipe(request).latents
    assert torch.equal(pipe(request).latents, once)  # what was drawn before does not count
    streamed = build_request(QUICK | {"preset": "rcm-4step", "offload": "block", "resident_blocks": 0})
    assert torch.equal(pipe_and(streamed)(streamed).latents, once)


def test_a_film_that_is_gone_on_with_has_the_same_noise():
    options = {"task": "i2v-tiny", "size": "32*48", "frame_num": 9, "seed": 5, "device": "cpu", "prompts": ["a", "b"]}
    request = build_request(options | {"preset": "dmd-3step"})
    pipe, made = pipe_and(request), []
    whole = pipe(request, on_clip=lambda frames, so_far: made.append(so_far))
    rest = pipe(request, made=made[0])
    assert torch.equal(rest.latents, whole.latents) and rest.made.sha256 == made[1].sha256
    assert hashlib.sha256(rest.frames.tobytes()).hexdigest() == made[1].sha256[1] != made[1].sha256[0]
