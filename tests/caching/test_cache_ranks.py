"""Ranks that share the tokens decide as one process does."""

from __future__ import annotations

import json

import pytest

from tests.caching.network import FBCACHE
from tests.caching.toy import CONFIGS, CUTS, GLITCH_CASES, GLITCH_STEP, GLITCHES, Stack, decisions, make, run_stack


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
