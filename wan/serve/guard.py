"""Who may ask, and how much may be sent: before any route."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from wan.serve.refused import Refused

BODY_WAIT_S, BODY_ALL_S = 30.0, 900.0  # for the next part of a body, and for all of it
_OPEN = ("/health",)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Guard:
    """Refuses requests without a key, where there are keys; without keys, those of pages in a browser that come from
    elsewhere, as this machine alone may ask then. Ends bodies that are too large or too slow.

    on_refused: is told the status.
    """

    def __init__(
        self,
        app: Any,
        keys: tuple[str, ...],
        origins: tuple[str, ...],
        most_bytes: int,
        on_refused: Callable[[int], None],
    ):
        self._app, self._origins, self._most_bytes, self._on_refused = app, origins, most_bytes, on_refused
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            if scope["path"] not in _OPEN:
                self._check_key(headers) if self._keys else self._check_origin(headers)
            self._check_size(headers)
        except Refused as error:
            self._on_refused(error.status)
            headers = {**error.headers, "Connection": "close"}
            await JSONResponse(error.body, error.status, headers)(scope, receive, send)
            return
        body = _Body(receive, headers, self._most_bytes)

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and not body.has_ended:  # what is still to come is not read
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, body, answer)

    def _check_key(self, headers: Headers) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(given, one) for one in self._keys]  # all of them, in a time that tells nothing
        if kind.lower() != "bearer" or not any(found):
            raise Refused(401, "no valid key: send Authorization: Bearer KEY", "invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """A page of elsewhere may send forms to this machine, and its name may stand for this machine by now."""
        host = headers.get("host", "")
        if not is_loopback(_name(host)):
            raise Refused(403, "without keys only this machine may ask, by its own name: localhost", "host_refused")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin.partition("//")[2] != host:
            raise Refused(403, "pages of other origins may not ask", "origin_refused")

    def _check_size(self, headers: Headers) -> None:
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size) > self._most_bytes:
            raise _too_large(self._most_bytes)


class _Body:
    """What a request sends, in parts. Raises Refused to whoever reads on, where that is too much or too slow."""

    def __init__(self, receive: Receive, headers: Headers, most_bytes: int):
        self._receive, self._most_bytes, self._left = receive, most_bytes, most_bytes
        self._deadline = time.monotonic() + BODY_ALL_S
        self.has_ended = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def __call__(self) -> dict[str, Any]:
        if self.has_ended:  # waits for the client to leave
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), min(BODY_WAIT_S, self._deadline - time.monotonic()))
        except asyncio.TimeoutError as error:
            raise Refused(408, "the request comes too slowly", "too_slow") from error
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_large(self._most_bytes)
        self.has_ended = not message.get("more_body", False)
        return message


def _too_large(most_bytes: int) -> Refused:
    return Refused(413, f"a request has at most {most_bytes:,} bytes", "too_large")


def _name(host: str) -> str:
    """Of a host and a port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
