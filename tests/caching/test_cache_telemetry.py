"""What a cache reports and writes down."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest
from wan.cache import StepContext
from wan.cache.telemetry import Decision, Telemetry, read_trace

from tests.caching.network import sample
from tests.caching.toy import contexts, make


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
