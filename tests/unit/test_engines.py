"""Engines of several tasks in one process."""

import pytest

from wan.engines import Engines
from wan.plan import machine

QUICK = {"sample_steps": 1, "frame_num": 5, "seed": 1}


@pytest.fixture
def engines():
    with Engines() as made:
        yield made


def test_tasks_take_turns_and_their_models_stay(engines):
    first = engines.generate({"task": "t2v-tiny", **QUICK})
    engines.generate({"task": "i2v-tiny", **QUICK})
    again = engines.generate({"task": "t2v-tiny", **QUICK})
    assert first.report["sha256"] == again.report["sha256"]
    assert "load" not in again.report["seconds"] or again.report["seconds"]["load"] == 0
    assert [engine.held_bytes > 0 for _, engine in engines._engines] == [True, True]


def test_what_does_not_fit_beside_lets_the_others_go(engines, monkeypatch):
    engines.generate({"task": "i2v-tiny", **QUICK})
    plan = engines.plan({"task": "t2v-tiny", **QUICK})
    needed = max(one["ram"] for one in plan["memory_bytes"].values())
    monkeypatch.setattr(machine, "_ram_of_one", lambda ranks, models=0: int(needed * 1.03) + models)
    video = engines.generate({"task": "t2v-tiny", **QUICK})
    assert len(video.frames) == 5
