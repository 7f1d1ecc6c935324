"""The page as a part of the server's app: what of gradio's routes is reached, and what browsers may load.

Gradio has many more routes than the page needs: they fetch URLs, show the API, run what components do. Only those that
are named here are reached, and bodies name no files but uploads. A browser loads nothing from elsewhere, by the policy
that goes with each answer, and finds nothing in the page that asks it to.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response

from wan.files import parse_json
from wan.serve.guard import Keys, Receive, Scope
from wan.serve.refused import Refused, bad
from wan.serve.service import Service
from wan.serve.web.login import add_login, login_page
from wan.serve.web.uploads import Uploads

_UPLOADED_MORE = 10  # times the most that one request may send are kept for all browsers
_MOST_EVENT_BYTES = 1_000_000
_EVENT = "/gradio_api/run/predict"
_FILE = "/gradio_api/file="
_UPLOAD = "/gradio_api/upload"
_REACHED = {
    "GET": r"/|/config|/theme\.css|/favicon\.ico|/(assets|static|svelte)/.+"
    r"|/gradio_api/(heartbeat/\w+|app_id|startup-events|upload_progress|file=.+)",
    "POST": rf"{_EVENT}|{_UPLOAD}",
}
_FOREIGN = re.compile(
    rb"<(script|link|meta)\b[^>]*?\b((src|href|content)=\"(https?:)?//|rel=\"manifest\")[^>]*>(\s*</script>)?"
)
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src"
    " 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Web:
    """The page of one server. data: the server's folder; root_path: where a proxy has the page."""

    login = staticmethod(login_page)

    def __init__(self, data: Path, most_upload_bytes: int, root_path: str = ""):
        self._uploads = Uploads(data / "uploads", _UPLOADED_MORE * most_upload_bytes)
        self._most_bytes, self._root_path = most_upload_bytes, root_path
        self._checked: Callable[[Any], dict[str, Any]] | None = None  # events of the page
        self._pages: FastAPI | None = None  # gradio's
        # Before gradio is imported, which else tells its makers of it.
        os.environ |= {"GRADIO_TEMP_DIR": str(self._uploads.folder), "GRADIO_ANALYTICS_ENABLED": "False"}

    def add_to(self, app: FastAPI, keys: Keys) -> None:
        """Its routes, within those of the app's checks that are added later."""
        if keys:
            add_login(app, keys)
        app.add_middleware(_Reached, web=self)

    def add_around(self, app: FastAPI) -> None:
        """What comes before all checks of the app."""
        if self._root_path:
            app.add_middleware(_Prefixed, prefix=self._root_path)

    @asynccontextmanager
    async def life(self, service: Service) -> AsyncIterator[None]:
        import gradio

        from wan.serve.web.events import checked
        from wan.serve.web.page import Page

        page = Page(service, self._uploads)
        pages = gradio.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            page.blocks,
            path="/",
            root_path=self._root_path or None,
            run_history=False,
            max_file_size=self._most_bytes,
            ssr_mode=False,
            show_error=False,
            **page.look,
        )
        pages.routes[-1].app.add_exception_handler(Refused, _refused)
        sweeping = asyncio.ensure_future(self._uploads.sweep())
        async with pages.router.lifespan_context(pages):
            self._checked, self._pages = partial(checked, page.blocks, self._uploads), pages
            yield
            self._checked = self._pages = None
        sweeping.cancel()
        page.close()

    async def answer(self, scope: Scope, receive: Receive, send: Any) -> None:
        """A request that is for gradio."""
        if scope["path"] == _EVENT:
            if Headers(scope=scope).get("content-type", "").partition(";")[0] != "application/json":
                raise Refused(415, "an event of the page is JSON", "unsupported_media_type")
            receive = await self._event(receive)
        elif scope["path"] == _UPLOAD:
            await asyncio.to_thread(self._uploads.make_room)
        elif scope["path"].startswith(_FILE):
            if not self._uploads.holds(scope["path"].removeprefix(_FILE)):
                raise Refused(404, "Not Found")
        elif scope["path"] == "/":  # which is read here, so it must not be compressed; a query could name a state
            kept = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            scope = {**scope, "headers": kept, "query_string": b""}
        await self._pages(scope, receive, _Answer(send, scope["path"] == "/"))

    async def _event(self, receive: Receive) -> Receive:
        """Its body, which is read, to be read again: what was checked and no more. Raises Refused."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > _MOST_EVENT_BYTES:
                raise Refused(413, f"an event of the page has at most {_MOST_EVENT_BYTES:,} bytes", "too_large")
            if not message.get("more_body", False):
                break
        try:
            body = json.dumps(self._checked(parse_json(body)), ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise bad(None, "the request is not valid JSON", "invalid_json") from error
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> dict[str, Any]:
            return messages.pop() if messages else await receive()

        return again


class _Prefixed:
    """Takes the prefix of a path off, where the proxy has not done so."""

    def __init__(self, app: Any, prefix: str):
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        path = scope.get("path", "")
        if path == self._prefix:  # what is relative in the page would be looked for beside it
            await RedirectResponse(f"{path}/")(scope, receive, send)
            return
        if path.startswith(f"{self._prefix}/"):
            scope = {**scope, "path": path.removeprefix(self._prefix)}
        await self._app(scope, receive, send)


class _Reached:
    """Between the server's checks and its routes: gives to gradio what is for the page."""

    def __init__(self, app: Any, web: Web):
        self._app, self._web = app, web

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        is_page = scope["type"] == "http" and re.fullmatch(_REACHED.get(scope["method"], ""), scope["path"])
        if not is_page:
            await self._app(scope, receive, send)
            return
        try:
            await self._web.answer(scope, receive, send)
        except Refused as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)


class _Answer:
    """Sends what gradio answers, with headers of ours in place of its own for pages of others. is_html: it is the page
    itself, which is held back until it is whole, and freed of what it would have a browser load from elsewhere."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]], is_html: bool):
        self._send, self._is_html, self._start, self._body = send, is_html, {}, b""

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            kept = [pair for pair in message["headers"] if not pair[0].lower().startswith(b"access-control-")]
            message = self._start = {**message, "headers": [*kept, *own]}
            if self._is_html:
                return
        elif self._is_html:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = _FOREIGN.sub(b"", self._body)
            headers = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
            await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await self._send(message)


def _refused(request: Any, error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
