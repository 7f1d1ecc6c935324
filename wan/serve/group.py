"""The processes of a worker on this machine, which make each video together. No torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial

from wan.serve.child import Child, Message

MOST_DEATHS = 2  # of workers, after which a job is no more tried
DEAD = "the process that made this video has ended, most likely for want of memory"


class Group:
    """So many `ranks`, each running `main` of wan.serve.worker. Used by the thread of an event loop.

    env: variables of theirs; first: what each is told first; on_message: takes what they tell, all of the first one's
    and failures of the others; on_end: is called once, when one of them has ended, with its exit code. The others are
    ended with it, and nothing more is heard of them.
    """

    def __init__(
        self,
        ranks: int,
        env: Mapping[str, str],
        first: Message,
        on_message: Callable[[Message], None],
        on_end: Callable[[int], None],
    ):
        self._on_message, self._on_end, self._has_ended = on_message, on_end, False
        # They find each other as those of torchrun do.
        common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = _free_port()
        self._children: list[Child] = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            heard = partial(self._heard, rank)
            self._children.append(Child("wan.serve.worker", {**env, **own}, heard, self._ended))
        self.tell(first)

    @property
    def name(self) -> str:
        """For messages."""
        return f"process {self._children[0].pid}"

    def tell(self, message: Message) -> None:
        for child in self._children:
            child.tell(message)

    def kill(self) -> None:
        for child in self._children:
            child.kill()

    def join(self, seconds: float) -> None:
        """Wait for the end of one that was killed."""
        for child in self._children:
            child.join(seconds)

    def _heard(self, rank: int, message: Message) -> None:
        if not self._has_ended and (rank == 0 or "failed" in message or "broken" in message):
            self._on_message(message)

    def _ended(self, code: int) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.kill()
            self._on_end(code)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]
