"""Connections that never finish the head of a request, or never end it, against uvicorn itself: no model is needed."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")
from wan.serve import patience  # noqa: E402


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect(monkeypatch):
    """Opens connections to a server that waits for half a second."""
    monkeypatch.setattr(patience, "HEAD_S", 0.5)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=patience.Patience, lifespan="off", log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    opened = []

    def connect():
        opened.append(socket.create_connection(listening.getsockname(), timeout=60))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()
    server.should_exit = True
    thread.join()


def rest_of(connection):
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_a_head_that_does_not_come_ends_the_connection(connect, sent):
    connection = connect()
    connection.sendall(sent)
    assert rest_of(connection).startswith(b"HTTP/1.1 408 ")


def test_so_does_one_that_comes_byte_by_byte(connect):
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ")
    connection.setblocking(False)
    answer = None
    while answer is None:  # a byte now and then does not win time
        try:
            answer = connection.recv(100)
        except BlockingIOError:
            connection.sendall(b"a")
            time.sleep(0.05)
        except ConnectionError:
            answer = b"HTTP/1.1 408 "
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_bodies_and_further_requests_may_take_longer(connect):
    connection = connect()
    for _ in range(2):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
        time.sleep(0.8)
        connection.sendall(b"b")
        answer = b""
        while not answer.endswith(b"\r\n\r\nab"):
            assert (part := connection.recv(1 << 16)), answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200 ")


POST = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", POST + b"1\r\na\r\n0\r\n"], ids=["head", "trailers"])
@pytest.mark.parametrize("more", [b"X: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["many lines", "one line"])
def test_lines_without_end_are_not_taken(connect, monkeypatch, start, more):
    monkeypatch.setattr(patience, "HEAD_S", 600.0)  # size alone ends them
    connection, taken = connect(), 0
    connection.sendall(start + (b"" if more.endswith(b"\n") else b"X: "))
    with contextlib.suppress(ConnectionError):
        while taken < 100_000_000:
            connection.sendall(100 * more)
            taken += 100 * len(more)
    assert taken < 50_000_000  # what the system keeps on the way is no more


def test_a_head_that_is_too_large_is_told(connect):
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (patience.MOST_HEAD_BYTES - 19))
    connection.sendall(b"a")
    assert rest_of(connection).startswith(b"HTTP/1.1 431 ")


def test_bodies_are_not_measured(connect):
    connection, body = connect(), b"a" * 10_000_000
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 10000000\r\n\r\n" + body)
    assert rest_of(connection).endswith(b"\r\n\r\n" + body)
