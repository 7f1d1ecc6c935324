"""What each policy measures, and what a new one needs."""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from wan.cache import NO_CACHE, CacheManager
from wan.cache.options import PREDICTORS, check_coefficients, check_options, make_manager
from wan.cache.policies.magcache import nearest
from wan.cache.policy import POLICIES, Lifecycle, Policy, register
from wan.cache.predictor import Residuals
from wan.cache.sums import read, slices, total

from tests.caching.network import FBCACHE, ON_BLOCKS, Scripted, Watch, official_mask, sample, skips, way
from tests.caching.toy import CONFIGS, STEPS, Stack, contexts, decisions, hidden, make, predict, random, run_stack
from wan.conditioning.latent import FrameCondition
from wan.solvers import make_solver

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", FBCACHE)
def test_fbcache_metric(name, stride, dtype):
    """Against the definition in float64, on more tokens than one slice of the sum holds."""
    manager, stack = make(name, fb_downsample=stride, fb_warmup=STEPS), Stack(1, width=512)
    tokens, at = 1300, []
    assert len(list(slices(torch.empty(1, tokens, 512)))) == 3
    steps = contexts(10)
    with manager.run(steps):
        for ctx in steps[:3]:
            h = hidden(ctx.step, "cond", tokens, 512).to(dtype)
            at.append((h.double(), predict(manager, ctx, h, stack).double()))
    for index, one in enumerate(manager.telemetry.decisions):
        if not index:
            assert one.metric is None
            continue
        now, then = (out - h if "residual" in name else out for h, out in (at[index], at[index - 1]))
        now, then = now[:, ::stride], then[:, ::stride]
        if name.endswith("l2"):
            expected = ((now - then).square().mean() / then.square().mean()).sqrt()
        else:
            expected = (now - then).abs().mean() / then.abs().mean()
        assert one.metric == pytest.approx(expected.item(), rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_sums_are_right_where_there_are_many():
    """3e7 numbers in bf16: an fp32 sum in one go is out by a tenth."""
    x = torch.full((1, 6000, 5120), 0.7, dtype=torch.bfloat16)
    value = x[0, 0, 0].item()
    (plain,) = read(total(x[:, part].clone() for part in slices(x)))
    (squares,) = read(total((x[:, part].clone() for part in slices(x)), squared=True))
    assert plain == pytest.approx(value * x.numel(), rel=1e-6)
    assert squares == pytest.approx(value**2 * x.numel(), rel=1e-6)


def test_fb_ema_smooths():
    raw, smooth = (make("fbcache hidden_rel_l1", fb_ema=ema, fb_warmup=STEPS) for ema in (0, 0.75))
    for manager in (raw, smooth):
        run_stack(manager, Stack(), branches=["cond"])
    values = [one.metric for one in raw.telemetry.decisions][1:]
    expected = [values[0]]
    for value in values[1:]:
        expected.append(0.75 * expected[-1] + 0.25 * value)
    assert [one.metric for one in smooth.telemetry.decisions][1:] == pytest.approx(expected)


def test_fbcache_compares_with_the_last_computed_step():
    manager = make("fbcache hidden_rel_l1", fb_thresh=1e9, cache_max_skips=100)
    run_stack(manager, Stack(), branches=["cond"])
    metrics = [one.metric for one in manager.telemetry.decisions][1:]
    assert decisions(manager) == "c" + "S" * (STEPS - 2) + "c" and metrics == sorted(metrics)


@pytest.mark.parametrize("own", [True, False])
def test_fb_cfg_sep_diff(own):
    """Uncond obeys cond either way; what is recorded is its own change, or cond's."""
    manager = make("fbcache residual_rel_l1", fb_cfg_sep_diff=own)
    kept, stack = [], Stack()
    with manager.run(contexts()):
        for ctx in contexts():
            for branch in ("cond", "uncond"):
                here = replace(ctx, branch=branch)
                predict(manager, here, hidden(ctx.step, branch), stack)
            kept.append(manager.kept_bytes())
    assert decisions(manager, "cond") == decisions(manager, "uncond") and "S" in decisions(manager)
    for cond, uncond in zip(manager.telemetry.decisions[2::2], manager.telemetry.decisions[3::2]):
        assert (cond.metric == uncond.metric) is not own
        assert uncond.reason in ("as cond", "last")
    one = hidden(0, "cond").nbytes
    slots = [round(size / one, 1) for size in kept[:-1]]
    assert slots == [4.0 if own else 3.0] * (STEPS - 1)  # two residuals, and a reference for each that measures


@pytest.mark.parametrize("own", [True, False])
def test_uncond_computes_where_only_it_cannot_skip(own):
    manager, at = make("fbcache residual_rel_l1", fb_cfg_sep_diff=own), 5
    outs = run_stack(manager, Stack(), glitch=(at, "uncond"))
    decided = {(one.step, one.branch): one for one in manager.telemetry.decisions}
    assert decided[at, "cond"].skipped
    assert not decided[at, "uncond"].skipped and decided[at, "uncond"].reason == "shape changed"
    stack = Stack()
    assert torch.equal(outs[at, "uncond"], stack.run(hidden(at, "uncond")[:, :-1], 0, 3))


def test_uncond_that_is_not_finite_computes():
    manager, stack = make("fbcache residual_rel_l1", fb_thresh=1e9), Stack()
    with manager.run(contexts()):
        for ctx in contexts():
            for branch in ("cond", "uncond"):
                h = hidden(ctx.step, branch)
                if (ctx.step, branch) == (3, "uncond"):
                    h[0, 0, 0] = math.nan
                predict(manager, replace(ctx, branch=branch), h, stack)
    assert decisions(manager, "cond")[:6] == "cSSSSS" and decisions(manager, "uncond")[:6] == "cSSccS"


def test_uncond_alone_decides_for_itself():
    """Where no cond prediction was made in the step, as with a pipeline of other order."""
    manager = make("fbcache residual_rel_l1")
    run_stack(manager, Stack(), branches=["uncond", "cond"])
    first = [one for one in manager.telemetry.decisions if one.branch == "uncond"]
    assert any(one.skipped for one in first) and not any(one.reason == "as cond" for one in first)


def test_teacache_is_the_official_rule(models):
    """Against the official loop in numpy, with a polynomial that leaves its range and its sign."""
    coefficients = {"polynomial": {"model": [3.0, -0.2, 0.1]}, "range": {"model": [0.2, 0.62]}}
    flags = {"teacache": True, "teacache_policy": "polynomial", "teacache_thresh": 2.0}
    manager = make_manager(check_options(flags, 30)[0], coefficients)
    sample(models, manager, steps=30)
    times = make_solver("unipc", steps=30, shift=5.0).timesteps.tolist()
    embeddings = [models["model"].embed_step(t)["embedding"].detach().double().numpy() for t in times]
    expected, total, beyond = ["c"], 0.0, 0
    for index in range(1, 30):
        change = np.abs(embeddings[index] - embeddings[index - 1]).mean() / np.abs(embeddings[index - 1]).mean()
        outside = not 0.2 <= change <= 0.62
        beyond += outside
        total += np.polyval([3.0, -0.2, 0.1], change)
        skip = not outside and total < 2.0 and index < 29
        expected.append("S" if skip else "c")
        total = total if skip else 0.0
    assert beyond and decisions(manager, "cond") == "".join(expected) and "S" in expected


def test_teacache_computes_where_its_polynomial_is_negative(models):
    """Also where what has been added up before would outweigh it."""
    flags = {"teacache": True, "teacache_policy": "polynomial", "teacache_thresh": 1e9, "cache_max_skips": 100}
    manager = make_manager(check_options(flags, 30)[0], {"polynomial": {"model": [1.0, -0.6]}})
    sample(models, manager, steps=30)
    times = make_solver("unipc", steps=30, shift=5.0).timesteps.tolist()
    embeddings = torch.cat([models["model"].embed_step(t)["embedding"].detach() for t in times])
    changes = (embeddings[1:] - embeddings[:-1]).abs().mean(1) / embeddings[:-1].abs().mean(1)
    expected = "c" + "".join("S" if change > 0.6 else "c" for change in changes[:-1].tolist()) + "c"
    assert decisions(manager, "cond") == expected and "Sc" in expected and "SS" in expected


def test_teacache_alternating(models):
    free, alternating = (
        make("teacache linear", teacache_thresh=1e9, **flags) for flags in ({}, {"teacache_alternating": True})
    )
    for manager in (free, alternating):
        sample(models, manager)
    assert "SS" in decisions(free, "cond")
    assert decisions(alternating, "cond") == "cS" * (STEPS // 2 - 1) + "cc"


def test_teacache_projection_computes_five_steps(models):
    manager = make("teacache polynomial_projection", teacache_thresh=1e9)
    sample(models, manager)
    assert decisions(manager, "cond").startswith("cccccS")


def test_a_clean_first_frame_does_not_enter_the_plan(models):
    """ti2v: tokens of the first frame have t = 0 all the time; what counts is the other ones' timestep."""
    frame = random(1, 4, 1, 4, 8, seed=8)
    managers = [make("teacache linear") for _ in range(2)]
    sample(models, managers[0])
    sample(models, managers[1], condition=FrameCondition(frame, num_latent_frames=3))
    one, two = ([one.metric for one in manager.telemetry.decisions] for manager in managers)
    assert one == two and decisions(managers[0]) == decisions(managers[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_two_timesteps_at_once(models, name):
    manager = make(name, **({"easy_thresh": 5} if name == "easycache" else {}))
    frame = random(1, 4, 1, 4, 8, seed=8)
    latents = sample(models, manager, condition=FrameCondition(frame, num_latent_frames=3))
    assert torch.equal(latents[:, :, :1], frame) and skips(manager) and torch.isfinite(latents).all()


def test_without_guidance_there_is_no_uncond(models):
    manager = make("fbcache hidden_rel_l1")
    sample(models, manager, scale=1)
    assert list(manager.telemetry.report()["model"]) == ["cond"] and skips(manager)
    assert "uncond" not in manager.telemetry.summary()[0]


def test_magcache_resamples_its_tables():
    values = [1.0, *(0.9 - 0.01 * index for index in range(9))]
    assert nearest(values, 10) == values
    for count in (1, 2, 4, 17, 50):
        picked = nearest(values, count)
        assert len(picked) == count and picked[0] == 1
        assert picked[1:] == [values[round(i * 9 / (count - 1))] for i in range(1, count)]


def test_magcache_has_a_table_for_each_expert():
    """No ratio across the boundary: the first step of an expert is computed and its error is 0."""
    options, _ = check_options({"magcache": True, "mag_thresh": 0.06, "mag_K": 2}, 40)
    found = check_coefficients(options, "wan2.2-t2v-A14B", ("high", "low"))
    manager = make_manager(options, found)
    steps = contexts(26, "high", of=40) + contexts(14, "low", first=26, of=40)
    run_stack(manager, Stack(), steps=steps, branches=["cond"])
    for expert, count in (("high", 26), ("low", 14)):
        ours = [one for one in manager.telemetry.decisions if one.expert == expert]
        mask = official_mask(found["ratios"][expert], 0.06, 2, 0.2)
        assert decisions(manager, expert=expert) == "".join("cS"[skip] for skip in mask) and True in mask
        assert [one.metric for one in ours[: int(count * 0.2)]] == [0] * int(count * 0.2)


def test_magcache_ratios_that_are_given_are_those_of_the_run():
    """One for each step, whichever expert makes it; of another number of steps, the nearest."""
    given = [1.0, *(0.99 - 0.002 * index for index in range(39))]
    for values, of_run in ((given, given), (given[::2], nearest(given[::2], 40))):
        ratios = ",".join(map(str, values))
        options, _ = check_options({"magcache": True, "mag_thresh": 0.12, "mag_K": 3, "mag_ratios": ratios}, 40)
        manager = make_manager(options, check_coefficients(options, None, ("high", "low")))
        steps = contexts(26, "high", of=40) + contexts(14, "low", first=26, of=40)
        run_stack(manager, Stack(), steps=steps, branches=["cond"])
        for expert, part in (("high", slice(26)), ("low", slice(26, 40))):
            mask = official_mask(of_run[part], 0.12, 3, 0.2)
            assert decisions(manager, expert=expert) == "".join("cS"[skip] for skip in mask) and True in mask


def test_teacache_polynomial_that_is_given():
    """It needs no measured one, holds for each expert, and is used outside of the range of any fit."""
    flags = {"teacache": True, "teacache_policy": "polynomial", "teacache_thresh": 1.0, "teacache_last_steps": 0}
    options, _ = check_options(flags | {"teacache_polynomial": [0.0, 0.3], "cache_max_skips": 9}, 40)
    policy = make_manager(options, check_coefficients(options, "wan2.2-t2v-A14B", ("high", "low"))).policy
    assert [policy.rescale(change, name) for change in (0.0, 5.0) for name in ("high", "low", "model")] == [0.3] * 6
    assert policy.lifecycle.warmup == 1 and not policy.needs(options)


def test_easycache_is_the_official_rule(models):
    """Against its formula in numpy, on a way of latents that is given."""
    steps, threshold = 30, 0.5
    latents = way(steps)
    manager = make("easycache", steps=steps, easy_thresh=threshold)
    watch = Watch(manager)
    sample(models, watch, solver=Scripted(latents, steps), scale=1)
    bare = Watch(NO_CACHE)
    sample(models, bare, solver=Scripted(latents, steps), scale=1)
    x = [latent.double().numpy() for latent in latents]
    v = [bare.outs[step, "cond"].double().numpy() for step in range(steps)]
    computed, error, run, rate = [], 0.0, 0, None
    for n in range(steps):
        skip = False
        if len(computed) >= 2:
            i, j = computed[-1], computed[-2]
            rate = np.abs(v[i] - v[j]).mean() / np.abs(x[i] - x[j]).mean()
            error += rate * np.abs(x[n] - x[n - 1]).mean() / np.abs(v[i]).mean()
            assert manager.telemetry.decisions[n].metric == pytest.approx(error, rel=1e-4)
            skip = 6 <= n < steps - 1 and error < threshold and run < 5
        expected = x[n] + (v[computed[-1]] - x[computed[-1]]) if skip else v[n]
        np.testing.assert_allclose(watch.outs[n, "cond"].numpy(), expected, atol=1e-4)
        if not skip:
            computed.append(n)
        error, run = (error, run + 1) if skip else (0.0, 0)
    assert 8 < len(computed) < steps - 8 and decisions(manager).count("c") == len(computed)


class Linear(Stack):
    """Its residual is linear in sigma, and differs from token to token."""

    def __init__(self):
        super().__init__()
        self.slope, self.sigma = random(1, 37, 8, seed=77), 0.0

    def run(self, h, first, last):
        return h + (last - first) * (0.5 + self.sigma * self.slope)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ON_BLOCKS)
def test_first_order_predictor_is_exact_for_a_linear_residual(name, dtype, tolerance):
    """At uneven steps and over runs of several skips, once two steps have been computed."""
    steps = contexts()
    gaps = {round(a.sigma - b.sigma, 4) for a, b in zip(steps, steps[1:])}
    assert len(gaps) > 5
    errors = {}
    for predictor in ("zero", "first"):
        manager, stack, worst = make(name, cache_predictor=predictor), Linear(), 0.0
        with manager.run(steps):
            for ctx in steps:
                stack.sigma = ctx.sigma
                h = hidden(ctx.step, "cond").to(dtype)
                out = predict(manager, ctx, h, stack)
                if decisions(manager).count("c") >= 2:
                    worst = max(worst, (out - stack.run(h, 0, 3)).abs().max().item())
        errors[predictor] = worst
    assert errors["first"] < tolerance < errors["zero"]


@pytest.mark.parametrize("ahead, share", [(0.01, 0.01), (0.5, 0.393), (1, 0.632), (2, 0.865), (50, 1)])
def test_a_damped_slope_fades(ahead, share):
    """Near the last step it is that of the line; far off, the residual has moved by one more interval."""
    residuals = Residuals("damped")
    residuals.add(0.9, torch.zeros(3))
    residuals.add(0.8, torch.ones(3))
    assert residuals.predict(0.8 - 0.1 * ahead, torch.zeros(3)).tolist() == pytest.approx([1 + share] * 3, abs=1e-3)


@pytest.mark.parametrize("order", PREDICTORS)
def test_coinciding_steps_are_not_extrapolated(order):
    residuals = Residuals(order)
    for value in (1.0, 2.0):
        residuals.add(0.5, torch.full((2,), value))
    assert residuals.predict(0.4, torch.zeros(2)).tolist() == [2, 2]


def test_room_is_made_before_the_network_runs():
    """While the network runs, no residual lies in memory that it will replace, and no old reference."""
    for name, predictor, slots in (
        ("teacache linear", "zero", 0),
        ("teacache linear", "first", 1),
        ("fbcache hidden_rel_l1", "zero", 1),
        ("fbcache residual_rel_l1", "zero", 1),
    ):
        manager, seen = make(name, cache_predictor=predictor), []

        class Looking(Stack):
            def run(self, h, first, last):
                if last == 3:
                    seen.append(manager.kept_bytes())  # noqa: B023
                return super().run(h, first, last)

        run_stack(manager, Looking(), branches=["cond"])
        one = hidden(0, "cond").nbytes
        assert {round(size / one, 1) for size in seen[1:-1]} == {slots} and seen[-1] == 0


def test_the_network_is_not_asked_for_steps_it_was_not_told_of():
    manager = make("magcache")
    with manager.run(contexts()[:5]), pytest.raises(RuntimeError, match="step 7 of expert model is not in the run"):
        predict(manager, contexts()[7], hidden(7, "cond"), Stack())


def test_first_step_is_a_warm_up_even_without_one(models, plain):
    """--fb_warmup 0 cannot skip the first step; that is no failsafe."""
    for name, flags in (("fbcache hidden_rel_l1", {"fb_warmup": 0}), ("teacache linear", {"teacache_warmup": 0})):
        manager = make(name, **flags)
        sample(models, manager)
        assert manager.telemetry.decisions[0].reason == "warm-up"
        assert manager.telemetry.report()["model"]["cond"]["failsafes"] == {}


# A new policy is one file


def test_a_policy_needs_nothing_but_itself(models):
    known = dict(POLICIES)
    try:

        @register
        class EverySecond(Policy):
            name = "every_second"
            help = "a test"

            def sums(self, memory, index, before, probe):
                return float(index % 2), 1.0

        manager = CacheManager(EverySecond(0.5, Lifecycle()))
        sample(models, manager)
        assert decisions(manager, "cond") == "cc" + "Sc" * (STEPS // 2 - 1)
    finally:
        POLICIES.clear()
        POLICIES.update(known)


def test_two_call_sites():
    """One `cache.blocks(` around the only block loop and one `cache.prediction(` in the sampler."""
    found = Counter()
    for path in sorted((REPO / "wan").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("blocks", "prediction") and ast.unparse(node.func.value).endswith("cache"):
                    found[path.relative_to(REPO).as_posix(), node.func.attr] += 1
    assert found == {("wan/models/dit/model.py", "blocks"): 1, ("wan/denoise.py", "prediction"): 1}
