"""The cache's picture, calibration, benchmarks and scripts, at the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from wan.cache import StepContext, report
from wan.cache.coefficients import read_coefficients, write_coefficients
from wan.cache.options import PREDICTORS
from wan.cache.telemetry import Decision, Telemetry

from benchmarks import cache_overhead, cache_quality
from benchmarks.cache_cases import TASKS, tiny_cases
from benchmarks.judge import judge
from benchmarks.peers import DIT
from tools.tiny.world import render
from wan import calibrate
from wan.options import build_request
from wan.tasks import load_task, task_names

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = ["tests/test_teacache.sh", "tests/test_cache_smoke.sh", "benchmarks/bench_teacache.sh"]
EMBEDDED = [task for task in TASKS if task in task_names() and (REPO / load_task(task).checkpoint).is_dir()]
CALIBRATED = [task for task in EMBEDDED if "coefficients" in load_task(task)]


# The picture of a trace


def write_trace(path, experts=("high", "low"), scale=1.0):
    telemetry = Telemetry()
    for step in range(6):
        for branch in ("cond", "uncond"):
            expert, kind = experts[step * len(experts) // 6], ("skip", "above", "shape changed")[step % 3]
            metric = [0.05, float("inf"), None][step % 3]
            telemetry.decisions.append(
                Decision(0, step, 900.0 - step, 0.9, expert, branch, "fbcache", "main", metric and metric * scale, 0.1,
                         kind == "skip", kind, kind == "shape changed")
            )  # fmt: skip
    telemetry.write(path, {"task": "t2v-tiny", "seed": 1})
    return path


@pytest.mark.parametrize("experts", [("model",), ("high", "low")])
def test_report_draws_beside_the_trace(tmp_path, capsys, experts):
    assert report.main([str(write_trace(tmp_path / "a.jsonl", experts, scale=1e-4))]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a.png")]
    with Image.open(tmp_path / "a.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    wanted = {tuple(bytes.fromhex(report.COLORS[kind][1:])) for kind in ("skipped", "computed", "failsafe")}
    assert wanted <= colors


def test_report_of_a_run(tmp_path, capsys):
    from wan.cli import main

    files = ["--cache_trace", str(tmp_path / "a"), "--save_file", str(tmp_path / "a.mp4"), "--frame_num", "1"]
    assert main(["--quiet", "--seed", "1", "--sample_steps", "10", "--fbcache", *files]) == 0
    assert report.main([str(tmp_path / "a"), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "no JSON", "{}", "[]", '{"a": 1}\n{"b": 2}', "\xff"])
def test_report_refuses_what_is_no_trace(tmp_path, capsys, text):
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    assert report.main([str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a: not a cache trace" in error


def test_report_says_what_is_missing(tmp_path, capsys, monkeypatch):
    assert report.main([str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    trace = str(write_trace(tmp_path / "a"))
    assert report.main([trace, "--out", str(tmp_path / "none" / "b.png")]) == 1
    assert "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        report.main([])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([trace]) == 1
    assert capsys.readouterr().err == "error: a picture needs matplotlib: pip install matplotlib\n"


# Calibration


def test_recorder_compares_steps_within_an_expert():
    recorder, h = calibrate.Recorder(), torch.ones(1, 4, 8)
    residual = torch.randn(1, 4, 8)
    embed = lambda t: {"embedding": torch.full((1, 3), t), "projection": torch.full((1, 6, 3), 2 * t + 100)}  # noqa: E731
    steps = [StepContext(step, 4, 900.0 - 300 * step, 0.5, "high" if step < 2 else "low") for step in range(4)]
    with recorder.run(steps):
        for ctx in steps:
            for branch, sign in (("cond", 1), ("uncond", 7)):
                scale = sign * 0.8**ctx.step
                here = StepContext(ctx.step, 4, ctx.timestep, 0.5, ctx.expert, branch)
                out = recorder.blocks(here, h, lambda h, i, j, scale=scale: h + scale * residual, 2, embed)
                assert torch.equal(out, h + scale * residual)
    assert [(one.expert, one.step) for one in recorder.changes] == [("high", 1), ("low", 3)]
    for one, before in zip(recorder.changes, (900, 300)):
        assert (one.gamma, one.residual) == pytest.approx((0.8, 0.2), rel=1e-4)
        assert (one.embedding, one.projection) == pytest.approx((300 / before, 600 / (2 * before + 100)))


def test_fit_is_of_the_degree_that_the_points_carry():
    x = np.linspace(0.1, 0.4, 19)
    polynomial, (least, largest) = calibrate.fit(x, 3 * x**2 - x + 0.5)
    assert polynomial == pytest.approx([0, 0, 3, -1, 0.5], abs=1e-6)
    assert 0.099 < least < 0.1 and 0.4 < largest < 0.401
    assert [len(calibrate.fit(x[:count], x[:count])[0]) for count in (1, 2, 3, 5, 9)] == [1, 1, 2, 3, 5]


@pytest.mark.parametrize("task", EMBEDDED)
def test_calibration_is_accepted_by_requests(tmp_path, capsys, task):
    out = tmp_path / "c.json"
    write_coefficients(out, {"other": {}, "mine": {}}, "")
    flags = ["--task", task, "--runs", "2", "--steps", "8", "--frame_num", "5", "--offload_model", "false"]
    assert calibrate.main([*flags, "--name", "mine", "--out", str(out)]) == 0
    steps = sum(line.split()[0] in ("model", "high", "low") for line in capsys.readouterr().out.splitlines())
    models = read_coefficients(out)
    assert list(models) == ["other", "mine"]
    ratios = models["mine"]["magcache"]["ratios"]
    assert list(ratios) == (["high", "low"] if "experts" in load_task(task) else ["model"])
    assert all(one[0] == 1 for one in ratios.values()) and steps == 8 - len(ratios)
    write_coefficients(out, {"mine": models["mine"]}, "")
    common = {"task": task, "cache_coefficients": str(out), "save_file": str(tmp_path / "a.mp4")}
    assert build_request({**common, "magcache": True}).sample.coefficients["ratios"] == ratios
    for policy, signal in (("polynomial", "embedding"), ("polynomial_projection", "projection")):
        request = build_request({**common, "teacache": True, "teacache_policy": policy})
        assert request.sample.coefficients == models["mine"]["teacache"][signal]


@pytest.mark.parametrize("task", CALIBRATED)
def test_embedded_models_come_with_coefficients(tmp_path, task):
    for flags in ({"magcache": True}, *({"teacache": True, "teacache_policy": policy} for policy in
                                        ("polynomial", "polynomial_projection"))):  # fmt: skip
        assert build_request({"task": task, "save_file": str(tmp_path / "a.mp4"), **flags}).sample.coefficients


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--runs", "0"], "--runs must be at least 1, not 0"),
        (["--prompts", "none.txt"], "--prompts: cannot read none.txt"),
        (["--prompts", os.devnull], "--prompts: no prompt in"),
        (["--out", "none/c.json"], "--out: no folder"),
        (["--out", "setup.py"], "not a coefficients file"),
        (["--steps", "1"], "1 steps are too few: expert model runs in fewer than two of them"),
        (["--dit", "none.pth"], "--dit: no file none.pth"),
        (["--task", "none"], "unknown task 'none'"),
    ],
)
def test_calibration_refuses(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(REPO)
    assert calibrate.main(["--out", str(tmp_path / "c.json"), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and list(tmp_path.iterdir()) == []


# Quality


def test_cases_show_what_they_say(tmp_path):
    for task in TASKS:
        cases = tiny_cases(task, 3, 4, tmp_path)
        assert [case.options["seed"] for case in cases] == [3, 4, 5, 6]
        for case in cases:
            words = (case.clip.color, case.clip.shape, case.clip.direction, case.clip.background)
            frames = ((render(case.clip, 64, 64) + 1) * 127.5).byte().permute(1, 2, 3, 0).numpy()
            assert judge(frames) == words
            if "image" in case.options:
                with Image.open(case.options["image"]) as image:
                    assert np.abs(np.asarray(image).astype(int) - frames[0]).max() <= 1


def test_ssim():
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (2, 11, 11, 3), dtype=np.uint8)
    y = np.clip(x + random.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    weights = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = (np.outer(weights, weights) / weights.sum() ** 2)[..., None]
    expected = []
    for a, b in zip(x.astype(float), y.astype(float)):  # the window fits once
        mean_a, mean_b = (np.sum(weights * one, (0, 1)) for one in (a, b))
        var_a, var_b = (np.sum(weights * (one - m) ** 2, (0, 1)) for one, m in ((a, mean_a), (b, mean_b)))
        both = np.sum(weights * (a - mean_a) * (b - mean_b), (0, 1))
        part = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
        expected.append(part * (2 * both + 58.5225) / (var_a + var_b + 58.5225))
    assert cache_quality.ssim(x, y) == pytest.approx(np.mean(expected), abs=1e-4)
    assert cache_quality.ssim(x, x) == pytest.approx(1, abs=1e-6)


def test_margin_best_and_front():
    steps = [{"compute": compute, "psnr_db": psnr} for compute, psnr in ((0.25, 30), (0.5, 40), (0.95, 60))]
    rows = [{"compute": compute, "psnr_db": psnr} for compute, psnr in ((0.2, 31), (0.4, 39), (0.45, 38), (0.6, 50))]
    assert [cache_quality.margin(one, steps) for one in rows] == [None, 3, 0, 5.56]
    assert cache_quality.best_of(rows) is rows[1] and cache_quality.best_of(rows[3:]) is None
    assert cache_quality.pareto(rows[::-1]) == [rows[0], rows[1], rows[3]]


@pytest.mark.parametrize("task", CALIBRATED[:1])
def test_quality(tmp_path, monkeypatch, capsys, task):
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    few = (*cache_quality.SERIES["magcache K=4"][:2], (0.01, 0.24))
    monkeypatch.setitem(cache_quality.SERIES, "magcache K=4", few)
    flags = ["--task", task, "--prompts", "1", "--steps", "5", "--series", "magcache K=4", "--fewer", "1", "3"]
    assert cache_quality.main([*flags, "--out", str(out), "--picture", str(picture)]) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert text.splitlines()[-1].startswith("target ")
    assert [row["compute"] for row in result["fewer_steps"]] == [0.2, 0.6]
    assert result["uncached"]["psnr_db"] == 99 and result["uncached"]["ssim"] == 1
    rows = result["policies"]
    assert [(row["predictor"], row["threshold"]) for row in rows] == [
        (predictor, threshold)
        for predictor in PREDICTORS
        for threshold in (0.01, 0.24)
    ]  # fmt: skip
    assert rows[0]["compute"] > rows[1]["compute"] and rows[0]["psnr_db"] > rows[1]["psnr_db"]
    best = result["best_at_half_the_compute"]
    assert best["on_these_clips"] in rows and set(best["reaches_target"].values()) <= {True, False}
    with Image.open(picture) as image:
        assert image.width > 500


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--series", "none"], "--series: no series 'none'"),
        (["--out", "none/q.json"], "no folder"),
        (["--prompts", "0"], "invalid choice: 0"),
        (["--task", "t2v-14B"], "invalid choice: 't2v-14B'"),
    ],
)
def test_quality_refuses(capsys, flags, message):
    assert cache_quality.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# Overhead


def test_overhead():
    config = DIT | {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 32, "text_len": 16}
    result = cache_overhead.measure((2, 8, 8), "bf16", 2, config)
    assert result["tokens"] == 32
    assert result["whole_step_seconds"] == result["step_seconds"] + 28 * result["block_seconds"]
    assert [row["policy"] for row in result["policies"]] == list(cache_overhead.POLICIES)
    for row in result["policies"]:
        assert row["own_seconds"] > 0
        assert row["share_of_whole_step"] < row["share_of_step"]
    json.dumps(result)


# Scripts


def bash(*args, **env):
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(["bash", *args], cwd=REPO, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_refuse_in_one_line(tmp_path, script):
    assert bash("-n", script).returncode == 0
    for root, message in ((tmp_path / "none", "no folder"), (tmp_path, "no Wan2.2-I2V-A14B, ")):
        done = bash(script, str(root))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("gpus", ["0", "two"])
def test_a_wrong_number_of_gpus_is_refused(tmp_path, gpus):
    done = bash(SCRIPTS[0], str(tmp_path), gpus)
    assert (done.returncode, done.stderr) == (2, f"error: [gpus] must be a whole number from 1, not {gpus}\n")


def test_scripts_name_the_failure(tmp_path):
    (tmp_path / "Wan2.1-T2V-1.3B").mkdir()
    done = bash("tests/test_cache_smoke.sh", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: t2v-1.3B --sample_steps 10") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_on_the_embedded_models(script, quick_python):
    tasks = ("i2v-tiny", "s2v-tiny") if "smoke" in script else ("t2v-tiny",)
    done = bash(script, PYTHON=quick_python, TASKS=" ".join(tasks))
    assert done.returncode == 0, done.stderr
    assert all(task in done.stdout for task in tasks)
