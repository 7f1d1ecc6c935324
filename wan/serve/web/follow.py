"""What happened last to jobs that are not over, for all pages that show them: followed once, however many there are."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from wan.serve.service import Service


@dataclass
class Last:
    """step: (done, total) of those of denoising; preview: a picture, as a data URL."""

    step: tuple[int, int] | None = None
    preview: str | None = None


class Follow:
    """Of one server; used by the thread of its event loop."""

    def __init__(self, service: Service):
        self._service = service
        self._last: dict[str, Last] = {}
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def last(self, id: str) -> Last:
        """Of a job that is not over, which is followed from now on."""
        if id not in self._tasks:
            for other in [one for one in self._tasks if (job := self._service.store.get(one)) is None or job.is_over]:
                self._tasks.pop(other).cancel()
            self._last[id] = Last()
            self._tasks[id] = asyncio.get_running_loop().create_task(self._follow(id))
            self._tasks[id].add_done_callback(lambda task: self._forget(id, task))
        return self._last[id]

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _forget(self, id: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(id, task) is task:
            self._tasks.pop(id, None)
            self._last.pop(id, None)

    async def _follow(self, id: str) -> None:
        last = self._last[id]
        async with aclosing(self._service.workers.watch(id)) as events:
            async for event in events:
                if event["event"] == "step":
                    last.step = event["done"], event["total"]
                elif event["event"] == "preview":
                    last.preview = event["image"]
                elif event["event"] in ("started", "queued"):  # anew
                    last.step = last.preview = None
