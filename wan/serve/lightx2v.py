"""The routes of LightX2V's server for videos, /v1/tasks/..., over the same jobs.

Source: behaviour of lightx2v.server (routes, fields, states). Paths of the server's machine are neither taken nor told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from wan.serve.body import read_body
from wan.serve.fields import read_fields
from wan.serve.inputs import as_data_url
from wan.serve.refused import bad, without_paths
from wan.serve.store import STATES, Job

if TYPE_CHECKING:
    from wan.serve.service import Service

_SAME = {"infer_steps": "sample_steps", "target_video_length": "num_frames", "target_fps": "fps"}
_FILES = {"image", "last_frame", "audio", "src_video", "src_mask", "src_pose", "src_face", "src_bg"}
_NEUTRAL = {"task_id", "save_result_path", "task"}  # names that the client would like: ours are told in the answer
_OFF = {"use_prompt_enhancer": (False, "false"), "num_fragments": (1, "1")}  # taken with these values alone
_STATES = dict(zip(STATES, ("pending", "processing", "completed", "failed")))


def add_routes(app: FastAPI, service_of: Callable[[Request], Service]) -> None:
    @app.post("/v1/tasks/video/")
    @app.post("/v1/tasks/video")
    @app.post("/v1/tasks/video/form")
    async def submit(request: Request) -> Response:
        service = service_of(request)
        async with read_body(request) as body:
            wanted = read_fields(_translated(body), service.models, service.loras, needs_prompt=False)
            job = await service.accept(wanted)
        return JSONResponse({"task_id": job.id, "task_status": "pending", "save_result_path": f"{job.id}.mp4"})

    @app.get("/v1/tasks/")
    @app.get("/v1/tasks")
    async def list_all(request: Request) -> Response:
        jobs = service_of(request).store.page(None, 1000, "asc")
        return JSONResponse({job.id: _status(job) for job in jobs})

    @app.get("/v1/tasks/queue/status")
    async def queue(request: Request) -> Response:
        service = service_of(request)
        running, queued = list(service.workers.progress), service.store.count("queued")
        return JSONResponse(
            {
                "is_processing": bool(running),
                "current_task": running[0] if running else None,
                "pending_count": queued,
                "active_count": queued + len(running),
                "queue_size": service.settings.max_queue,
                "queue_available": max(0, service.settings.max_queue - queued),
            }
        )

    @app.get("/v1/tasks/{id}/status")
    async def status(request: Request, id: str) -> Response:
        return JSONResponse(_status(service_of(request).job(id)))

    @app.get("/v1/tasks/{id}/result")
    async def result(request: Request, id: str) -> Response:
        return service_of(request).content(id)

    @app.delete("/v1/tasks/all/running")
    async def stop_all(request: Request) -> Response:
        service = service_of(request)
        for id in service.store.ids("queued") + service.store.ids("in_progress"):
            service.cancel(id)
        return JSONResponse({"stop_status": "success", "reason": "All tasks stopped successfully."})

    @app.delete("/v1/tasks/{id}")
    async def stop(request: Request, id: str) -> Response:
        if service_of(request).cancel(id):
            return JSONResponse({"stop_status": "success", "reason": "Task stopped successfully."})
        return JSONResponse({"stop_status": "do_nothing", "reason": "Task already completed."})


def _translated(body: dict[str, Any]) -> dict[str, Any]:
    """Fields of a task as those of `fields.py`. Raises Refused."""
    told: dict[str, Any] = {}
    for name, value in body.items():
        if name in _NEUTRAL or value is None or value == "" or value == []:
            continue
        stem = name.removesuffix("_path").removesuffix("_file")
        if name in _OFF:
            if value not in _OFF[name]:
                raise bad(name, f"{name}: only {_OFF[name][0]} is done here")
        elif stem in _FILES and stem != name:
            told[stem] = as_data_url(value) if isinstance(value, str) else value
        elif name == "size" and isinstance(value, list):
            told["size"] = "x".join(map(str, value))
        else:
            told[_SAME.get(name, name)] = value
    return told


def _status(job: Job) -> dict[str, Any]:
    is_cancelled = job.error is not None and job.error["code"] == "cancelled"
    return {
        "task_id": job.id,
        "status": "cancelled" if is_cancelled else _STATES[job.state],
        "start_time": _time(job.created_at),
        "end_time": _time(job.completed_at),
        "error": job.error and without_paths(job.error["message"]),
        "save_result_path": job.file and f"{job.id}{job.file[job.file.rindex('.') :]}",
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
