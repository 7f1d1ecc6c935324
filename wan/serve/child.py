"""Processes beside the server, and what is said to them and by them: lines of JSON, by a pipe. No torch.

A child ends with its server, whatever ends that: its end of the pipe is closed then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from wan.errors import SwanError

Message = dict[str, Any]


class Child:
    """A process that runs `main(inbox, tell)` of a module, started at once. Used by the thread of an event loop.

    on_message: takes what it tells; on_end: is called once, when it has ended, with its exit code. env: variables that
    are set before the module is imported.
    """

    def __init__(
        self, module: str, env: Mapping[str, str], on_message: Callable[[Message], None], on_end: Callable[[int], None]
    ):
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, module, dict(env)), daemon=True)
        self._process.start()
        theirs.close()  # or its end would never be heard of
        threading.Thread(target=self._listen, args=(loop, on_message, on_end), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: Message) -> None:
        """What cannot be told to one that has ended is not: its end will be heard of."""
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(json.dumps(message).encode())

    def kill(self) -> None:
        self._process.kill()

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        self._process.join(seconds)

    def _listen(self, loop: asyncio.AbstractEventLoop, on_message: Any, on_end: Any) -> None:
        def say(function: Callable[..., None], *values: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(function, *values)

        try:
            while True:
                say(on_message, json.loads(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            self._process.join()
            say(on_end, self._process.exitcode)


class Inbox:
    """What the server says to a child. on_cancel: is told at once, from a thread; all else waits for `next`."""

    def __init__(self, pipe: Connection):
        self._pipe, self._waiting = pipe, queue.SimpleQueue()
        self._lock = threading.Lock()
        self.on_message: Callable[[Message], None] = lambda message: None

    def next(self) -> Message:
        return self._waiting.get()

    def tell(self, message: Message) -> None:
        with self._lock:
            self._pipe.send_bytes(json.dumps(message).encode())

    def listen(self) -> None:
        try:
            while True:
                message = json.loads(self._pipe.recv_bytes())
                self.on_message(message)
                self._waiting.put(message)
        except (EOFError, OSError):  # the server has gone: whatever is at work here, nobody waits for it
            os._exit(0)


def _main(pipe: Connection, module: str, env: Mapping[str, str]) -> None:
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, meant for the server, which ends its children
    inbox = Inbox(pipe)
    threading.Thread(target=inbox.listen, daemon=True).start()
    try:
        import_module(module).main(inbox)
    except BrokenPipeError:  # the server has gone
        pass
    except SwanError as error:
        inbox.tell({"broken": str(error)})
        raise SystemExit(error.exit_code) from None
