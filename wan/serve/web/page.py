"""The components of the page and what happens when they are used. Its handlers run in the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from wan.errors import SwanError
from wan.options import FLAGS
from wan.serve.fields import EXTEND, read_fields
from wan.serve.models import Model
from wan.serve.refused import Refused, bad, without_paths
from wan.serve.service import Service
from wan.serve.store import Job
from wan.serve.web import form, shown
from wan.serve.web.follow import Follow
from wan.serve.web.texts import LANGUAGES, help_of, language_of, text
from wan.serve.web.uploads import Uploads

_HERE = Path(__file__).parent
_TICK_S, _IDLE_S = 1.0, 3.0  # from look to look, while the job that is shown is made, and else
_PAGE, _MOST_SHOWN = 24, 2400  # of the gallery
_MOST_TABS = 200  # whose looks are kept in memory, a megabyte each; others are sent all again
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "PingFang SC", "Microsoft YaHei")
_SYSTEM_FONTS += ("Noto Sans CJK SC", "sans-serif")
_PICTURES_ALONE = {"image", "last_frame", "src_ref"}
_LINES = {"prompt": 3, "negative_prompt": 2, "prompts": 3, "others": 4}
# Values are taken as browsers send them, see `events`: files are those of the upload folder, see `mount`.
_QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private", "preprocess": False}

Props = Callable[["_At"], dict[str, Any]]


@dataclass(frozen=True)
class _Kept:
    """What a browser remembers. language: that was chosen, "": none; count: of the gallery."""

    language: str = ""
    job: str = ""
    count: int = _PAGE

    @classmethod
    def of(cls, kept: Any) -> _Kept:
        """Of what a browser says that it is."""
        told = kept if isinstance(kept, dict) else {}
        language, job, count = told.get("language"), told.get("job"), told.get("count")
        is_count = isinstance(count, int) and _PAGE <= count <= _MOST_SHOWN
        language = language if language in [*LANGUAGES] else ""
        return cls(language, job if isinstance(job, str) else "", count if is_count else _PAGE)


class _At:
    """What the looks of the page depend on."""

    def __init__(self, page: Page, language: str, model: str, preset: str | None, cache: str | None):
        self.language = language if language in LANGUAGES else "en"
        self.model = page.model(model)
        self.cache = cache or ""
        self.usual = form.usual(self.model, preset or "")

    def text(self, key: str, **values: Any) -> str:
        return text(key, self.language, **values)


class Page:
    """blocks: gradio's; look: what it is mounted with."""

    def __init__(self, service: Service, uploads: Uploads):
        self._service, self._uploads, self._follow = service, uploads, Follow(service)
        self._labelled: list[tuple[gr.blocks.Block, Props]] = []
        self._fields: dict[str, gr.components.Component] = {}
        self._first = self._at("en", next(iter(service.models)), None, None)
        with gr.Blocks(title="Swan", analytics_enabled=False) as self.blocks:
            self._build()
            self._listen()
        self.blocks.state_session_capacity = _MOST_TABS
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=_SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")
        )
        theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
        css = (_HERE / "page.css").read_text(encoding="utf-8")
        self.look = {"theme": theme, "css": css, "footer_links": []}

    def close(self) -> None:
        self._follow.close()

    def model(self, name: str) -> Model:
        models = self._service.models
        return models.get(name) or next(iter(models.values()))

    def _at(self, language: str, model: str, preset: str | None, cache: str | None) -> _At:
        return _At(self, language, model, preset, cache)

    # Components

    def _made(self, component: Callable[..., Any], props: Props, **more: Any) -> Any:
        """A component whose looks depend on language and model."""
        made = component(**{**more, **props(self._first)})
        self._labelled.append((made, props))
        return made

    def _build(self) -> None:
        with gr.Row(elem_classes="swan-top"):
            self._made(gr.HTML, lambda at: {"value": f'<h1 class="swan-title">{escape(at.text("title"))}</h1>'})
            if self._service.settings.keys:
                self._made(gr.HTML, lambda at: {"value": _log_out(at)}, elem_classes="swan-small")
            choices = [(name, value) for value, name in LANGUAGES.items()]
            self._language = gr.Radio(
                choices,
                value="en",
                show_label=False,
                container=False,
                elem_id="swan-language",
                elem_classes="swan-small",
            )
        with gr.Row(elem_classes="swan-main"):
            with gr.Column(elem_classes="swan-ask"):
                self._build_question()
            with gr.Column(elem_classes="swan-jobs"):
                self._build_job()
                self._build_gallery()
            with gr.Column(elem_classes="swan-form"):
                self._build_form()

    def _build_question(self) -> None:
        names = list(self._service.models)
        self._model = self._made(
            gr.Dropdown, lambda at: {"label": at.text("model")}, choices=names, value=names[0], elem_id="swan-model"
        )
        for name in form.PARTS["top"]:
            self._field(name)
        look = {"variant": "primary", "elem_id": "swan-run"}
        self._run = self._made(gr.Button, lambda at: {"value": at.text("generate")}, **look)
        self._message = gr.HTML(elem_id="swan-message")

    def _build_form(self) -> None:
        """What is below the question, part by part."""
        needs_files = any(model.kind.needed for model in self._service.models.values())
        for part, fields in form.PARTS.items():
            if part == "top" or (part == "loras" and not self._service.loras.names()):
                continue

            def props(at: _At, part: str = part, fields: tuple[str, ...] = fields) -> dict[str, Any]:
                return {"label": at.text(part), "visible": any(form.has(at.model, name, at.cache) for name in fields)}

            is_open = part == "shape" or (part == "inputs" and needs_files)
            with self._made(gr.Accordion, props, open=is_open, elem_id=f"swan-{part}"):
                if part in ("inputs", "others"):
                    for name in fields:
                        self._field(name)
                else:
                    self._build_rows(fields, 3 if part == "loras" else 2)
                if part == "others":
                    self._made(gr.HTML, lambda at: {"value": _option_list(at)})

    def _build_rows(self, fields: Sequence[str], columns: int) -> None:
        for start in range(0, len(fields), columns):
            with gr.Row():
                for name in fields[start : start + columns]:
                    self._field(name)

    def _field(self, name: str) -> None:
        def props(at: _At) -> dict[str, Any]:
            label, info = form.named(name, at.language)
            found = {"label": label, "visible": form.has(at.model, name, at.cache)}
            if name in form.FILES:
                return found
            found |= {"info": info or None}
            if offered := form.choices(name, at.model, self._service.loras, at.usual, at.language):
                return found | {"choices": offered}
            if form.is_switch(name):
                return found
            usual = "1" if name.startswith("lora_strength") else at.usual.get(name, "")
            return found | {"placeholder": at.text("random") if name == "seed" else usual}

        kind, shape = _kind(name, "choices" in props(self._first))
        self._fields[name] = self._made(kind, props, **{"min_width": 120, **shape}, elem_id=f"swan-{name}")

    def _build_job(self) -> None:
        self._queue, self._job = (gr.HTML(elem_id=f"swan-{name}") for name in ("queue", "job"))
        with gr.Row(elem_classes="swan-buttons"):
            self._cancel, self._again, self._delete = map(self._button, ("cancel", "again", "delete"))
        self._preview, self._result = (gr.HTML(elem_id=f"swan-{name}") for name in ("preview", "result"))

    def _button(self, name: str) -> gr.Button:
        """One that is there with a job."""
        look = {"size": "sm", "min_width": 110, "variant": "stop" if name == "cancel" else "secondary"}
        props = lambda at: {"value": at.text(name)}  # noqa: E731
        return self._made(gr.Button, props, visible=False, elem_id=f"swan-{name}", **look)

    def _build_gallery(self) -> None:
        self._made(gr.HTML, lambda at: {"value": f'<h2 class="swan-title">{at.text("gallery")}</h2>'})
        self._gallery = gr.HTML(js_on_load=(_HERE / "page.js").read_text(encoding="utf-8"), elem_id="swan-gallery")
        self._more = self._button("more")

    # Events

    def _listen(self) -> None:
        # What a browser remembers, also when the server has been started again: which job it shows, and how many.
        self._kept = gr.BrowserState(_Kept().__dict__, storage_key="swan", secret="swan")
        self._seen = gr.State({})
        looks = [self._language, self._model, self._fields["preset"], self._fields["cache_choice"]]
        labelled = [one for one, _ in self._labelled]
        view = [self._kept, self._language, self._seen]
        parts = [self._queue, self._job, self._preview, self._result, self._gallery]
        timer = gr.Timer(_TICK_S)
        parts += [self._cancel, self._again, self._delete, self._more, timer, self._seen]
        job = self._of_job = [self._message, self._kept, *parts]
        fields = list(self._fields.values())

        self.blocks.load(self._loaded, [self._kept, *looks], [self._language, *labelled, *job], **_QUIET)
        self._language.input(self._translated, [self._kept, *looks], [*labelled, *job], **_QUIET)
        for one in looks[1:]:
            one.change(self._labels, looks, labelled, **_QUIET)
        timer.tick(self._parts, view, parts, **_QUIET)
        self._gallery.select(self._choose, view, job, **_QUIET)
        self._more.click(self._older, view, job, **_QUIET)
        for button in (self._cancel, self._delete):
            button.click(self._ended, view, job, **_QUIET)
        self._again.click(self._settings, [self._kept, self._language], [self._message, self._model, *fields], **_QUIET)
        how = _QUIET | {"show_progress": "minimal", "show_progress_on": self._message}
        self._run.click(self._generate, [self._language, self._model, *fields], job, **how)

    async def _loaded(
        self, kept: Any, language: str, model: str, preset: Any, cache: Any, request: gr.Request
    ) -> list[Any]:
        told = _Kept.of(kept)
        language = told.language or language_of(request.headers.get("accept-language", ""))
        id = told.job
        if self._service.store.get(id) is None:
            id = next(iter(self._service.store.ids("in_progress")), "")
        labels = await self._labels(language, model, preset, cache)
        return [language, *labels, *await self._shown("", _Kept(told.language, id), language, {})]

    async def _translated(self, kept: Any, language: str, model: str, preset: Any, cache: Any) -> list[Any]:
        labels = await self._labels(language, model, preset, cache)
        return [*labels, *await self._shown("", replace(_Kept.of(kept), language=language), language, {})]

    async def _labels(self, language: str, model: str, preset: Any, cache: Any) -> list[Any]:
        """What all components are called, and which there are."""
        at = self._at(language, model, preset, cache)
        return [gr.update(**props(at)) for _, props in self._labelled]

    async def _parts(self, kept: Any, language: str, seen: Mapping[str, Any]) -> list[Any]:
        """Queue, job, preview, result, gallery and buttons, as they are now: those that have changed since `seen`."""
        service, kept = self._service, _Kept.of(kept)
        job = service.store.get(kept.job) if kept.job else None
        jobs = service.store.page(None, kept.count + 1, "desc")
        now: dict[str, Any] = {"queue": shown.queue(service, language)}
        if job is None:
            now["job"] = shown.empty(text("gone" if kept.job else "no_job", language))
            now |= {"preview": "", "result": ""}
        else:
            last = None if job.is_over else self._follow.last(job.id)
            now |= {"job": shown.job(service, job, last, language), "preview": shown.preview(last, language)}
            now["result"] = shown.result(job, form.told(job, service.loras), language)
        now["gallery"] = shown.gallery(service, jobs[: kept.count], kept.job, language)
        is_over = job is not None and job.is_over
        visible = {"cancel": job is not None and not is_over, "again": job is not None, "delete": is_over}
        visible["more"] = len(jobs) > kept.count
        now |= {name: gr.update(visible=one) for name, one in visible.items()}
        now["timer"] = _TICK_S if visible["cancel"] else _IDLE_S
        return [*(gr.skip() if seen.get(name) == value else value for name, value in now.items()), now]

    async def _shown(self, told: str, kept: _Kept, language: str, seen: Mapping[str, Any]) -> list[Any]:
        return [told, kept.__dict__, *await self._parts(kept.__dict__, language, seen)]

    async def _choose(self, kept: Any, language: str, seen: Any, event: gr.EventData) -> list[Any]:
        return await self._shown("", replace(_Kept.of(kept), job=event._data["id"]), language, seen)

    async def _older(self, kept: Any, language: str, seen: Any) -> list[Any]:
        told = _Kept.of(kept)
        return await self._shown("", replace(told, count=told.count + _PAGE), language, seen)

    async def _ended(self, kept: Any, language: str, seen: Any) -> list[Any]:
        """A job that is waited for is cancelled, another is deleted: it is gone."""
        told = _Kept.of(kept)
        try:
            is_over = self._service.job(told.job).is_over
            self._service.delete(told.job)
        except (Refused, SwanError) as error:
            return await self._shown(shown.message(without_paths(str(error)), is_error=True), told, language, seen)
        done = shown.message(text("deleted" if is_over else "cancelled", language))
        return await self._shown(done, replace(told, job=""), language, seen)

    async def _settings(self, kept: Any, language: str) -> list[Any]:
        """The form, filled in as it was for a job."""
        job = self._service.store.get(_Kept.of(kept).job)
        model = self._service.models.get(job.model) if job is not None else None
        if model is None:
            told = text("gone", language) if job is None else text("model_gone", language, model=job.model)
            return [shown.message(told, is_error=True), *[gr.skip() for _ in (model, *self._fields)]]
        files = await asyncio.to_thread(self._sent_again, job)
        values = form.values_of(job, model, self._service.loras) | files
        told = shown.message(text("taken_over", language))
        return [told, model.name, *[values[name] for name in self._fields]]

    def _sent_again(self, job: Job) -> dict[str, Any]:
        """Its files, as if they came from this browser."""
        inputs = self._service.store.folder_of(job.id) / "inputs"
        add = lambda one: [add(part) for part in one] if isinstance(one, list) else self._uploads.add(inputs / one)  # noqa: E731
        return {flag: add(names) for flag, names in job.files.items()}

    async def _generate(self, language: str, model: str, *values: Any) -> list[Any]:
        service = self._service
        try:
            if (asked := service.models.get(str(model))) is None:  # of a server that has others now
                raise bad("model", text("model_gone", language, model=model))
            sent = zip(self._fields, values)
            given = {name: _path(one) if name in form.FILES else one for name, one in sent}
            wanted = read_fields(form.body_of(asked, given, language), service.models, service.loras)
            if not wanted.preview_every and not service.settings.preview_every:
                wanted = replace(wanted, preview_every=form.preview_every(asked, wanted.options))
            id = (await service.accept(wanted)).id
        except (Refused, SwanError) as error:
            why = form.in_words(without_paths(str(error)), language, getattr(error, "param", None))
            told = shown.message(text("refused", language, why=why), is_error=True)
            return [told, *[gr.skip() for _ in self._of_job[1:]]]
        return await self._shown("", _Kept(language, id), language, {})


def _kind(name: str, has_choices: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The component of a field, and how it is made."""
    if name in _PICTURES_ALONE:
        return gr.Image, {"sources": ["upload", "clipboard"], "type": "filepath", "height": 220, "buttons": []}
    if name in form.FILES:
        is_many = FLAGS[name].kind == "pictures"
        types = ["audio", "video"] if name == "audio" else ["image"] if is_many else ["video", "image"]
        return gr.File, {"file_count": "multiple" if is_many else "single", "file_types": types, "height": 130}
    if has_choices:
        value = "lora" if name.startswith("lora_expert") else ""
        return gr.Dropdown, {"value": value, "min_width": 190, "allow_custom_value": name == "size"}
    if form.is_switch(name):
        return gr.Checkbox, {"value": False}
    return gr.Textbox, {"value": "", "lines": _LINES.get(name, 1), "max_lines": 12 if name in _LINES else 1}


def _path(sent: Any) -> Any:
    """Of a file that was sent, or of each of several; None where there is none."""
    if isinstance(sent, list):
        return [_path(one) for one in sent]
    return str(sent["path"]) if isinstance(sent, dict) and sent.get("path") else None


def _log_out(at: _At) -> str:
    return f'<form class="swan-out" method="post" action="logout"><button>{escape(at.text("log_out"))}</button></form>'


def _option_list(at: _At) -> str:
    """Those that have no field. Whether prompts are extended the server says."""
    extends = at.model.options.get("use_prompt_extend")
    names = [name for name in form.OTHER_FLAGS if extends or name not in EXTEND]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(help_of(name, at.language))}</dd>" for name in names)
    return f'<details class="swan-options"><summary>{at.text("others_list")}</summary><dl>{rows}</dl></details>'
