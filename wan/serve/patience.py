"""Connections that do not finish the head of a request: they are not waited for, and not listened to without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0  # for all lines before the body, from the first byte or the connection on
MOST_HEAD_BYTES = 1 << 16
_ANSWER = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW, _TOO_LARGE = b"408 Request Timeout", b"431 Request Header Fields Too Large"


class Patience(HttpToolsProtocol):
    """uvicorn's protocol, which waits for ever, and keeps all lines of a head, or behind a body, in memory; bodies are
    `guard`'s to watch."""

    _late: asyncio.TimerHandle | None = None
    _unread = 0  # bytes that were neither a whole head nor a part of a body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._end(_TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._heard()
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self._end, _TOO_SLOW)

    def _heard(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self, why: bytes) -> None:
        self._heard()
        if self.cycle is None or self.cycle.response_complete:  # else it would be a part of another answer
            self.transport.write(_ANSWER % why)
        self.transport.close()
