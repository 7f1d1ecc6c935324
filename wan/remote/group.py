"""A worker on another machine, as whoever gives it work sees it: the same as a `wan.serve.group.Group`. No torch."""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wan import __version__
from wan.errors import SwanError, one_line
from wan.files import atomic
from wan.remote.cluster import Place
from wan.remote.luggage import pack
from wan.serve.child import Message

_ROOM_S = 5.0  # after which a worker that waits for room says so
_CLOSE_S = 5.0  # for a worker that is killed to leave nothing behind
_POLL_S = 0.5  # how often one that waits looks whether it was killed


class RemoteGroup:
    """The processes of a worker at a place in a Ray cluster, started as soon as there is room for them.

    call: calls a function with its arguments in the thread of whoever uses this. on_message: also takes
    {"waits": True}, once, while there is no room; failures have the machine's name as "machine". The files of a job are
    in its "folder" when it takes "done". on_end: see Group; a machine that is lost counts as killed.
    """

    def __init__(
        self,
        place: Place,
        first: Message,
        call: Callable[..., object],
        on_message: Callable[[Message], None],
        on_end: Callable[[int], None],
    ):
        self.name = "a process that is not there yet"
        self._place, self._first, self._machine = place, first, ""
        self._tell_user = lambda message: call(on_message, message)
        self._end_user = lambda code: call(on_end, code)
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._folders: dict[str, Path] = {}
        self._seat: Any = None
        self._is_killed = False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def tell(self, message: Message) -> None:
        """What cannot be told to one that has ended is not."""
        self._outbox.put(message)

    def kill(self) -> None:
        """Its processes end at once, and it soon after; a machine that does not answer is given up."""
        self._is_killed = True
        if self._seat is not None:
            with contextlib.suppress(Exception):  # it has ended, or the cluster has
                self._seat.close.remote()
            timer = threading.Timer(_CLOSE_S, lambda: self._thread.is_alive() and self._give_up())
            timer.daemon = True
            timer.start()

    def join(self, seconds: float) -> None:
        """Wait for the end of one that was killed."""
        self._thread.join(seconds)

    def _give_up(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._seat)

    def _live(self) -> None:
        import ray

        code = -signal.SIGKILL
        try:
            self._begin()
            threading.Thread(target=self._send, daemon=True).start()
            while True:
                for message in ray.get(self._seat.heard.remote()):
                    if "ended" in message:
                        code = message["ended"]
                        return
                    self._tell_user(self._arrived(message))
        except ray.exceptions.RayActorError:  # its process or its machine is gone
            pass
        except Exception as error:
            if not self._is_killed:
                told = str(error) if isinstance(error, SwanError) else f"{type(error).__name__}: {one_line(error)}"
                if isinstance(error, ConnectionError):  # of ray://
                    told = "the cluster does not answer any more"
                self._tell_user({"broken": told, "machine": self._machine})
        finally:
            self._outbox.put(None)
            self._give_up()
            self._end_user(code)

    def _begin(self) -> None:
        """Start it. Raises SwanError where that machine has another Swan, or none."""
        import ray

        since, is_told = time.monotonic(), not self._place.is_expected  # else all together were told of
        while not self._place.wait(_POLL_S):
            if self._is_killed:
                raise SwanError("ended")
            if not is_told and time.monotonic() - since > _ROOM_S:
                is_told = True
                self._tell_user({"waits": True})
        self._seat = self._place.seat()
        try:
            version, self._machine, node = ray.get(self._seat.hello.remote())
        except ray.exceptions.RayActorError as error:
            *_, last = str(error).strip().splitlines()
            if not last.startswith(("ModuleNotFoundError", "ImportError")):
                raise
            ip = re.search(r"ip=([^,)\s]+)", str(error))
            raise SwanError(f"there is no such Swan on {ip[1] if ip else 'a machine'} ({last})") from error
        if version != __version__:
            raise SwanError(
                f"{self._machine} has Swan {version}, and this machine {__version__}: they must be the same"
            )
        processes = self._place.neighbours.get(node, 1) * self._place.ranks
        load, _ = pack(self._first["load"])
        first = {"load": load, "processes": processes}
        started = ray.get(self._seat.open.remote(self._place.ranks, self._place.env, first))
        self.name = f"{started} of {self._machine}"
        if self._is_killed:
            raise SwanError("ended")

    def _send(self) -> None:
        """One message after another: what is told to cancel a job must not overtake it."""
        import ray

        while (message := self._outbox.get()) is not None:
            try:
                pieces = []
                if "job" in message:
                    self._folders[message["job"]] = Path(message["folder"])
                    options, pieces = pack(message["options"])
                    message = {**message, "options": options}
                ray.get(self._seat.tell.remote(message, pieces))
            except ray.exceptions.RayActorError:  # its end will be heard of
                return
            except Exception as error:  # a file of the job that cannot be read, or too large to travel
                told = str(error) if isinstance(error, SwanError) else f"{type(error).__name__}: {one_line(error)}"
                if "job" in message:
                    self._tell_user({"job": message["job"], "failed": told, "code": "generation_failed"})

    def _arrived(self, message: Message) -> Message:
        """A message, once the files that came with it are where they belong."""
        folder = self._folders.pop(message["job"], None) if "job" in message and "event" not in message else None
        files = message.pop("files", {})
        try:
            for name, data in files.items():
                with atomic(folder / name) as temporary:
                    temporary.write_bytes(data)
        except SwanError as error:
            return {"job": message["job"], "failed": str(error), "code": "generation_failed"}
        return {**message, "machine": self._machine} if "failed" in message or "broken" in message else message
