"""The jobs of a batch, made by workers in a Ray cluster. No torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from wan.batch.jobs import Job
from wan.errors import SwanError
from wan.remote.cluster import Place
from wan.remote.group import RemoteGroup
from wan.serve.child import Message
from wan.serve.group import DEAD, MOST_DEATHS

_MOST_STARTS = 3  # of a worker that ends before it is ready
_AGAIN_S, _END_S = 1.0, 5.0


class Left:
    """Jobs that wait, by what they load."""

    def __init__(self, jobs: Iterable[Job]):
        self._groups: dict[str, list[Job]] = {}
        for job in jobs:
            self._groups.setdefault(job.load, []).append(job)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, loaded: str | None, others: Sequence[str | None]) -> Job:
        """The next job for a worker that has `loaded` something: one that needs the same, else of those at which the
        fewest of the `others` are, and of these where the most are left."""
        load = loaded
        if load not in self._groups:
            load = min(self._groups, key=lambda one: (others.count(one), -len(self._groups[one])))
        job = self._groups[load].pop(0)
        if not self._groups[load]:
            del self._groups[load]
        return job

    def put_back(self, job: Job) -> None:
        self._groups.setdefault(job.load, []).insert(0, job)


@dataclass(eq=False)
class Worker:
    """group: None while it has ended; loaded: what its last job needed; starts: since it was last ready."""

    place: Place
    group: RemoteGroup | None = None
    is_ready: bool = False
    job: Job | None = None
    loaded: str | None = None
    starts: int = 0


@dataclass
class Pool:
    """Makes jobs into a folder. on_begin: is told of a job; on_event: of what happens to it, by its name; on_done: of
    its file and report; on_failed: of why not; say: a line for the user."""

    folder: Path
    places: Sequence[Place]
    on_begin: Callable[[Job], object]
    on_event: Callable[[str, Message], object]
    on_done: Callable[[Job, Path, dict[str, Any]], object]
    on_failed: Callable[[Job, str], object]
    say: Callable[[str], object]
    _calls: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _deaths: dict[str, int] = field(default_factory=dict)

    def make(self, jobs: Sequence[Job]) -> None:
        """All of them. Raises SwanError where no worker is left, or what one of the functions raises."""
        self._left, self._count = Left(jobs), len(jobs)
        self._device = {"device": "cpu"} if self.places[0].bundle.get("CPU") else {}
        self._workers = [Worker(place) for place in self.places[: len(jobs)]]
        try:
            for worker in self._workers:
                self._start(worker)
            while self._count:
                function, *values = self._calls.get()
                function(*values)
        finally:
            groups = [worker.group for worker in self._workers if worker.group is not None]
            for group in groups:
                group.kill()
            for group in groups:
                group.join(_END_S)

    def _start(self, worker: Worker) -> None:
        worker.starts += 1
        first = {"load": self._device}
        heard, ended = partial(self._heard, worker), partial(self._worker_ended, worker)
        worker.group = RemoteGroup(worker.place, first, lambda *call: self._calls.put(call), heard, ended)

    def _give_out(self) -> None:
        for worker in self._workers:
            if not self._left:
                return
            if worker.is_ready and worker.job is None:
                others = [one.loaded for one in self._workers if one is not worker]
                job = worker.job = self._left.take(worker.loaded, others)
                worker.loaded = job.load
                self.on_begin(job)
                about = {"options": dict(job.options), "folder": str(self.folder), "stem": job.name}
                worker.group.tell({"job": job.name, **about, "is_private": False, "preview_every": 0})

    def _heard(self, worker: Worker, message: Message) -> None:
        if "broken" in message:
            where = f"{message['machine']}: " if message.get("machine") else ""
            self._lose(worker, f"{where}{message['broken']}")
        elif "waits" in message:
            self.say(f"worker {worker.place.number} waits for room in the cluster")
        elif "ready" in message:
            worker.is_ready, worker.starts = True, 0
            self._give_out()
        elif "event" in message:
            self.on_event(message["job"], message)
        elif "job" in message:
            self._job_ended(worker, message)

    def _job_ended(self, worker: Worker, message: Message) -> None:
        job, worker.job = worker.job, None
        self._count -= 1
        if "done" in message:
            self.on_done(job, self.folder / message["done"], message["report"])
        else:
            where = f" (on {message['machine']})" if message.get("machine") else ""
            self.on_failed(job, f"{message['failed']}{where}")
        self._give_out()

    def _worker_ended(self, worker: Worker, code: int) -> None:
        job, worker.job, worker.group, worker.is_ready, worker.loaded = worker.job, None, None, False, None
        if worker not in self._workers:
            return
        if job is not None:
            self._deaths[job.name] = self._deaths.get(job.name, 0) + 1
            if self._deaths[job.name] >= MOST_DEATHS:
                self._count -= 1
                self.on_failed(job, DEAD)
            else:
                self.say(f"{job.name}: its worker has ended with status {code}; it is made again")
                self._left.put_back(job)
        if worker.starts >= _MOST_STARTS:
            self._lose(worker, f"it has ended {worker.starts} times before it was ready, with status {code} at last")
            return
        timer = threading.Timer(_AGAIN_S, self._calls.put, [(self._start, worker)])
        timer.daemon = True
        timer.start()
        self._give_out()

    def _lose(self, worker: Worker, why: str) -> None:
        """It will not be there for this batch."""
        self._workers.remove(worker)
        if not self._workers:
            raise SwanError(f"--ray: no worker is left: {why}")
        self.say(f"worker {worker.place.number} is not to be had: {why}")
