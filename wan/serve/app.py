"""The routes of OpenAI's Videos API, and what a server has beside: models, health, metrics, events.

Source: the types of the `openai` client.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from wan import __version__
from wan.errors import SwanError, UsageError
from wan.remote.cluster import Place
from wan.serve import lightx2v
from wan.serve.body import read_body
from wan.serve.fields import read_fields
from wan.serve.guard import Guard, Keys
from wan.serve.models import Loras, Model
from wan.serve.refused import Refused, bad
from wan.serve.service import Service, Settings
from wan.serve.store import Job, NotWritten, Store

if TYPE_CHECKING:
    from wan.serve.web.mount import Web

_MOST_LISTED, _USUALLY_LISTED = 100, 20
_BEAT_S = 15.0  # a line for those who watch, so that nothing between closes the connection


def make_app(
    settings: Settings,
    store: Store,
    models: Mapping[str, Model],
    loras: Loras,
    on_start: Callable[[], None],
    places: Sequence[Place] | None = None,
    web: Web | None = None,
) -> FastAPI:
    """on_start: is called once requests are heard; places: see `Workers`; web: the page, where there is one."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(settings, store, models, loras, places)
        service.start()
        async with web.life(service) if web else nullcontext():
            on_start()
            yield
        service.close()

    # Without pages that show it: they load scripts of others.
    app = FastAPI(title="Swan", version=__version__, lifespan=life, docs_url=None, redoc_url=None)

    def refused(status: int) -> None:
        app.state.service.metrics.refused(status)

    keys = Keys(settings.keys)
    if web:
        web.add_to(app, keys)
    app.add_middleware(
        Guard,
        keys=keys,
        origins=settings.origins,
        most_bytes=settings.max_upload_bytes,
        on_refused=refused,
        login=web and web.login,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["openai-poll-after-ms"],
        )
    if web:
        web.add_around(app)

    def failed(request: Request, error: Exception) -> JSONResponse:
        told = _as_refused(error)
        refused(told.status)
        return JSONResponse(told.body, told.status, told.headers)

    for kind in (Refused, HTTPException, SwanError, Exception):
        app.add_exception_handler(kind, failed)
    _add_videos(app)
    _add_others(app)
    lightx2v.add_routes(app, service_of)
    return app


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return Refused(error.status_code, str(error.detail))
    if isinstance(error, NotWritten):
        return Refused(503, "nothing can be kept now: the disk may be full", "not_written", retry_s=30)
    if isinstance(error, SwanError):
        return Refused(400 if isinstance(error, UsageError) else 500, str(error))
    return Refused(500, f"internal error: {type(error).__name__}")


def service_of(request: Request) -> Service:
    return request.app.state.service


def _shown(service: Service, job: Job) -> JSONResponse:
    after_ms = service.poll_after_ms(job)
    headers = {} if after_ms is None else {"openai-poll-after-ms": str(after_ms)}
    return JSONResponse(service.view(job) | service.place(job), headers=headers)


def _add_videos(app: FastAPI) -> None:
    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        service = service_of(request)
        async with read_body(request) as body:
            wanted = read_fields(body, service.models, service.loras)
            job = await service.accept(wanted, request.headers.get("idempotency-key"))
        return _shown(service, job)

    @app.get("/v1/videos")
    async def list_all(request: Request, after: str | None = None, limit: str = "", order: str = "desc") -> Response:
        service = service_of(request)
        if order not in ("asc", "desc"):
            raise bad("order", "order must be asc or desc")
        if limit and not (limit.isascii() and limit.isdigit() and len(limit) <= 7):
            raise bad("limit", f"limit must be a whole number up to {_MOST_LISTED}")
        count = min(int(limit or _USUALLY_LISTED), _MOST_LISTED)
        try:
            jobs = service.store.page(after, count + 1, order)
        except KeyError as error:
            raise bad("after", "after: there is no video of this id") from error
        data = [service.view(job) for job in jobs[:count]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(jobs) > count})

    @app.get("/v1/videos/{id}")
    async def retrieve(request: Request, id: str) -> Response:
        service = service_of(request)
        return _shown(service, service.job(id))

    @app.delete("/v1/videos/{id}")
    async def delete(request: Request, id: str) -> Response:
        service_of(request).delete(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{id}/remix")
    async def remix(request: Request, id: str) -> Response:
        service = service_of(request)
        async with read_body(request) as body:
            job = await service.remix(id, body.get("prompt"))
        return _shown(service, job)

    @app.get("/v1/videos/{id}/content")
    async def content(request: Request, id: str, variant: str = "video") -> Response:
        return service_of(request).content(id, variant)

    @app.get("/v1/videos/{id}/events")
    async def events(request: Request, id: str) -> Response:
        service = service_of(request)
        job = service.job(id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(service, job), media_type="text/event-stream", headers=headers)


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    """Server-sent: first what the job is now, then what happens, until it is over."""
    watched = service.workers.watch(job.id)
    following = asyncio.ensure_future(anext(watched))
    await asyncio.sleep(0)  # it listens from here on
    job = service.store.get(job.id)
    try:
        if job is None:
            return
        yield _event("status", service.view(job) | service.place(job))
        while not job.is_over:
            done, _ = await asyncio.wait([following], timeout=_BEAT_S)
            if not done:
                yield ": \n\n"
                continue
            message = following.result()
            yield _event(message["event"], message)
            if message["event"] in ("completed", "failed", "cancelled"):
                return
            following = asyncio.ensure_future(anext(watched))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await watched.aclose()


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({key: one for key, one in data.items() if key != 'event'})}\n\n"


def _add_others(app: FastAPI) -> None:
    begun = int(time.time())

    def model_of(model: Model) -> dict[str, Any]:
        return {"id": model.name, "object": "model", "created": begun, "owned_by": "swan", "task": model.task}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service = service_of(request)
        data = [model_of(model) for model in service.models.values()]
        return JSONResponse({"object": "list", "data": data, "loras": sorted(service.loras.names())})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        if name not in service_of(request).models:
            raise Refused(404, "there is no model of this name", "model_not_found", "model")
        return JSONResponse(model_of(service_of(request).models[name]))

    @app.get("/health")
    async def health(request: Request) -> Response:
        state = service_of(request).workers.state
        is_ready = state["ready"] > 0
        return JSONResponse({"status": "ok" if is_ready else "starting", **state}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
