"""The processes that make videos and the one that checks requests: started, given work, started again when they end.

All here is done by the thread of the server's event loop. Jobs are begun in the order in which they were accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from wan.errors import SwanError
from wan.remote.cluster import Place
from wan.remote.group import RemoteGroup
from wan.serve.child import Child, Message
from wan.serve.group import DEAD, MOST_DEATHS, Group
from wan.serve.metrics import Metrics
from wan.serve.models import Model
from wan.serve.refused import Refused, without_paths
from wan.serve.store import Job, NotWritten, Store
from wan.weights.in_turn import cores

CHECK_S = 60.0  # for one request; whatever takes longer is no honest file
START_S = 120.0  # until a request that waits for the first process is told to come again
WRITE_AGAIN_S = 5.0  # what the full disk did not take
STOP_S = 60.0  # for the step of a cancelled job; whatever takes longer is ended with its process
CLOSE_S = 5.0  # for processes that are killed to be gone
AGAIN_S, MOST_AGAIN_S = 0.5, 60.0  # before a process that has ended is started again, doubled each time
_SHARE = {"encode": (0, 5), "load": (5, 10), "denoise": (10, 90), "decode": (90, 99)}  # percent, of usual runs
_MOST_WAITING = 100  # events that a slow reader has not taken yet
DEAD_CHECK = "a file of this request cannot be checked: it ends, or holds up, the process that looks into it"


@dataclass
class Progress:
    """How far a job is. expected: seconds, by its plan; percent never falls; left: seconds, estimated."""

    expected: float
    percent: int = 0
    stage: str = ""
    begun: float = field(default_factory=time.monotonic)
    left: float | None = None

    def take(self, message: Message) -> None:
        if message["event"] not in ("stage", "step"):
            return
        self.stage = message["stage"]
        # A film is decoded clip by clip, in between.
        stage = "denoise" if self.stage == "decode" and message["total"] > 1 else self.stage
        first, last = _SHARE.get(stage, (self.percent, self.percent))
        percent = first + (last - first) * message["done"] // max(1, message["total"])
        self.percent = max(self.percent, percent)
        passed = time.monotonic() - self.begun
        self.left = max(message["left"] or 0.0, self.expected - passed)


@dataclass
class Worker:
    """A place of work. group: its processes, on this machine or another; None while there are none; machine: what may
    be planned with there, as they told; job: that they make; models: that they have made videos with."""

    number: int
    group: Group | RemoteGroup | None = None
    machine: Message | None = None
    is_ready: bool = False
    job: Job | None = None
    is_cancelled: bool = False
    models: set[str] = field(default_factory=set)
    failures: int = 0

    def tell(self, message: Message) -> None:
        if self.group is not None:
            self.group.tell(message)

    def kill(self) -> None:
        if self.group is not None:
            self.group.kill()


class Workers:
    """count: how many workers; None: as many as there are GPUs for; ranks: processes of each, which make a video
    together; places: for workers on other machines, in place of any here. on_free: is told the id of a job that was
    deleted, once nothing writes to its files any more."""

    def __init__(
        self,
        store: Store,
        models: Mapping[str, Model],
        metrics: Metrics,
        count: int | None,
        ranks: int,
        on_free: Callable[[str], None],
        say: Callable[[str], None],
        places: Sequence[Place] | None = None,
    ):
        self.store, self.models, self.metrics = store, models, metrics
        self._count, self._ranks, self._on_free, self._say = count, ranks, on_free, say
        self._places, self._gpus = places, 0
        self.progress: dict[str, Progress] = {}
        self._workers: list[Worker] = []
        self._checker: Child | None = None
        self._checker_failures = 0
        self._checking: tuple[int, asyncio.Future[Message]] | None = None
        self._numbers = itertools.count()
        self._check_turn = asyncio.Lock()
        # Requests can be checked once the checker is there, and a worker has told what there is to plan with.
        self._can_check, self._is_looking = asyncio.Event(), False
        self._watchers: dict[str, set[asyncio.Queue[Message]]] = {}
        self._is_closing = False

    def start(self) -> None:
        """The checker, which tells how many GPUs there are, and with it the workers, for which CPUs need not wait."""
        self._start_checker()
        if self._places is not None or all(one.options.get("device") == "cpu" for one in self.models.values()):
            self._start_workers(0)

    def close(self) -> None:
        """End all processes; what runs is queued again."""
        self._is_closing = True
        for worker in self._workers:
            if worker.job is not None:
                self.store.queue_again(worker.job.id)
            worker.kill()
        if self._checker is not None:
            self._checker.kill()
        for worker in self._workers:
            if worker.group is not None:
                worker.group.join(CLOSE_S)

    @property
    def state(self) -> dict[str, int]:
        """Workers that are ready, and at work."""
        return {
            "workers": len(self._workers),
            "ready": sum(worker.is_ready for worker in self._workers),
            "busy": sum(worker.job is not None for worker in self._workers),
        }

    # Jobs

    def give_out(self) -> None:
        """Jobs to all who are free."""
        while free := [one for one in self._workers if one.is_ready and one.job is None]:
            job = self.store.first_queued()
            if job is None:
                return
            try:
                options = self.models[job.model].merged(self.store.options(job))
            except (KeyError, SwanError):  # of a server that was started with others
                self._ended(self.store.fail(job.id, "model_not_found", f"there is no such model {job.model} any more"))
                continue
            worker = max(free, key=lambda one: job.model in one.models)
            try:
                self.store.start(job)
            except NotWritten as error:
                self._try_again(error, self.give_out)
                return
            worker.job, worker.is_cancelled = job, False
            worker.models.add(job.model)
            self.progress[job.id] = Progress(job.facts.get("expected_seconds", 0.0))
            self.metrics.began(job)
            folder = str(self.store.folder_of(job.id))
            message = {"job": job.id, "options": options, "folder": folder, "stem": "video", "is_private": True}
            worker.tell({**message, "preview_every": job.preview_every, "pictures": True})
            self._publish(job.id, {"event": "started"})
            self._say(f"{job.id} is made by {worker.group.name}")

    def cancel(self, id: str) -> None:
        """That nobody works on a job whose row is gone, or says that it is over. Its end is told by on_free, at once
        where nobody does."""
        self._publish(id, {"event": "cancelled"})
        worker = next((one for one in self._workers if one.job is not None and one.job.id == id), None)
        if worker is None:
            self._on_free(id)
        else:
            worker.is_cancelled = True
            if self._ranks > 1:  # they would have to agree on the step after which they stop: others are started
                worker.kill()
            else:
                worker.tell({"cancel": id})
                asyncio.get_running_loop().call_later(STOP_S, self._stop, worker, worker.job)

    def _stop(self, worker: Worker, job: Job) -> None:
        """End a worker that is still at the step in which its job was cancelled."""
        if worker.job is job and not self._is_closing:
            worker.kill()

    def position(self, job: Job) -> int:
        """How many are begun before it."""
        return self.store.count("queued", before=job.number)

    async def watch(self, id: str) -> AsyncIterator[Message]:
        """Events of a job, from now on, until it is over."""
        queue: asyncio.Queue[Message] = asyncio.Queue(_MOST_WAITING)
        self._watchers.setdefault(id, set()).add(queue)
        try:
            while True:
                message = await queue.get()
                yield message
                if message["event"] in ("completed", "failed", "cancelled"):
                    return
        finally:
            self._watchers[id].discard(queue)
            if not self._watchers[id]:
                del self._watchers[id]

    def _publish(self, id: str, message: Message) -> None:
        for queue in self._watchers.get(id, ()):
            if queue.full():  # a slow reader misses the oldest
                queue.get_nowait()
            queue.put_nowait(message)

    def _ended(self, job: Job | None) -> None:
        if job is None:
            return
        self.metrics.ended(job)
        self.progress.pop(job.id, None)
        told = {"code": job.error["code"], "message": without_paths(job.error["message"])} if job.error else {}
        self._publish(job.id, {"event": job.state, **told})
        took = f" in {(job.completed_at or 0) - job.created_at:.1f} s" if job.state == "completed" else ""
        why = f": {job.error['message']}" if job.error else ""
        self._say(f"{job.id} {job.state}{took}{why}")

    # Workers

    def _start_workers(self, gpus: int) -> None:
        count = len(self._places) if self._places is not None else self._count or max(1, gpus // self._ranks)
        self._gpus, self._workers = gpus, [Worker(number) for number in range(count)]
        for worker in self._workers:
            self._start_worker(worker)

    def _env(self, number: int) -> dict[str, str]:
        processes, gpus = len(self._workers) * self._ranks, self._gpus
        if gpus:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = [name.strip() for name in seen.split(",")] if seen else [str(at) for at in range(gpus)]
            own = [names[(number * self._ranks + rank) % len(names)] for rank in range(self._ranks)]
            return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(own))}
        if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            return {"OMP_NUM_THREADS": str(max(1, cores() // processes))}
        return {}

    def _start_worker(self, worker: Worker) -> None:
        if self._is_closing:
            return
        worker.models.clear()
        heard, ended = partial(self._heard, worker), partial(self._worker_ended, worker)
        first = {"load": next(iter(self.models.values())).load, "processes": len(self._workers) * self._ranks}
        if self._places is None:
            worker.group = Group(self._ranks, self._env(worker.number), first, heard, ended)
        else:
            worker.group = RemoteGroup(self._places[worker.number], first, _in_this_loop(), heard, ended)

    def _heard(self, worker: Worker, message: Message) -> None:
        if "broken" in message:
            where = f" on {message['machine']}" if message.get("machine") else ""
            self._say(f"error: worker {worker.number}{where}: {message['broken']}")
        elif "waits" in message:
            self._say(f"worker {worker.number} waits for room in the cluster")
        elif "ready" in message:
            worker.is_ready, worker.machine = True, message["ready"]
            self._say(f"worker {worker.number} is ready ({worker.group.name})")
            self._open_checks()
            self.give_out()
        elif "event" in message:
            self._progressed(message)
        elif "job" in message:
            self._job_ended(worker, message)

    def _progressed(self, message: Message) -> None:
        id = message.pop("job")
        if (progress := self.progress.get(id)) is None:
            return
        progress.take(message)
        self._publish(id, message | {"progress": progress.percent})

    def _job_ended(self, worker: Worker, message: Message) -> None:
        id, was_cancelled = message["job"], worker.is_cancelled
        if worker.job is None or worker.job.id != id:  # another process of it has told
            return
        worker.job, worker.failures = None, 0
        if "failed" in message and self._ranks > 1:  # the others may wait for what never comes
            worker.is_ready = False
            worker.kill()
        if was_cancelled:
            self.progress.pop(id, None)
            self._on_free(id)
        elif "done" in message:
            self._save(lambda: self.store.finish(id, message["done"], message["report"]))
        else:
            code = message.get("code", "generation_failed")
            self._save(lambda: self.store.fail(id, code, message.get("failed", "cancelled")))
        self.give_out()

    def _save(self, change: Callable[[], Job | None]) -> None:
        """Write what became of a job, now or as soon as it can be written; a job that is over by that has ended."""
        if self._is_closing:
            return
        try:
            job = change()
        except NotWritten as error:
            self._try_again(error, lambda: self._save(change))
            return
        self._ended(job)
        self.give_out()

    def _try_again(self, error: NotWritten, work: Callable[[], None]) -> None:
        self._say(f"error: {error}; it is tried again")
        asyncio.get_running_loop().call_later(WRITE_AGAIN_S, lambda: self._is_closing or work())

    def _worker_ended(self, worker: Worker, code: int) -> None:
        """Its job is tried again, unless it has ended several workers."""
        if self._is_closing:
            return
        job, worker.job, worker.group, worker.is_ready = worker.job, None, None, False
        if job is None or not worker.is_cancelled:
            worker.failures += 1
            self.metrics.died()
            self._say(f"worker {worker.number} has ended with status {code}; it is started again")
        if job is not None and worker.is_cancelled:
            self.progress.pop(job.id, None)
            self._on_free(job.id)
        elif job is not None:
            died = code != -signal.SIGTERM  # else somebody has ended it, who most likely ends the server too
            self.progress.pop(job.id, None)
            if died and job.deaths + 1 >= MOST_DEATHS:
                self._save(lambda: self.store.fail(job.id, "worker_died", DEAD))
            else:
                self._save(lambda: self.store.queue_again(job.id, died))
                self._publish(job.id, {"event": "queued"})
        self._later(worker.failures, lambda: self._start_worker(worker))

    def _later(self, failures: int, start: Callable[[], None]) -> None:
        wait = min(AGAIN_S * 2 ** max(0, failures - 1), MOST_AGAIN_S)
        asyncio.get_running_loop().call_later(wait, start)

    # Checks

    async def check(self, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a video of these options, files among them, will be. Raises Refused, which says what is wrong."""
        async with self._check_turn:  # one at a time: so it is known which one ends the process
            try:
                await asyncio.wait_for(self._can_check.wait(), START_S)
            except asyncio.TimeoutError as error:
                raise Refused(503, "the server is not ready yet", "not_ready", retry_s=10) from error
            number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
            self._checking = (number, answer)
            message = {"check": number, "options": model.merged(options), "machine": self._machine()}
            message["ranks"] = self._ranks
            self._checker.tell(message)
            try:
                told = await asyncio.wait_for(answer, CHECK_S)
            except asyncio.TimeoutError as error:
                self._checker.kill()
                raise Refused(400, DEAD_CHECK, "invalid_file") from error
            finally:
                self._checking = None
        if "refused" in told:
            raise Refused(400, told["refused"], "invalid_value")
        return told["facts"]

    def _machine(self) -> Message | None:
        """The smallest one that a worker told of, for any of them may get the job."""
        told = [worker.machine for worker in self._workers if worker.machine is not None]
        return min(told, key=lambda one: (one["vram_bytes"] or 0, one["ram_bytes"]), default=None)

    def _open_checks(self) -> None:
        if self._is_looking and self._machine() is not None:
            self._can_check.set()

    def _start_checker(self) -> None:
        if not self._is_closing:
            self._checker = Child("wan.serve.checker", {}, self._checked, self._checker_ended)

    def _checked(self, message: Message) -> None:
        if "ready" in message:
            self._is_looking = True
            if not self._workers:
                self._start_workers(message["ready"])
            self._open_checks()
        elif self._checking is not None and self._checking[0] == message["check"]:
            self._checker_failures = 0
            with contextlib.suppress(asyncio.InvalidStateError):
                self._checking[1].set_result(message)

    def _checker_ended(self, code: int) -> None:
        if self._is_closing:
            return
        self._checker, self._checker_failures = None, self._checker_failures + 1
        self._is_looking = False
        self._can_check.clear()
        self._say(f"the checker has ended with status {code}; it is started again")
        if self._checking is not None and not self._checking[1].done():
            self._checking[1].set_result({"refused": DEAD_CHECK})
        self._later(self._checker_failures, self._start_checker)


def _in_this_loop() -> Callable[..., None]:
    """Calls a function from any thread in this one."""
    loop = asyncio.get_running_loop()

    def call(function: Callable[..., object], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(function, *values)

    return call


def say(text: str) -> None:
    """A line of the server's log."""
    print(text, file=sys.stderr, flush=True)
