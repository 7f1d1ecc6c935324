"""Solvers: schedules, order of convergence on a flow with a known solution, and their handling of the ends."""

from __future__ import annotations

import math

import pytest
import torch

from wan.errors import UsageError
from wan.solvers import SOLVERS, make_solver

MEAN, SPREAD = 0.7, 0.4  # data is N(MEAN, SPREAD^2), so the flow and its trajectories are known in closed form


def width(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def trajectory(sigma: float, z: torch.Tensor) -> torch.Tensor:
    return (1 - sigma) * MEAN + width(sigma) * z


def velocity(sigma: float, x: torch.Tensor) -> torch.Tensor:
    return -MEAN + (x - (1 - sigma) * MEAN) * (sigma - (1 - sigma) * SPREAD**2) / width(sigma) ** 2


def final_error(name: str, steps: int, shift: float = 3.0) -> float:
    solver = make_solver(name, steps=steps, shift=shift)
    z = torch.linspace(-2, 2, 9)
    x = trajectory(solver.sigmas[0].item(), z)
    for sigma in solver.sigmas[:-1].tolist():
        x = solver.step(velocity(sigma, x), x)
    return (x - trajectory(0.0, z)).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence(name, order):
    coarse, fine = final_error(name, 160, shift=1.0), final_error(name, 640, shift=1.0)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.3)  # dpm++ loses a little at sigma 1


def test_higher_order_pays():
    euler, dpmpp, unipc = (final_error(name, 40, shift=1.0) for name in ("euler", "dpm++", "unipc"))
    assert unipc < dpmpp < euler


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_constant_data_is_reached_exactly(name, steps):
    target, noise = torch.tensor([1.5, -2.0]), torch.tensor([0.3, 0.8])
    solver = make_solver(name, steps=steps, shift=5.0)
    sigma = solver.sigmas[0].item()
    x = (1 - sigma) * target + sigma * noise
    for sigma in solver.sigmas[:-1].tolist():
        x = solver.step((x - target) / sigma, x)
    torch.testing.assert_close(x, target, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name, one in SOLVERS.items() if not one.is_rcm])
def test_schedule_form(name):
    solver = make_solver(name, steps=7, shift=5.0)
    assert solver.timesteps.dtype == torch.int64 and solver.timesteps.shape == (7,)
    assert solver.sigmas.dtype == torch.float32 and solver.sigmas.shape == (8,)
    assert solver.sigmas[-1] == 0
    assert (solver.sigmas.diff() < 0).all()
    assert solver.timesteps[0] == (999 if name == "unipc" else 1000)


def test_known_timesteps():
    assert make_solver("dpm++", steps=4, shift=1.0).timesteps.tolist() == [1000, 750, 500, 250]
    assert make_solver("unipc", steps=4, shift=5.0).timesteps.tolist() == [999, 937, 833, 624]


@pytest.mark.parametrize("name", SOLVERS)
def test_denoising_step_list(name):
    solver = make_solver(name, steps=4, shift=5.0, denoising_step_list=[1000, 750, 500, 250])
    assert solver.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625.0])
    assert solver.sigmas.tolist() == pytest.approx([1, 0.9375, 0.8333333, 0.625, 0])
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        x = solver.step(0.5 * x, x)
    assert x.isfinite().all()


def test_coinciding_first_timesteps_use_every_sigma():
    solver = make_solver("unipc", steps=100, shift=12.0)
    assert solver.timesteps[0] == solver.timesteps[1]
    assert final_error("unipc", 100, shift=12.0) < final_error("unipc", 25, shift=12.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_arithmetic_is_fp32(name):
    solver = make_solver(name, steps=2, shift=1.0)
    x = solver.step(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert x.dtype == torch.float32


def test_no_step_beyond_the_last():
    solver = make_solver("euler", steps=1, shift=1.0)
    x = solver.step(torch.ones(1), torch.ones(1))
    with pytest.raises(IndexError):
        solver.step(x, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "heun"}, "unipc, dpm\\+\\+, euler"),
        ({"steps": 0}, "at least 1"),
        ({"shift": 0.0}, "positive"),
        ({"denoising_step_list": [1000, 500]}, "2 denoising steps"),
        ({"denoising_step_list": [500, 750, 250, 100]}, "fall strictly"),
        ({"denoising_step_list": [1001, 750, 250, 100]}, "fall strictly"),
        ({"denoising_step_list": [1000, 750, 250, 0]}, "fall strictly"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_solver(**{"name": "unipc", "steps": 4, "shift": 5.0, **arguments})
