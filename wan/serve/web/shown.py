"""Jobs as HTML: the one that is looked at, its result, all of them. URLs are relative, for a proxy may add to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from wan.serve.service import Service
from wan.serve.store import Job
from wan.serve.web.follow import Last
from wan.serve.web.form import in_words
from wan.serve.web.texts import TEXTS, text, time_text

_MOST_PROMPT = 300


def message(told: str, is_error: bool = False) -> str:
    if not told:
        return ""
    role, kind = ("alert", "error") if is_error else ("status", "note")
    return f'<div class="swan-message swan-{kind}" role="{role}">{escape(told)}</div>'


def empty(told: str) -> str:
    return f'<div class="swan-empty">{escape(told)}</div>'


def queue(service: Service, language: str) -> str:
    """What the server does."""
    state = service.workers.state
    counts = {"running": state["busy"], "queued": service.store.count("queued")}
    told = text("queue_state", language, **counts) if state["ready"] else text("starting", language)
    return f'<div class="swan-queue">{escape(told)}</div>'


def job(service: Service, job: Job, last: Last | None, language: str) -> str:
    """How far a job is, or how it ended. last: of one that is not over."""
    view = service.view(job)
    head = [f"<b>{text(state_of(job), language)}</b>", escape(job.model), escape(view["size"])]
    head.append(escape(text("frames_fps", language, frames=view["num_frames"], fps=view["fps"])))
    prompt = escape(str(view["prompt"] or "")[:_MOST_PROMPT])
    lines = [_how(service, job, view, last, language), *view["warnings"]]
    if job.error and state_of(job) == "failed":
        lines.append(view["error"]["message"])
    below = "".join(f'<div class="swan-line">{escape(in_words(line, language))}</div>' for line in lines if line)
    bar = "" if job.is_over else _bar(view["progress"], text(job.state, language))
    return (
        f'<div class="swan-job" data-id="{job.id}" data-state="{job.state}">'
        f'<div class="swan-head">{" · ".join(head)}</div><div class="swan-prompt">{prompt}</div>{bar}{below}</div>'
    )


def state_of(job: Job) -> str:
    """A key of TEXTS."""
    return "cancelled" if job.error and job.error["code"] == "cancelled" else job.state


def _bar(percent: int, name: str) -> str:
    return (
        f'<div class="swan-bar" role="progressbar" aria-label="{escape(name)}" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{percent}"><i style="width:{percent}%"></i><span>{percent} %</span></div>'
    )


def _how(service: Service, job: Job, view: Mapping[str, Any], last: Last | None, language: str) -> str:
    """Where it waits, what is done with it and for how long, how long it took."""
    if job.state == "queued":
        place = service.workers.position(job)
        told = text("queue_place", language, count=place) if place else text("queue_next", language)
        return f"{told} · {text('expected', language, time=time_text(view['expected_seconds'], language))}"
    if job.state == "in_progress":
        told = [text(f"stage_{stage}", language)] if f"stage_{(stage := view.get('stage'))}" in TEXTS else []
        if last and last.step and view.get("stage") == "denoise":
            told.append(text("step", language, done=last.step[0], total=last.step[1]))
        if view.get("seconds_left") is not None:
            told.append(text("left", language, time=time_text(view["seconds_left"], language)))
        return " · ".join(told)
    if job.state == "completed":
        return text("took", language, time=time_text(view["inference_time_s"], language))
    return ""


def preview(last: Last | None, language: str) -> str:
    if last is None or last.preview is None:
        return ""
    name = text("preview", language)
    picture = f'<img src="{escape(last.preview)}" alt="{name}">'
    return f'<figure class="swan-preview">{picture}<figcaption>{name}</figcaption></figure>'


def result(job: Job, options: Mapping[str, Any], language: str) -> str:
    """The video of a job that is done, how to keep it, and what it was made with."""
    if job.state != "completed":
        return ""
    url, name = f"v1/videos/{job.id}/content", f"{job.id}{job.file[job.file.rindex('.') :]}"
    if name.endswith(".png"):
        shown = f'<img class="swan-video" src="{url}" alt="">'
    else:
        shown = (
            f'<video class="swan-video" src="{url}" poster="{url}?variant=thumbnail" controls loop playsinline></video>'
        )
    rows = {"model": job.model, **options, "seed": job.facts["seed"]}
    table = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_plain(one))}</td></tr>" for key, one in rows.items())
    return (
        f'<div class="swan-result">{shown}'
        f'<a class="swan-download" href="{url}" download="{name}">{text("download", language)}</a>'
        f"<details><summary>{text('settings', language)}</summary><table>{table}</table></details></div>"
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def gallery(service: Service, jobs: Iterable[Job], chosen: str, language: str) -> str:
    tiles = [_tile(service, job, job.id == chosen, language) for job in jobs]
    if not tiles:
        return empty(text("gallery_empty", language))
    return f'<div class="swan-tiles">{"".join(tiles)}</div>'


def _tile(service: Service, job: Job, is_chosen: bool, language: str) -> str:
    state = text(state_of(job), language)
    if job.state == "completed":
        inside = f'<img src="v1/videos/{job.id}/content?variant=thumbnail" loading="lazy" alt="">'
    else:
        progress = service.workers.progress.get(job.id)
        inside = f"<span>{state}{f' {progress.percent} %' if progress else ''}</span>"
    prompt = escape(str(job.options.get("prompt") or "")[:_MOST_PROMPT])
    pressed = "true" if is_chosen else "false"
    return (
        f'<button type="button" class="swan-tile swan-{job.state}" data-id="{job.id}" aria-pressed="{pressed}"'
        f' title="{prompt}">{inside}<em>{prompt}</em></button>'
    )
