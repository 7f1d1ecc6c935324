"""A process with engines: makes one video at a time, says how far it is, can be told to stop between two steps.

It is told {"job", "options", "folder", "stem" (of the file there), "preview_every", "is_private"} and {"cancel": id};
"called" is as in `Request`, and with "pictures" there are some of the video beside it. It tells {"ready": what the
machine has}, {"job": id, "event": ...}, and at the end of each {"job": id, "done" | "failed" | "cancelled": ...}.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wan.distributed.launch import World
from wan.engine import Event
from wan.engines import Engines
from wan.errors import Cancelled, SwanError, UsageError, described
from wan.options import LoadOptions, Request, build_load, check_device
from wan.plan.machine import look_with_torch
from wan.serve.child import Inbox
from wan.serve.pictures import write_pictures

_TOLD_EACH_S = 0.05  # events of one stage; more often nobody looks


def main(inbox: Inbox) -> None:
    """Until the server ends. The first message is {"load": options, "processes": how many share this machine}.

    Of several processes that make each video together, as the environment says, each runs this.
    """
    first, world = inbox.next(), World.from_environment()
    load = build_load(first["load"], world.size)
    device = check_device(load.device)
    world.start("cuda" if device.startswith("cuda") else "cpu", load.dist_timeout, {"options": repr(load)})
    current: dict[str, threading.Event] = {}

    def heard(message: dict[str, Any]) -> None:
        if "job" in message:
            current[message["job"]] = threading.Event()
        elif stop := current.get(message.get("cancel")):
            stop.set()

    inbox.on_message = heard
    gc.collect()
    gc.freeze()  # what was imported stays: a pipeline that was cancelled collects what it had, and only that
    inbox.tell(
        {"ready": _machine(load, f"cuda:{world.local_rank}" if device == "cuda" else device, first["processes"])}
    )
    with Engines(world) as engines:
        while True:
            message = inbox.next()
            if "job" in message:
                stop = current[message["job"]]
                inbox.tell({"job": message["job"], **_make(engines, message, inbox, stop, world.rank)})
                del current[message["job"]]


def _machine(load: LoadOptions, device: str, processes: int) -> dict[str, Any]:
    """What may be planned with, before anything is loaded."""
    import torch

    request = Request(load, None)
    return asdict(look_with_torch(torch.device(device), request, processes, lambda machine: request))


def _make(engines: Engines, job: dict[str, Any], inbox: Inbox, stop: threading.Event, rank: int) -> dict[str, Any]:
    """The end of a job, as it is told."""
    tell = _Teller(job["job"], inbox)
    try:
        folder = Path(job["folder"])
        call = {"preview_every": job["preview_every"], "is_private": job["is_private"], "called": job.get("called")}
        path, report = engines.write(job["options"], folder / job["stem"], on_event=tell, cancel=stop, **call)
        if rank > 0:
            return {"done": ""}
        if job.get("pictures"):
            write_pictures(path, folder)
        return {"done": path.name, "report": report}
    except Cancelled:
        return {"cancelled": True}
    except SwanError as error:
        return _failed("invalid_request" if isinstance(error, UsageError) else "generation_failed", str(error))
    except Exception as error:  # of torch, most often: too little memory, a device that is gone
        with contextlib.suppress(SwanError):
            engines.release()
        return _failed("internal_error", described(error))


def _failed(code: str, message: str) -> dict[str, Any]:
    return {"failed": message, "code": code}


class _Teller:
    """Events of a job to messages."""

    def __init__(self, job: str, inbox: Inbox):
        self._job, self._inbox, self._stage, self._at = job, inbox, "", 0.0

    def __call__(self, event: Event) -> None:
        now, is_last = time.monotonic(), event.done == event.total
        if event.kind in ("stage", "step"):
            if event.stage == self._stage and not is_last and now - self._at < _TOLD_EACH_S:
                return
            self._stage, self._at = event.stage, now
            told = {"stage": event.stage, "done": event.done, "total": event.total, "seconds": event.seconds}
            told["left"] = event.left
        elif event.kind == "preview":
            told = {"done": event.done, "total": event.total, "image": _png(event.frames)}
        else:
            told = {"text": event.text}
        self._inbox.tell({"job": self._job, "event": event.kind, **told})


def _png(frames: Any) -> str:
    """The middle frame of uint8 [T, h, w, 3], as a data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frames[len(frames) // 2]).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
