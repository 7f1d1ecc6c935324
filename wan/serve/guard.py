"""Who may ask, and how much may be sent: before any route."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from wan.serve.refused import Refused

BODY_WAIT_S, BODY_ALL_S = 30.0, 900.0  # for the next part of a body, and for all of it
COOKIE = "swan"  # of a browser in which a key was given
_OPEN = ("/health",)
_LOGIN, _MOST_LOGIN_BYTES = ("/login", "/logout"), 10_000  # of strangers

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Keys:
    """Of clients; false where there are none. What is given is compared with all of them, in a time that tells nothing.

    A browser that has given a key has a cookie, which is good until the server ends and does not tell the key.
    """

    def __init__(self, keys: Sequence[str] = ()):
        self._keys, secret = [hashlib.sha256(key.encode()).digest() for key in keys], secrets.token_bytes(32)
        self._sign = lambda digest: hmac.digest(secret, digest, "sha256")
        self._cookies = [self._sign(digest) for digest in self._keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def has(self, key: str) -> bool:
        return _is_among(hashlib.sha256(key.encode("utf-8", "replace")).digest(), self._keys)

    def cookie(self, key: str) -> str:
        """Of a key that there is."""
        return self._sign(hashlib.sha256(key.encode()).digest()).hex()

    def has_cookie(self, value: str) -> bool:
        try:
            return _is_among(bytes.fromhex(value), self._cookies)
        except ValueError:
            return False


def _is_among(given: bytes, all_of: Sequence[bytes]) -> bool:
    return any([hmac.compare_digest(given, one) for one in all_of])


class Guard:
    """Refuses requests without a key, where there are keys; without keys, those of pages in a browser that come from
    elsewhere, as this machine alone may ask then. Ends bodies that are too large or too slow.

    on_refused: is told the status; login: what a browser is shown at / that has no key yet, None: there is no page
    """

    def __init__(
        self,
        app: Any,
        keys: Keys,
        origins: tuple[str, ...],
        most_bytes: int,
        on_refused: Callable[[int], None],
        login: Callable[[str], Response] | None = None,
    ):
        self._app, self._origins, self._most_bytes, self._on_refused = app, origins, most_bytes, on_refused
        self._keys, self._login = keys, login

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers, most_bytes = Headers(scope=scope), self._most_bytes
            if scope["path"] in _LOGIN:
                most_bytes = min(most_bytes, _MOST_LOGIN_BYTES)
            if scope["path"] not in _OPEN:
                self._check_asker(scope, headers)
            _check_size(headers, most_bytes)
        except Refused as error:
            self._on_refused(error.status)
            answer = JSONResponse(error.body, error.status, {**error.headers, "Connection": "close"})
            if error.status == 401 and self._login and scope["path"] == "/":
                answer = self._login(headers.get("accept-language", ""))
            await answer(scope, receive, send)
            return
        body = _Body(receive, headers, most_bytes)

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and not body.has_ended:  # what is still to come is not read
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, body, answer)

    def _check_asker(self, scope: Scope, headers: Headers) -> None:
        if not self._keys:
            if not is_loopback(_name(headers.get("host", ""))):
                raise Refused(403, "without keys only this machine may ask, by its own name: localhost", "host_refused")
            self._check_origin(headers)
        elif "authorization" not in headers and self._is_browser(scope):
            self._check_origin(headers)  # browsers send cookies of themselves
        else:
            self._check_key(headers)

    def _is_browser(self, scope: Scope) -> bool:
        """Whether it is one in which a key was given, is now, or is to be forgotten."""
        is_login = self._login is not None and scope["path"] in _LOGIN
        return is_login or self._keys.has_cookie(HTTPConnection(scope).cookies.get(COOKIE, ""))

    def _check_key(self, headers: Headers) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self._keys.has(key.strip()):
            raise Refused(401, "no valid key: send Authorization: Bearer KEY", "invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """A page of elsewhere may send forms to this machine, and its name may stand for this machine by now."""
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin not in self._origins and origin.partition("//")[2] != host:
            raise Refused(403, "pages of other origins may not ask", "origin_refused")


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


def _check_size(headers: Headers, most_bytes: int) -> None:
    size = headers.get("content-length", "0")
    if not size.isdigit() or int(size) > most_bytes:
        raise _too_large(most_bytes)


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
