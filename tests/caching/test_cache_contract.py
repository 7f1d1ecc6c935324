"""What holds for every policy: the numbered tests of the caching rules (08 is in test_cache_ranks.py)."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wan.cache import NO_CACHE, CacheManager
from wan.cache.coefficients import load_coefficients
from wan.cache.options import PREDICTORS, check_coefficients, check_options, make_manager
from wan.cache.policies.teacache import TeaCache
from wan.cache.policy import Lifecycle, PlannedPolicy
from wan.cache.predictor import Residuals

from tests.caching.network import (
    FBCACHE,
    MEASURED,
    ON_BLOCKS,
    PLANNED,
    SHAPE,
    Scripted,
    Watch,
    official_mask,
    sample,
    skips,
    texts,
    tiny_model,
    way,
)
from tests.caching.toy import (
    CONFIGS,
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
from wan.denoise import denoise
from wan.solvers import make_solver

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


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

    def predict(latent, times, ctx):
        model = models["model"] if ctx.step < at else half
        return model(latent, times, [texts()[ctx.branch]], cache=manager, ctx=ctx)

    manager = make(name, **{THRESHOLDS[name.split()[0]]: 1e9}, **long_runs(name))
    denoise(predict, Scripted(way()), way()[0], guide_scale=3.0, cache=manager)
    assert decisions(manager, "cond")[at - 1 : at + 2] == "ScS"
    assert {one.reason for one in manager.telemetry.decisions if one.step == at} == {"type changed"}


def long_runs(name):
    return {"mag_K": 100} if name == "magcache" else {"cache_max_skips": 100}


@pytest.mark.parametrize("predictor", PREDICTORS)
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
        def predict(latent, times, ctx):
            return model(latent, times, [words[ctx.branch]], cache=manager, ctx=ctx)

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


@pytest.mark.parametrize("predictor", PREDICTORS)
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
