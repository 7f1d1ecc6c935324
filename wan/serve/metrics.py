"""What Prometheus is told: counts and times of jobs, and what is queued and kept now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from wan.serve.store import Job

_SECONDS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)


class Metrics:
    """Of one server."""

    def __init__(self):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        of = {"registry": self._registry}
        self._accepted = Counter("swan_jobs_accepted", "Jobs that were accepted", ["model"], **of)
        self._refused = Counter("swan_requests_refused", "Requests that were refused", ["status"], **of)
        self._ended = Counter("swan_jobs_ended", "Jobs by how they ended", ["model", "outcome"], **of)
        self._waited = Histogram("swan_job_wait_seconds", "From acceptance to beginning", buckets=_SECONDS, **of)
        self._took = Histogram("swan_job_seconds", "From acceptance to completion", ["model"], buckets=_SECONDS, **of)
        self._deaths = Counter("swan_worker_deaths", "Workers that ended of themselves", **of)

    def gauges(self, now: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Values that are asked for when they are read: name -> (what it is, how it is told)."""
        for name, (what, told) in now.items():
            Gauge(name, what, registry=self._registry).set_function(told)

    def accepted(self, job: Job) -> None:
        self._accepted.labels(job.model).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def began(self, job: Job) -> None:
        self._waited.observe(max(0.0, time.time() - job.created_at))

    def cancelled(self, job: Job) -> None:
        self._ended.labels(job.model, "cancelled").inc()

    def ended(self, job: Job) -> None:
        self._ended.labels(job.model, job.state).inc()
        if job.state == "completed":
            self._took.labels(job.model).observe(job.completed_at - job.created_at)

    def died(self) -> None:
        self._deaths.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
