"""The cache: it computes when it must, keeps its states apart, adds the right residual and says what it did."""

from __future__ import annotations

import ast
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cache import NO_CACHE, CacheManager, NoCache, StepContext
from cache.coefficients import load_coefficients, read_coefficients, write_coefficients
from cache.options import OPTIONS, check_coefficients, check_options, make_manager, policy_of
from cache.policies.magcache import nearest
from cache.policies.teacache import TeaCache
from cache.policy import POLICIES, Lifecycle, PlannedPolicy, Policy, register
from cache.predictor import Residuals
from cache.sums import read, slices, total
from cache.telemetry import Decision, Telemetry, read_trace
from tests.unit.cache_toy import (
    CONFIGS,
    CUTS,
    GLITCH_CASES,
    GLITCH_STEP,
    GLITCHES,
    STEPS,
    THRESHOLDS,
    Stack,
    contexts,
    decisions,
    hidden,
    make,
    predict,
    random,
    run_stack,
)
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.conditioning.condition import Condition
from wan.denoise import denoise
from wan.models.dit import WanModel
from wan.pipeline import WanPipeline
from wan.request import build_request
from wan.solvers import make_solver

REPO = Path(__file__).parents[2]
SHAPE = (1, 4, 3, 4, 8)  # latents of 24 tokens
MEASURED = [name for name in CONFIGS if name.startswith(("fbcache", "easycache"))]
PLANNED = [name for name in CONFIGS if name not in MEASURED]
ON_BLOCKS = [name for name in CONFIGS if name != "easycache"]
FBCACHE = [name for name in CONFIGS if name.startswith("fbcache")]
pytestmark = pytest.mark.usefixtures("one_thread")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# A small network and its sampling


def tiny_model(seed):
    shape = {"patch_size": (1, 2, 2), "text_len": 8, "in_dim": 4, "dim": 32, "ffn_dim": 48, "freq_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanModel("t2v", text_dim=16, out_dim=4, num_heads=2, num_layers=2, **shape).eval()


@pytest.fixture(scope="module")
def models():
    one = tiny_model(0)
    return {"model": one, "high": one, "low": tiny_model(1)}


def texts(seed=0):
    return {branch: 3 * random(4, 16, seed=seed + index) for index, branch in enumerate(("cond", "uncond"))}


class Scripted:
    """A solver whose latents do not depend on what was predicted. Steps are uneven."""

    def __init__(self, latents, steps=STEPS):
        self.steps, self.latents = steps, latents
        self.sigmas = torch.linspace(1, 0, steps + 1) ** 0.8
        self.timesteps = 1000 * self.sigmas[:-1]
        self.velocities = []

    def step(self, velocity, sample):
        self.velocities.append(velocity)
        return self.latents[min(len(self.velocities), self.steps - 1)]


def way(steps=STEPS, seed=0):
    """Latents for Scripted."""
    start, drift = random(*SHAPE, seed=seed), random(*SHAPE, seed=seed + 50)
    return [start + 0.05 * step * drift for step in range(steps)]


def sample(models, cache=NO_CACHE, *, steps=STEPS, seed=0, words=None, solver=None, scale=3.0, **options):
    """Latents after a run of `denoise` under `cache`."""
    words = words or texts()

    def predict(latent, timestep, ctx):
        return models[ctx.expert](latent, timestep, [words[ctx.branch]], cache=cache, ctx=ctx)

    solver = solver or make_solver("unipc", steps=steps, shift=5.0)
    start = solver.latents[0] if isinstance(solver, Scripted) else random(*SHAPE, seed=seed)
    return denoise(predict, solver, start, guide_scale=scale, cache=cache, **options)


class Watch(NoCache):
    """Hands everything on to a cache and keeps what each prediction gave."""

    def __init__(self, cache):
        self.cache, self.outs = cache, {}

    def run(self, steps):
        return self.cache.run(steps)

    def blocks(self, *args):
        return self.cache.blocks(*args)

    def prediction(self, ctx, latent, call):
        self.outs[ctx.step, ctx.branch] = out = self.cache.prediction(ctx, latent, call)
        return out


@pytest.fixture(scope="module")
def plain(models):
    """Latents without a cache."""
    return sample(models)


def skips(manager):
    return sum(one.skipped for one in manager.telemetry.decisions)


# The numbered tests


@pytest.mark.parametrize("threshold", [0, -1])
@pytest.mark.parametrize("name", CONFIGS)
def test_01_threshold_of_zero_or_less_changes_no_bit(models, plain, name, threshold):
    manager = make(name, **{THRESHOLDS[name.split()[0]]: threshold})
    assert torch.equal(sample(models, manager), plain)
    assert skips(manager) == 0 and len(manager.telemetry.decisions) == 2 * STEPS


@pytest.mark.parametrize("threshold", [-20, 0, 0.5])
@pytest.mark.parametrize("rescale", ["polynomial", "polynomial_projection"])
def test_01_negative_polynomial_computes(models, plain, rescale, threshold):
    """p(x) = -13 would be below every threshold."""
    flags = {"teacache": True, "teacache_policy": rescale, "teacache_thresh": threshold}
    manager = make_manager(check_options(flags, STEPS)[0], {"polynomial": {"model": [-1.0, -13.0]}})
    assert torch.equal(sample(models, manager), plain) and skips(manager) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_01_without_that_the_same_settings_skip(models, plain, name):
    """Shows that the tests beside this one could fail."""
    manager = make(name)
    latents = sample(models, manager)
    assert 4 <= skips(manager) <= 1.7 * STEPS and skips(manager) % 2 == 0
    assert torch.isfinite(latents).all() and not torch.equal(latents, plain)


ALL_COMPUTED = [
    ("teacache linear", {"teacache_warmup": STEPS}),
    ("teacache linear", {"teacache_last_steps": STEPS}),
    ("teacache polynomial", {"teacache_warmup": STEPS - 1}),
    ("teacache polynomial_projection", {"teacache_last_steps": STEPS - 1}),
    *((name, {flag: STEPS}) for name in FBCACHE for flag in ("fb_warmup", "fb_last_steps")),
    ("magcache", {"mag_retention": 1}),
]


@pytest.mark.parametrize("name, flags", ALL_COMPUTED)
def test_02_all_steps_warm_up_or_last_changes_no_bit(models, plain, name, flags):
    manager = make(name, **flags)
    assert torch.equal(sample(models, manager), plain) and skips(manager) == 0
    assert {one.phase for one in manager.telemetry.decisions} <= {"warm-up", "last"}


def test_02_easycache_with_as_many_steps_as_it_computes(models):
    manager = make("easycache", steps=3, cache_force=True, easy_thresh=1e9)
    assert torch.equal(sample(models, manager, steps=3), sample(models, steps=3)) and skips(manager) == 0


# (model, E, K, R, steps, computed steps), as its authors published them
MASKS = [
    ("wan2.1-t2v-1.3B", 0.12, 2, 0.2, 50, 25),
    ("wan2.1-t2v-1.3B", 0.12, 4, 0.2, 50, 21),
    ("wan2.1-t2v-14B", 0.24, 6, 0.2, 50, 18),
    ("wan2.1-i2v-14B-480P", 0.12, 4, 0.2, 40, 17),
    ("wan2.1-i2v-14B-480P", 0.24, 6, 0.2, 40, 15),
    ("wan2.1-i2v-14B-720P", 0.12, 4, 0.2, 40, 17),
    ("wan2.1-i2v-14B-720P", 0.24, 6, 0.2, 40, 14),
    ("wan2.2-ti2v-5B-t2v", 0.06, 2, 0.2, 50, 25),
    ("wan2.2-ti2v-5B-i2v", 0.06, 2, 0.2, 50, 26),
]


def official_mask(ratios, threshold, K, retention):
    """The loop of MagCache's own code: True where a step is skipped."""
    mask, gamma, error, run = [], 1.0, 0.0, 0
    for index, ratio in enumerate(ratios):
        skip = False
        if index >= int(len(ratios) * retention):
            gamma, run = gamma * ratio, run + 1
            error += abs(1 - gamma)
            skip = error < threshold and run <= K
            if not skip:
                gamma, error, run = 1.0, 0.0, 0
        mask.append(skip)
    return mask


@pytest.mark.parametrize("model, threshold, K, retention, steps, computed", MASKS)
def test_03_magcache_masks_of_the_published_settings(model, threshold, K, retention, steps, computed):
    flags = {"magcache": True, "mag_thresh": threshold, "mag_K": K, "mag_retention": retention}
    options, _ = check_options(flags, steps)
    manager = make_manager(options, check_coefficients(options, model, ("model",)))
    run_stack(manager, Stack(), steps=contexts(steps))
    for branch in ("cond", "uncond"):
        assert decisions(manager, branch).count("c") == computed
    ratios = load_coefficients(model)["magcache"]["ratios"]["model"]
    assert len(ratios) == steps
    assert decisions(manager, "cond") == "".join("cS"[skip] for skip in official_mask(ratios, threshold, K, retention))


@pytest.mark.parametrize("name", PLANNED)
def test_04_the_plan_depends_on_the_steps_alone(models, name):
    plans = set()
    for seed, words in ((0, texts(0)), (1, texts(7))):
        manager = make(name)
        sample(models, manager, seed=seed, words=words)
        plans |= {decisions(manager, "cond"), decisions(manager, "uncond")}
    assert len(plans) == 1 and "S" in plans.pop()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_05_nothing_is_left_over_from_a_run(models, name, fails):
    manager = make(name)

    def stop(ctx, latent):
        if fails and ctx.step == STEPS // 2:
            raise KeyboardInterrupt

    first = sample(models, manager)
    try:
        sample(models, manager, seed=5, words=texts(9), on_step=stop)
        assert not fails
    except KeyboardInterrupt:
        assert fails
    assert manager.kept_bytes() == 0
    assert torch.equal(sample(models, manager), first)


def test_05_an_exception_inside_the_network(models):
    manager = make("fbcache hidden_rel_l1")
    first = sample(models, manager)

    def fail(*_):
        raise ValueError("out of memory")

    hook = models["model"].blocks[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="out of memory"):
            sample(models, manager)
    finally:
        hook.remove()
    assert manager.kept_bytes() == 0 and torch.equal(sample(models, manager), first)


class Fixed(PlannedPolicy):
    """Skips where it is told to."""

    name = "fixed"

    def __init__(self, like, plan):
        super().__init__(1.0, Lifecycle(last_steps=0))
        self.probe_blocks, self.level, self.fixed = like.probe_blocks, like.level, plan

    def begin(self, steps, embed):
        self.plan, self.metrics = self.fixed, [0.0] * len(steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_06_branches_do_not_mix(models, name):
    together = Watch(make(name))
    sample(models, together, solver=Scripted(way()))
    plan = [letter == "S" for letter in decisions(together.cache, "cond")]
    assert any(plan)
    for branch in ("cond", "uncond"):
        alone = Watch(CacheManager(Fixed(together.cache.policy, plan)))
        words = {"cond": texts()[branch]}
        sample(models, alone, solver=Scripted(way()), words=words, scale=1)
        for step in range(STEPS):
            assert torch.equal(alone.outs[step, "cond"], together.outs[step, branch]), (branch, step)


@pytest.mark.parametrize("name", CONFIGS)
def test_06_cond_decides_as_if_it_were_alone(models, name):
    both, one = make(name), make(name)
    sample(models, both, solver=Scripted(way()))
    sample(models, one, solver=Scripted(way()), scale=1)
    assert decisions(both, "cond") == decisions(one) and decisions(one, "uncond") == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_07_experts_do_not_mix(models, name):
    """High-noise steps that give NaN change nothing in the low-noise ones, whose first step is computed."""
    steps, boundary = 20, 0.5
    broken = tiny_model(0)
    torch.nn.init.constant_(broken.blocks[1].ffn["2"].bias, math.nan)
    runs = []
    for high in (models["high"], broken):
        watch = Watch(make(name))
        solver = Scripted(way(steps), steps)
        sample({"high": high, "low": models["low"]}, watch, solver=solver, boundary=boundary)
        low = {step: out for (step, branch), out in watch.outs.items() if 1000 * solver.sigmas[step] < 1000 * boundary}
        runs.append((decisions(watch.cache, expert="low"), low))
        for expert in ("high", "low"):
            assert decisions(watch.cache, expert=expert).startswith("cc")
        by_step = [one for one in watch.cache.telemetry.decisions if one.expert == "low"]
        assert by_step[0].phase == "warm-up" and not by_step[0].failsafe
        assert not torch.isfinite(solver.velocities[0]).all() or high is not broken
    (decided, low), (again, poisoned) = runs
    assert decided == again and "S" in decided and 8 <= len(low) < 2 * steps
    assert all(torch.equal(low[step], poisoned[step]) and torch.isfinite(low[step]).all() for step in low)


@pytest.mark.parametrize("name", CONFIGS)
def test_07_the_state_of_an_expert_ends_with_its_last_step(name):
    """Before the other expert's weights are loaded, whether that step was computed or skipped."""
    manager, stack = make(name), Stack()
    steps = contexts(STEPS, "high", of=2 * STEPS) + contexts(STEPS, "low", first=STEPS, of=2 * STEPS)
    kept = []
    with manager.run(steps):
        for ctx in steps:
            for branch in ("cond", "uncond"):
                here = replace(ctx, branch=branch)
                h = hidden(ctx.step, branch)
                predict(manager, here, h, stack)
            kept.append(manager.kept_bytes())
    assert kept[STEPS - 1] == kept[-1] == 0 and all(kept[: STEPS - 1]) and all(kept[STEPS:-1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Rank -> case -> decisions, of processes that share a sequence."""
    folder, size = tmp_path_factory.mktemp("ranks"), max(CUTS)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.cache_toy", str(rank), str(size), str(folder)],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * size, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.dist
@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_08_ranks_decide_as_one(ranks, name, size):
    alone = make(name)
    run_stack(alone, Stack())
    for rank in range(size):
        for one, ours in zip(alone.telemetry.decisions, ranks[rank][f"{size} {name} None {{}}"], strict=True):
            assert (ours["metric"] is None) == (one.metric is None)
            assert one.metric is None or ours["metric"] == pytest.approx(one.metric, rel=1e-5)
            for field in ("step", "branch", "phase", "skipped", "reason", "failsafe"):
                assert ours[field] == getattr(one, field), (rank, field)


@pytest.mark.parametrize("name", FBCACHE)
def test_08_a_rank_by_itself_would_decide_otherwise(name):
    """Shows that the test above could fail."""
    alone = make(name)
    run_stack(alone, Stack())
    for first, last in zip(CUTS[2], CUTS[2][1:]):
        one = make(name)
        run_stack(one, Stack(), shard=slice(first, last))
        assert decisions(one) != decisions(alone)


@pytest.mark.dist
@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("glitch", GLITCHES)
@pytest.mark.parametrize("name, flags", GLITCH_CASES)
def test_08_a_failsafe_on_one_rank_makes_all_compute(ranks, name, flags, glitch, size):
    """The hidden states of rank 1 change their shape where all would skip. Nobody waits, all go on alike."""
    alone = make(name, **flags)
    run_stack(alone, Stack())
    assert decisions(alone, glitch[1])[GLITCH_STEP] == "S"
    reports = [ranks[rank][f"{size} {name} {glitch} {flags}"] for rank in range(size)]
    assert len({json.dumps([one["skipped"] for one in report]) for report in reports}) == 1
    for rank, report in enumerate(reports):
        (there,) = (one for one in report if (one["step"], one["branch"]) == glitch)
        assert not there["skipped"] and there["failsafe"]
        assert there["reason"] == ("shape changed" if rank == 1 else "another rank computes")
        before = sum(one["step"] < GLITCH_STEP for one in report)
        assert [one["skipped"] for one in report[:before]] == [
            one.skipped for one in alone.telemetry.decisions[:before]
        ]


@pytest.mark.parametrize("bad, predictor", [(math.nan, "first"), (math.inf, "zero")])
@pytest.mark.parametrize("name", MEASURED)
def test_09_a_metric_that_is_no_number_computes_resets_and_counts(models, name, bad, predictor):
    latents = way(24)
    at = 12
    latents[at] = latents[at].clone()
    latents[at][0, 0, 0, 0, 0] = bad
    watch = Watch(make(name, **{THRESHOLDS[name.split()[0]]: 1e9}, cache_max_skips=100, cache_predictor=predictor))
    sample(models, watch, solver=Scripted(latents, 24))
    decided = decisions(watch.cache, "cond")
    assert decided[at - 1] == "S" and decided[at] == "c"
    (here,) = (one for one in watch.cache.telemetry.decisions if (one.step, one.branch) == (at, "cond"))
    assert here.failsafe and here.reason == "metric not finite" and not math.isfinite(here.metric)
    assert watch.cache.telemetry.report()["model"]["cond"]["failsafes"]["metric not finite"] >= 1
    assert "S" in decided[at + 1 :]  # it recovers
    for (step, _), out in watch.outs.items():
        assert step == at or torch.isfinite(out).all(), step


def test_09_infinite_hidden_states():
    manager, stack = make("fbcache residual_rel_l1", cache_max_skips=100, fb_thresh=1e9), Stack()
    with manager.run(contexts()):
        for ctx in contexts():
            h = hidden(ctx.step, "cond")
            h[0, 0, 0] = math.inf if ctx.step == 5 else h[0, 0, 0]
            predict(manager, ctx, h, stack)
    assert decisions(manager) == "cSSSSccSSSSc"
    assert manager.telemetry.report()["model"]["cond"]["failsafes"] == {"metric not finite": 2}
    json.loads(json.dumps(manager.telemetry.report(), allow_nan=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_10_a_change_of_shape_computes_and_resets(models, name):
    """One token broadcasts against any number: the signature decides, not whether an addition would work."""
    for size in ((1, 4, 3, 8, 8), (1, 4, 1, 2, 2)):
        latents = [random(*(SHAPE if step < STEPS // 2 else size), seed=3) for step in range(STEPS)]
        latents = [latent + 0.01 * step for step, latent in enumerate(latents)]
        watch, bare = (
            Watch(one) for one in (make(name, **{THRESHOLDS[name.split()[0]]: 1e9}, **long_runs(name)), NO_CACHE)
        )
        for one in (watch, bare):
            sample(models, one, solver=Scripted(latents))
        at = STEPS // 2
        changed = [one for one in watch.cache.telemetry.decisions if one.step == at]
        assert decisions(watch.cache, "cond")[at - 1] == "S" and not any(one.skipped for one in changed)
        assert {one.reason for one in changed} == {"shape changed"} and all(one.failsafe for one in changed)
        for branch in ("cond", "uncond"):
            assert torch.equal(watch.outs[at, branch], bare.outs[at, branch])
        assert all(out.shape == latents[step].shape for (step, _), out in watch.outs.items())


@pytest.mark.parametrize("name", ON_BLOCKS)
def test_10_a_change_of_type_computes_and_resets(models, name):
    half, at = tiny_model(0), STEPS // 2
    for key, parameter in half.named_parameters():
        if not half.keep_fp32(key):
            parameter.data = parameter.data.bfloat16()

    def predict(latent, timestep, ctx):
        model = models["model"] if ctx.step < at else half
        return model(latent, timestep, [texts()[ctx.branch]], cache=manager, ctx=ctx)

    manager = make(name, **{THRESHOLDS[name.split()[0]]: 1e9}, **long_runs(name))
    denoise(predict, Scripted(way()), way()[0], guide_scale=3.0, cache=manager)
    assert decisions(manager, "cond")[at - 1 : at + 2] == "ScS"
    assert {one.reason for one in manager.telemetry.decisions if one.step == at} == {"type changed"}


def long_runs(name):
    return {"mag_K": 100} if name == "magcache" else {"cache_max_skips": 100}


@pytest.mark.parametrize("predictor", ["zero", "first"])
@pytest.mark.parametrize("name", CONFIGS)
def test_11_moving_what_is_kept_changes_nothing(models, name, predictor):
    kept = []

    def move(ctx, latent):
        kept.append(manager.kept_bytes())
        manager.to("cpu")

    plain = sample(models, make(name, cache_predictor=predictor))
    manager = make(name, cache_predictor=predictor, cache_device="cpu")
    assert torch.equal(sample(models, manager, on_step=move), plain)
    assert all(kept[:-1]) and kept[-1] == manager.kept_bytes() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_11_nothing_is_kept_after_the_run(name):
    """No tensor of the hidden states' shape survives, whatever holds it."""
    manager, tokens = make(name, cache_predictor="first"), 41  # a shape of this test alone
    alive = []
    with torch.no_grad(), manager.run(contexts()):
        stack = Stack()
        for ctx in contexts():
            for branch in ("cond", "uncond"):
                here, h = replace(ctx, branch=branch), hidden(ctx.step, branch, tokens)
                out = predict(manager, here, h, stack)
                alive += [weakref.ref(h), weakref.ref(out)]
                del h, out
        gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert not [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == (1, tokens, 8)]


@pytest.mark.parametrize("name", CONFIGS)
def test_11_device_of_what_is_kept(name):
    """`to` moves all that is kept; with --cache_device the residuals stay there. Looked at on the meta device."""
    for device in (None, "cpu"):
        manager, stack = make(name, cache_device=device), Stack()
        with manager.run(contexts()):
            for ctx in contexts()[:6]:
                h = hidden(ctx.step, "cond")
                predict(manager, ctx, h, stack)
            manager.to("meta", "another expert")
            (branch,) = manager._branches.values()
            assert {tensor.device.type for tensor in tensors_of(branch)} == {"cpu"}
            manager.to("meta")
            assert {tensor.device.type for tensor in branch.residuals.tensors} == {device or "meta"}
            assert {tensor.device.type for tensor in tensors_of(SimpleNamespace(**vars(branch.memory)))} <= {"meta"}
            assert branch.signature[2].type == "meta"


def tensors_of(value):
    """All tensors in an object of the cache."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Residuals):
        return value.tensors
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in tensors_of(one)]
    return [tensor for one in vars(value).values() for tensor in tensors_of(one)] if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in CONFIGS])
def test_11_offload_round_trip_on_a_gpu(name):
    model = tiny_model(0).cuda()
    words = {branch: text.cuda() for branch, text in texts().items()}

    def run(manager, on_step=None):
        def predict(latent, timestep, ctx):
            return model(latent, timestep, [words[ctx.branch]], cache=manager, ctx=ctx)

        start, solver = random(*SHAPE, seed=0).cuda(), make_solver("unipc", steps=STEPS, shift=5.0)
        return denoise(predict, solver, start, guide_scale=3.0, cache=manager, on_step=on_step)

    def offload(ctx, latent):
        manager.to("cpu")
        on_gpu = [one for branch in manager._branches.values() for one in tensors_of(branch) if one.is_cuda]
        assert not on_gpu
        manager.to("cuda")

    plain = run(make(name))
    manager = make(name)
    assert torch.equal(run(manager, offload), plain) and skips(manager)
    assert all(one.seconds > 0 for one in manager.telemetry.decisions)
    kept_on_cpu = make(name, cache_device="cpu")
    assert torch.equal(run(kept_on_cpu), plain)
    torch.cuda.empty_cache()
    assert manager.kept_bytes() == kept_on_cpu.kept_bytes() == 0


class Constant(Stack):
    """Every block adds the same everywhere; the sums are exact in fp32."""

    def run(self, h, first, last):
        self.calls += last - first
        return h + 0.25 * (last - first)


@pytest.mark.parametrize("predictor", ["zero", "first"])
@pytest.mark.parametrize("name", CONFIGS)
def test_12_a_constant_residual_is_exact(name, predictor):
    manager = make(name, cache_predictor=predictor, **{THRESHOLDS[name.split()[0]]: 1e9})
    stack = Constant()
    with manager.run(contexts()):
        for ctx in contexts():
            h = hidden(ctx.step, "cond").round(decimals=0)
            copy = h.clone()
            out = predict(manager, ctx, h, stack)
            assert torch.equal(out, copy + 0.75) and torch.equal(h, copy)
    assert skips(manager) >= 5


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("name", [*CONFIGS, "constant"])
def test_13_no_run_of_skips_is_longer_than_the_cap(name, most):
    """With hidden states and embeddings that no longer change after a few steps."""
    flags = {"magcache": {"mag_K": most}}.get(name, {"cache_max_skips": most})
    manager = make("fbcache hidden_rel_l1" if name == "constant" else name, **flags, steps=40)
    if isinstance(manager.policy, TeaCache):
        manager.policy.polynomial = {}
    if name == "magcache":
        manager.policy.ratios = {"model": [1.0] * 40}
    stack, longest = Stack(), 0
    stack.embed = lambda timestep: dict.fromkeys(("embedding", "projection"), torch.ones(1, 8))
    with manager.run(contexts(40)):
        for ctx in contexts(40):
            h = hidden(0 if name == "constant" else min(ctx.step, 9), "cond")
            predict(manager, ctx, h, stack)
    longest = max(len(run) for run in decisions(manager).split("c"))
    assert longest == most
    if name not in PLANNED:
        assert any(one.reason == "cap" and not one.failsafe for one in manager.telemetry.decisions)


@pytest.mark.parametrize("boundary", [None, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
def test_14_the_counts_agree_with_those_of_the_blocks(models, name, boundary):
    called = Counter()
    names = {"high": 0, "low": 1}
    hooks = [
        block.register_forward_hook(lambda *_, key=(expert, index): called.update([key]))
        for expert, model in (models.items() if boundary else [("model", models["model"])])
        if expert in names or not boundary
        for index, block in enumerate(model.blocks)
    ]
    try:
        manager = make(name, steps=20)
        sample(models, manager, steps=20, boundary=boundary)
    finally:
        for hook in hooks:
            hook.remove()
    report = manager.telemetry.report()
    experts = ["high", "low"] if boundary else ["model"]
    assert list(report) == experts
    assert sum(report[expert]["cond"]["total"] for expert in experts) == 20
    for expert in experts:
        assert list(report[expert]) == ["cond", "uncond"]
        predictions = computed = 0
        for sums in report[expert].values():
            assert sums["computed"] + sums["skipped"] == sums["total"] == report[expert]["cond"]["total"]
            predictions, computed = predictions + sums["total"], computed + sums["computed"]
        assert 0 < computed < predictions
        calls = [called[expert, index] for index in range(2)]
        first = predictions if manager.policy.probe_blocks else computed
        assert calls == [first, computed]


# What each policy measures


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
    sample(models, managers[1], condition=Condition(frame=frame, num_latent_frames=3))
    one, two = ([one.metric for one in manager.telemetry.decisions] for manager in managers)
    assert one == two and decisions(managers[0]) == decisions(managers[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_two_timesteps_at_once(models, name):
    manager = make(name, **({"easy_thresh": 5} if name == "easycache" else {}))
    frame = random(1, 4, 1, 4, 8, seed=8)
    latents = sample(models, manager, condition=Condition(frame=frame, num_latent_frames=3))
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


def test_coinciding_steps_are_not_extrapolated():
    residuals = Residuals("first")
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
    assert found == {("wan/models/dit.py", "blocks"): 1, ("wan/denoise.py", "prediction"): 1}


# Flags


def test_fbcache_has_priority(models):
    options, warnings = check_options({"fbcache": True, "teacache": True, "teacache_thresh": 1e9}, STEPS)
    assert policy_of(options).name == "fbcache"
    assert warnings == ["--fbcache and --teacache: fbcache, which measures the change, decides alone"]
    manager = make_manager(options, {})
    sample(models, manager)
    assert {one.policy for one in manager.telemetry.decisions} == {"fbcache"}
    alone = make_manager(check_options({"fbcache": True}, STEPS)[0], {})
    sample(models, alone)
    assert decisions(manager) == decisions(alone)


def test_unknown_rescaling_is_linear_with_a_warning():
    options, warnings = check_options({"teacache": True, "teacache_policy": "cubic"}, 20)
    assert options["teacache_policy"] == "linear" and len(warnings) == 1
    assert "unknown --teacache_policy 'cubic'; linear is used" in warnings[0]


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_runs_of_few_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"--magcache harms a run of {steps} steps.*--cache_force"):
        check_options({"magcache": True}, steps)
    assert check_options({"magcache": True, "cache_force": True}, steps)[0]["magcache"]


def test_options_that_were_given_are_kept():
    """False is a value where the default is true; every option of the one policy has a value, no other has."""
    options, _ = check_options({"fbcache": True, "fb_cfg_sep_diff": False, "fb_thresh": 0, "teacache": False}, 20)
    assert options["fb_cfg_sep_diff"] is False and options["fb_thresh"] == 0
    assert set(options) == {
        "fbcache",
        *POLICIES["fbcache"].flags,
        *(name for name in OPTIONS if name.startswith("cache_")),
    }
    assert check_options({"teacache": None, "fbcache": False}, 20) == ({}, [])


WRONG = [
    ({"teacache_thresh": "0.1"}, "--teacache_thresh has no effect without --teacache"),
    ({"fbcache": True, "mag_K": 3}, "--mag_K has no effect without --magcache"),
    ({"cache_trace": "a"}, "--cache_trace has no effect without --fbcache or --teacache or"),
    ({"magcache": True, "cache_max_skips": 3}, "--cache_max_skips has no effect with --magcache"),
    ({"fbcache": True, "cache_coefficients": "a"}, "--cache_coefficients has no effect: fbcache, as it is set"),
    ({"teacache": True, "cache_coefficients": "a"}, "--cache_coefficients has no effect: teacache, as it is set"),
    ({"fbcache": True, "magcache": True}, "--fbcache and --magcache cannot go together; choose one"),
    ({"easycache": True, "teacache": True}, "cannot go together"),
    ({"teacache": True, "teacache_thresh": "much"}, "--teacache_thresh must be a number, not 'much'"),
    ({"teacache": True, "teacache_thresh": "nan"}, "--teacache_thresh must be a number, not nan"),
    ({"teacache": True, "teacache_thresh": math.inf}, "--teacache_thresh must be a number, not inf"),
    ({"teacache": True, "teacache_thresh": True}, "--teacache_thresh must be a number, not True"),
    ({"teacache": True, "teacache_warmup": -1}, "--teacache_warmup must be a whole number of at least 0, not -1"),
    ({"teacache": True, "teacache_warmup": 1.5}, "--teacache_warmup must be a whole number of at least 0, not 1.5"),
    ({"fbcache": True, "fb_downsample": "0"}, "--fb_downsample must be a whole number of at least 1, not 0"),
    ({"fbcache": True, "fb_ema": "1"}, "--fb_ema must be from 0 to below 1, not 1"),
    ({"fbcache": True, "fb_metric": "l3"}, "unknown --fb_metric 'l3'; choose one of: hidden_rel_l1, "),
    ({"fbcache": True, "fb_cfg_sep_diff": "maybe"}, "--fb_cfg_sep_diff must be true or false, not 'maybe'"),
    ({"fbcache": "no"}, "--fbcache must be true or false, not 'no'"),
    ({"magcache": True, "mag_retention": 1.1}, "--mag_retention must be from 0 to 1, not 1.1"),
    ({"magcache": True, "mag_K": 0}, "--mag_K must be a whole number of at least 1, not 0"),
    ({"magcache": True, "cache_predictor": "second"}, "unknown --cache_predictor 'second'; choose one of: zero, first"),
    ({"fbcache": True, "cache_max_skips": 10**400}, None),
]


@pytest.mark.parametrize("flags, message", WRONG)
def test_wrong_flags(flags, message):
    if message is None:
        assert check_options(flags, 20)
        return
    with pytest.raises(ValueError) as caught:
        check_options(flags, 20)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Coefficients


@pytest.mark.parametrize("model", ["wan2.2-t2v-A14B", None, "no-such-model"])
def test_coefficients_that_are_not_known(model):
    options, _ = check_options({"teacache": True, "teacache_policy": "polynomial"}, 40)
    with pytest.raises(ValueError) as caught:
        check_coefficients(options, model, ("high", "low"))
    message = str(caught.value)
    assert (
        f"no teacache embedding coefficients are known for expert high of {model or 'this model'}; measure" in message
    )
    assert "benchmarks.calibrate" in message and "\n" not in message


def test_coefficients_from_a_file(tmp_path):
    file = tmp_path / "c.json"
    ratios = {"high": [1.0, 0.9], "low": [1.0, 0.8]}
    write_coefficients(file, {"mine": {"magcache": {"ratios": ratios}}}, "a note")
    options, _ = check_options({"magcache": True, "cache_coefficients": str(file)}, 40)
    for model in ("mine", "another", None):  # a file of one model holds for any
        assert check_coefficients(options, model, ("high", "low"))["ratios"] == ratios
    with pytest.raises(ValueError, match="no magcache coefficients are known for another"):
        check_coefficients(options, "another", ("model",))
    two = {name: {"magcache": {"ratios": ratios}} for name in ("mine", "yours")}
    write_coefficients(file, two, "")
    with pytest.raises(ValueError, match="holds coefficients of mine, yours, not of another"):
        load_coefficients("another", file)
    write_coefficients(file, {}, "")
    with pytest.raises(ValueError, match="holds coefficients of no model"):
        load_coefficients("mine", file)
    assert [item.name for item in tmp_path.iterdir()] == ["c.json"]


def entry(**content):
    return json.dumps({"format": "cache-coefficients-1", "models": {"m": content}})


DAMAGED = [
    "",
    "[]",
    "null",
    "{",
    '{"format": "other", "models": {}}',
    '{"format": "cache-coefficients-1", "models": []}',
    '{"format": "cache-coefficients-1", "models": {"m": 3}}',
    entry(teacache=3),
    entry(teacache={"embedding": 3}),
    entry(teacache={"embedding": {}}),
    entry(teacache={"embedding": {"polynomial": {"model": []}}}),
    entry(teacache={"embedding": {"polynomial": {"model": ["1"]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": "12345"}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [math.nan]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [1]}, "range": {"model": [1]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [1]}, "range": {"model": [1, 2, 3]}}}),
    entry(magcache={}),
    entry(magcache={"ratios": [1, 2]}),
    entry(magcache={"ratios": {"model": [True]}}),
    entry(magcache={"ratios": {"model": [10**400]}}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_coefficients(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_coefficients(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "not a coefficients file" in str(caught.value) or "the coefficients of m are damaged" in str(caught.value)


def test_coefficients_that_are_no_text(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "c.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="not a coefficients file"):
            read_coefficients(path)


# Telemetry


def one_decision(**values):
    fields = dict(run=0, step=0, timestep=999.0, sigma=1.0, expert="model", branch="cond", policy="fbcache")
    fields |= dict(phase="main", metric=0.5, threshold=0.1, skipped=False, reason="above")
    return Decision(**fields | values)


def test_summary_of_one_network():
    telemetry = Telemetry()
    telemetry.decisions = [
        one_decision(seconds=2.0),
        one_decision(metric=0.25, skipped=True, seconds=0.5),
        one_decision(branch="uncond", metric=math.nan, failsafe=True, reason="metric not finite", seconds=2.0),
        one_decision(branch="uncond", metric=None, failsafe=True, reason="no reference"),
    ]
    assert telemetry.summary() == [
        "CacheManager[fbcache] summary: fbcache; cond 1 of 2 skipped, metric 0.3750 on average, 0.5000 at most,"
        " failsafes 0; uncond 0 of 2 skipped, failsafes metric not finite 1, no reference 1; 1.5 s saved"
    ]
    assert telemetry.report()["model"] == {
        "cond": {
            **{"total": 2, "skipped": 1, "computed": 1, "average_metric": 0.375, "largest_metric": 0.5},
            **{"failsafes": {}, "seconds_saved": 1.5},
        },
        "uncond": {
            **{"total": 2, "skipped": 0, "computed": 2, "average_metric": None, "largest_metric": None},
            **{"failsafes": {"metric not finite": 1, "no reference": 1}, "seconds_saved": 0.0},
        },
    }


def test_summary_of_two_experts(models):
    manager = make("teacache linear")
    sample(models, manager, boundary=0.8)
    lines = manager.telemetry.summary()
    assert [line.split(":")[0] for line in lines] == ["CacheManager[high] summary", "CacheManager[low] summary"]
    assert all("teacache; cond " in line and "; uncond " in line and line.endswith(" s saved") for line in lines)
    json.loads(json.dumps(manager.telemetry.report(), allow_nan=False))


def test_trace_is_written_whole_and_read_back(models, tmp_path):
    manager = make("teacache linear")
    sample(models, manager)
    assert manager.telemetry.decisions[0].metric == math.inf
    file = tmp_path / "trace.jsonl"
    manager.telemetry.write(file, {"task": "t"})
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON has no Infinity
    header, read = read_trace(file)
    assert header == {"task": "t"}
    expected = [replace(one, metric=None) if one.metric == math.inf else one for one in manager.telemetry.decisions]
    assert read == expected
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    before = file.read_bytes()
    manager.telemetry.decisions.append(one_decision(reason=object()))
    with pytest.raises(TypeError):
        manager.telemetry.write(file, {})
    assert file.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["trace.jsonl"]


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("text", ["", "{", "3\n4", '{}\n{"step": 1}', "{}\n[1]"])
def test_what_is_no_trace(tmp_path, text):
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError, match="not a cache trace"):
        read_trace(tmp_path / "t")


def test_seconds_are_measured(models):
    manager = make("teacache linear")
    sample(models, manager)
    assert all(one.seconds > 0 for one in manager.telemetry.decisions)
    assert manager.telemetry.report()["model"]["cond"]["seconds_saved"] > 0
    assert isinstance(manager.telemetry.decisions[0], Decision) and isinstance(contexts()[0], StepContext)


# The whole pipeline


def test_image_to_video_with_two_experts(tmp_path):
    """Published tables of both experts; the same latents with threshold 0 as without a cache."""
    picture = tmp_path / "first.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    spec = shrunk("i2v-A14B")
    write_checkpoint(tmp_path, spec)
    latents, pipe = {}, None
    for threshold in (None, 0, 0.2):
        flags = {} if threshold is None else {"magcache": True, "mag_thresh": threshold}
        request = build_request(
            {"task": "i2v-A14B", "ckpt_dir": str(tmp_path), "prompt": "a cat", "image": str(picture), "seed": 1}
            | {"size": "64x32", "frame_num": 5, "sample_steps": 20, "device": "cpu", "dtype": "fp32", **flags}
            | {"save_file": str(tmp_path / "a.mp4")}
        )
        pipe = WanPipeline.from_request(request, spec)
        latents[threshold] = pipe(request).latents
    assert torch.equal(latents[0], latents[None]) and not torch.equal(latents[0.2], latents[None])
    report = pipe.cache.telemetry.report()
    assert list(report) == ["high", "low"] and pipe.cache.kept_bytes() == 0
    ratios = load_coefficients("wan2.2-i2v-A14B")["magcache"]["ratios"]
    for expert, branches in report.items():
        mask = official_mask(nearest(ratios[expert], branches["cond"]["total"]), 0.2, 4, 0.2)
        for branch in ("cond", "uncond"):
            assert decisions(pipe.cache, branch, expert) == "".join("cS"[skip] for skip in mask)
            assert branches[branch]["skipped"] > 2
