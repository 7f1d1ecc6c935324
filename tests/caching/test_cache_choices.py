"""--cache auto: what it takes, and what it refuses to guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wan.cache.choices import QUALITIES, TABLE
from wan.cache.options import check_coefficients, check_options

from wan.errors import UsageError
from wan.options import build_request
from wan.options.replay import replay_options
from wan.tasks import load_task, task_names

REPO = Path(__file__).resolve().parents[2]
ROWS = [
    pytest.param(model, row, id=f"{model} {row['steps']} {row['quality']}")
    for model, rows in json.loads(TABLE.read_text())["models"].items()
    for row in rows
]


@pytest.mark.parametrize("model, row", ROWS)
def test_every_row_can_be_run_and_keeps_its_word(model, row):
    where = {"model": model, "solver": row["solver"]}
    asked = {"cache": "auto", "cache_quality": row["quality"]}
    options, (note,) = check_options(asked, row["steps"], **where)
    assert options == check_options(row["options"], row["steps"])[0]  # as if its flags had been given
    check_coefficients(options, model, tuple(load_task(model).get("experts", ["model"])))
    assert note.startswith(f"--cache auto, {row['quality']}: --") and f"{row['compute']:.0%} of the compute" in note
    assert all(f"--{name}" in note for name in row["options"]) and row["psnr_db"] >= QUALITIES[row["quality"]]


@pytest.mark.parametrize("model, row", ROWS)
def test_every_row_was_measured(model, row):
    measured = json.loads((REPO / row["source"]).read_text())
    assert (measured["task"], measured["steps"], measured["solver"]) == (model, row["steps"], row["solver"])
    figures = {row["psnr_db"], row["compute"], *row["options"].values()} - {True, "polynomial"}
    assert any(figures <= {*one.values()} for one in measured["policies"]) and measured["clips"] == row["clips"]


def test_medium_is_the_default_and_costs_less():
    def chosen(**quality):
        return check_options({"cache": "auto", **quality}, 20, model="t2v-tiny", solver="unipc")[0]

    assert chosen() == chosen(cache_quality="medium") != chosen(cache_quality="high")
    assert chosen()["teacache_thresh"] > chosen(cache_quality="high")["teacache_thresh"]
    assert chosen(cache_device="cpu") == chosen() | {"cache_device": "cpu"}


@pytest.mark.parametrize("task", [name for name in task_names() if not name.endswith("-tiny")])
def test_released_models_are_refused(task):
    """Nobody has measured them here."""
    spec = load_task(task)
    model = spec.get("coefficients")
    with pytest.raises(ValueError) as caught:
        check_options({"cache": "auto"}, spec.sampling.steps, model=model, solver=spec.sampling.solver)
    message = str(caught.value)
    assert f"nobody has measured {model or 'this model'} at " in message and "\n" not in message
    assert "t2v-tiny, 20 steps of unipc" in message and "python -m wan.calibrate" in message


@pytest.mark.parametrize("steps, solver", [(21, "unipc"), (20, "euler"), (4, "unipc")])
def test_other_steps_and_solvers_are_refused(steps, solver):
    with pytest.raises(ValueError, match=f"nobody has measured t2v-tiny at {steps} steps of {solver}"):
        check_options({"cache": "auto"}, steps, model="t2v-tiny", solver=solver)


WRONG = [
    ({"cache": "on"}, "unknown --cache 'on'; choose one of: auto"),
    ({"cache": "auto", "cache_quality": "best"}, "unknown --cache_quality 'best'; choose one of: high, medium"),
    ({"cache_quality": "high"}, "--cache_quality has no effect without --cache auto"),
    ({"cache_quality": "high", "teacache": True}, "--cache_quality has no effect without --cache auto"),
    ({"cache": "auto", "fbcache": True}, "--fbcache has no effect with --cache auto, which chooses it"),
    ({"cache": "auto", "cache_predictor": "zero"}, "--cache_predictor has no effect with --cache auto"),
]


@pytest.mark.parametrize("flags, message", WRONG)
def test_what_does_not_go_together(flags, message):
    with pytest.raises(ValueError) as caught:
        check_options(flags, 20, model="t2v-tiny", solver="unipc")
    assert str(caught.value).startswith(message)


def test_a_request_takes_it_by_its_own_steps_and_solver():
    request = build_request({"cache": "auto"})
    assert request.sample.cache["teacache"] and any("--cache auto, medium" in line for line in request.warnings)
    stored = request.settings()
    assert "cache" not in stored and stored["teacache"] is True
    replayed = build_request(replay_options(stored, {"cache": "auto", "cache_quality": "high"}))
    assert replayed.sample.cache["teacache_thresh"] < request.sample.cache["teacache_thresh"]
    with pytest.raises(UsageError, match="nobody has measured t2v-tiny at 12 steps of unipc"):
        build_request({"cache": "auto", "sample_steps": 12})
