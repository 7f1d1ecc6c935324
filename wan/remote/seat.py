"""What stands for a worker on the machine where it works: a Ray actor, with the worker's processes below it.

It hands on what is said in both directions, and files: those of a job come with it and lie in a temporary folder until
its end, those that are made go back with the message that it is done. No torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan import __version__
from wan.errors import one_line
from wan.files import temporary_name
from wan.remote.luggage import Piece, unpack
from wan.serve.child import Message
from wan.serve.group import Group


class Seat:
    """Methods are called one by one, but `heard`, which waits beside them."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[Message] = asyncio.Queue()
        self._group: Group | None = None
        self._jobs: dict[str, tuple[contextlib.ExitStack, Path, Mapping[str, str]]] = {}

    async def hello(self) -> tuple[str, str, str]:
        """The version of Swan on this machine, its name, and Ray's name of it. The same in all versions."""
        import ray

        return __version__, socket.gethostname(), ray.get_runtime_context().get_node_id()

    async def open(self, ranks: int, env: Mapping[str, str | None], first: Message) -> str:
        """Start the processes; their name. env: None: a variable that is not set."""
        for name in (name for name, value in env.items() if value is None):
            os.environ.pop(name, None)
        env = {name: value for name, value in env.items() if value is not None}
        self._group = Group(ranks, env, first, self._take, lambda code: self._heard.put_nowait({"ended": code}))
        return self._group.name

    async def tell(self, message: Message, pieces: Sequence[Piece] = ()) -> None:
        """To all processes. pieces: the files of a job."""
        if "job" in message:
            try:
                message = self._placed(message, pieces)
            except OSError as error:
                told = f"the files of this job cannot be written: {one_line(error)}"
                self._take({"job": message["job"], "failed": told, "code": "internal_error"})
                return
        self._group.tell(message)

    async def heard(self) -> list[Message]:
        """What was told since the last call, once that is something; {"ended": status} is the last message of all."""
        messages = [await self._heard.get()]
        while not self._heard.empty():
            messages.append(self._heard.get_nowait())
        return messages

    async def close(self) -> None:
        """End the processes, and leave nothing here."""
        if self._group is not None:
            self._group.kill()
        for stack, *_ in self._jobs.values():
            stack.close()
        self._jobs.clear()
        self._heard.put_nowait({"ended": -signal.SIGKILL})

    def _placed(self, message: Message, pieces: Sequence[Piece]) -> Message:
        """The message of a job, with a folder of its own here and its files in that."""
        stack = contextlib.ExitStack()
        with contextlib.ExitStack() as failed:
            failed.push(stack)
            folder = stack.enter_context(temporary_name(Path(tempfile.gettempdir()), is_folder=True))
            folder.chmod(0o700)
            made = folder / "made"
            made.mkdir()
            options, called, given = unpack(message["options"], pieces, folder)
            failed.pop_all()
        self._jobs[message["job"]] = stack, made, given
        return {**message, "options": options, "called": called, "folder": str(made)}

    def _take(self, message: Message) -> None:
        """What a process tells; at the end of a job with the files that it made, which are removed here."""
        id = message.get("job")
        if id in self._jobs:
            stack, made, given = self._jobs[id]
            message = {name: _as_given(value, given) for name, value in message.items()}
            if "event" not in message:
                if "done" in message:
                    message["files"] = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
                del self._jobs[id]
                stack.close()
        self._heard.put_nowait(message)


def _as_given(value: Any, given: Mapping[str, str]) -> Any:
    """A text with the names that the user gave to files."""
    if isinstance(value, str):
        for there, here in given.items():
            value = value.replace(there, here)
    return value
