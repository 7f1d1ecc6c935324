"""The loop: which predictions are asked for, and what happens between steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from wan.cache import StepContext

from wan.conditioning.latent import FrameCondition
from wan.denoise import denoise, expert_at, scale_of
from wan.solvers import make_solver

SHAPE = (4, 3, 4, 4)


class Recorder:
    """A network that remembers what it was asked."""

    def __init__(self, value=None):
        self.calls: list[tuple[StepContext, torch.Tensor]] = []
        self.value = value or {"cond": 1.0, "uncond": 0.25}

    def __call__(self, latent, times, ctx):
        self.calls.append((ctx, times.t))
        return torch.full_like(latent, self.value[ctx.branch]).bfloat16()

    def branches(self):
        return [ctx.branch for ctx, _ in self.calls]


def test_scale_one_asks_for_no_uncond():
    predict = Recorder()
    denoise(predict, make_solver("euler", steps=3, shift=1.0), torch.zeros(SHAPE), guide_scale=1.0)
    assert predict.branches() == ["cond"] * 3


def test_guidance_formula():
    predict = Recorder()
    latent = denoise(predict, make_solver("euler", steps=2, shift=1.0), torch.zeros(SHAPE), guide_scale=5.0)
    assert predict.branches() == ["cond", "uncond"] * 2
    # the guided velocity is 0.25 + 5 * 0.75 = 4 throughout, over a path from sigma 1 to 0
    torch.testing.assert_close(latent, torch.full(SHAPE, -4.0))
    assert latent.dtype == torch.float32


def test_expert_and_its_scale():
    predict = Recorder()
    solver = make_solver("dpm++", steps=4, shift=1.0)  # t = 1000, 750, 500, 250
    denoise(predict, solver, torch.zeros(SHAPE), guide_scale=(1.0, 3.0), boundary=0.75)
    assert [(ctx.expert, ctx.branch) for ctx, _ in predict.calls] == [
        ("high", "cond"),
        ("high", "uncond"),
        ("high", "cond"),
        ("high", "uncond"),
        ("low", "cond"),
        ("low", "cond"),
    ]


def test_expert_names_and_scales():
    assert expert_at(0, None) == "model"
    assert [expert_at(t, 0.875) for t in (874, 875, 876)] == ["low", "high", "high"]
    assert scale_of("low", (3.0, 4.0)) == 3.0
    assert scale_of("high", (3.0, 4.0)) == 4.0
    assert scale_of("high", 5) == 5


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_history_carries_over_the_switch(name):
    """Two experts that agree give the bits of one network: the solver does not start anew at the boundary."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    one, two = (
        denoise(
            lambda latent, times, ctx: latent * ctx.sigma,
            make_solver(name, steps=6, shift=5.0),
            start,
            guide_scale=1.0,
            boundary=boundary,
        )
        for boundary in (None, 0.8)
    )
    assert torch.equal(one, two)


def test_context_and_callback():
    predict, seen = Recorder(), []
    solver = make_solver("unipc", steps=3, shift=5.0)
    latent = denoise(
        predict, solver, torch.zeros(SHAPE), guide_scale=2.0, on_step=lambda ctx, x: seen.append((ctx, x)), run=7
    )
    assert [ctx.step for ctx, _ in seen] == [0, 1, 2]
    assert [ctx.timestep for ctx, _ in seen] == solver.timesteps.tolist()
    assert [ctx.sigma for ctx, _ in seen] == solver.sigmas[:-1].tolist()
    assert all(ctx.steps == 3 and ctx.run == 7 and ctx.branch == "cond" for ctx, _ in seen)
    assert torch.equal(seen[-1][1], latent)
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0][0].step = 1


def test_callback_can_cancel():
    def cancel(ctx, latent):
        raise KeyboardInterrupt

    predict = Recorder()
    with pytest.raises(KeyboardInterrupt):
        denoise(predict, make_solver("euler", steps=3, shift=1.0), torch.zeros(SHAPE), guide_scale=1.0, on_step=cancel)
    assert len(predict.calls) == 1


def test_clean_frame_stays():
    frame = torch.full((4, 1, 4, 4), 9.0)
    predict, seen = Recorder(), []
    denoise(
        predict,
        make_solver("euler", steps=3, shift=1.0),
        torch.zeros(SHAPE),
        guide_scale=1.0,
        condition=FrameCondition(frame, num_latent_frames=3),
        on_step=lambda ctx, latent: seen.append(latent),
    )
    assert all(torch.equal(latent[:, :1], frame) for latent in seen)
    assert all((latent[:, 1:] != 9).all() for latent in seen)
    _, timestep = predict.calls[1]
    assert timestep.shape == (1, 12)  # 3 frames of 2 x 2 patches
    assert timestep[0].tolist() == [0.0] * 4 + [666.0] * 8


def test_leading_axis_is_free():
    single, batched = (
        denoise(Recorder(), make_solver("unipc", steps=3, shift=5.0), torch.ones(shape), guide_scale=3.0)
        for shape in (SHAPE, (1, *SHAPE))
    )
    assert torch.equal(single, batched[0])
