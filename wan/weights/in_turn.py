"""Jobs that threads do ahead of whoever takes their results: how weights are read and written."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
AHEAD_BYTES = 64 << 20
_SMALL_BYTES = 64 << 10  # less is done sooner than given to a thread


def in_turn(
    jobs: Iterable[tuple[int, Callable[[], T]]],
    threads: int,
    limit_bytes: int | None = None,
    start: Callable[[], None] | None = None,
) -> Iterator[T]:
    """The results of (bytes it holds, job), in the order of the jobs.

    All that runs or waits to be taken holds no more than `limit_bytes` (None: AHEAD_BYTES); a job of more is alone.
    start: called by each thread first. What a job raises is raised in its turn. Then, or where nobody takes more, no
    further job is begun, and those that run have ended when this has.
    """
    limit_bytes = AHEAD_BYTES if limit_bytes is None else limit_bytes
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="in turn", initializer=start) as pool:
        try:
            for size, job in jobs:
                while waiting and (held + size > limit_bytes or waiting[0][1].done()):
                    held -= waiting[0][0]
                    yield waiting.popleft()[1].result()  # held by nobody here when the next is begun
                waiting.append((size, _done(job) if 0 < size < _SMALL_BYTES and not start else pool.submit(job)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()


def _done(job: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
