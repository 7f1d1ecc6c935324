"""Who is given work, without processes."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from wan.serve import workers  # noqa: E402


class Group:
    def __init__(self):
        self.told, self.is_killed = [], False

    def tell(self, message):
        self.told.append(message)

    def kill(self):
        self.is_killed = True


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_step_that_does_not_end_is_not_waited_for(monkeypatch, goes_on):
    monkeypatch.setattr(workers, "STOP_S", 0.01)

    async def cancelled():
        group = Group()
        all_of = workers.Workers(None, {}, None, 1, 1, lambda id: None, lambda line: None)
        all_of._workers = [workers.Worker(0, group, job=SimpleNamespace(id="a"))]
        all_of.cancel("a")
        if not goes_on:
            all_of._workers[0].job = SimpleNamespace(id="b")  # the next one
        await asyncio.sleep(0.1)
        return group

    group = asyncio.run(cancelled())
    assert group.told == [{"cancel": "a"}] and group.is_killed is goes_on
