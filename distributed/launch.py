"""The processes of a job, their beginning and their end. Knows nothing of Wan; imports torch in `start`.

They are started by torchrun, or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. The first error of any rank ends all, in bounded time, and one rank says why in one line:
see `watchdog.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from wan.distributed.signals import WORDS
from wan.distributed.watchdog import ANSWER_S, END_S, SENT, Board, Failure, Watchdog, end_within, name_ranks, say

if TYPE_CHECKING:
    from torch.distributed import TCPStore

DESTROY_S = 5.0  # for torch to take its connections down
MAX_SIZE = 4096  # processes
MAX_NAMED = 5  # differences in one line


class Disagreement(RuntimeError):
    """Ranks were given different things. The message names them, as `World.agree` was told to call them."""


class World:
    """This process among those of its job: number `rank` of `size`, and `local_rank` of `local_size` on this machine.

    stage: what it is doing, for messages. at_failure: called once, before this process ends for a reason that is not
    its own, by `close` or from a thread; a text that it returns is printed as one more line.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.stage = "start"
        self.at_failure: Callable[[], str | None] | None = None
        self._started = self._closed = False
        self._watchdog: Watchdog | None = None
        self._board: Board | None = None
        self._agreed = 0  # calls of agree
        self._timeout_s = 0.0
        self._store: TCPStore | None = None  # kept, for the host is in it, and must outlive the process group
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> World:
        """One process alone without RANK and WORLD_SIZE. ValueError: the variables make no sense."""
        env = os.environ
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        rank, size = _whole(env, "RANK", 0), _whole(env, "WORLD_SIZE", 1)
        if size > MAX_SIZE:
            raise ValueError(f"WORLD_SIZE must be {MAX_SIZE} at most, not {size}")
        if rank >= size:
            raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}")
        if size == 1:
            return cls()
        local_rank, local_size = _whole(env, "LOCAL_RANK", 0), _whole(env, "LOCAL_WORLD_SIZE", 1)
        if local_rank >= local_size:
            raise ValueError(f"LOCAL_RANK is {local_rank}, but LOCAL_WORLD_SIZE is {local_size}")
        if local_size > size:
            raise ValueError(f"LOCAL_WORLD_SIZE is {local_size}, but WORLD_SIZE is {size}")
        if not env.get("MASTER_ADDR"):
            raise ValueError("WORLD_SIZE is set, but MASTER_ADDR is not")
        if not 0 < _whole(env, "MASTER_PORT", 1) < 65536:
            raise ValueError(f"MASTER_PORT must be below 65536, not {env['MASTER_PORT']}")
        # A lost store is reported in one line; torch, which reads this when imported, tells of it in forty.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        return cls(rank, size, local_rank, local_size)

    def start(
        self, device_type: Literal["cpu", "cuda"], timeout_s: float, alike: Mapping[str, str] | None = None
    ) -> None:
        """Meet the other processes and form the process group. From the main thread, once. RuntimeError: in one line.

        timeout_s: for all to come, for a collective, and for a process to answer before it counts as lost. alike: what
        must be the same on all ranks, see `agree`, before anything else is done together.
        """
        if self.size == 1:
            return
        self._started, self._timeout_s = True, timeout_s
        import torch
        from torch.distributed import PrefixStore

        deadline = time.monotonic() + timeout_s
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store still holds the last try
        try:
            self._store = self._connect(hosted and self.rank == 0, hosted, timeout_s, deadline)
            own = self._connect(False, hosted, timeout_s, deadline)
            board = self._board = Board(PrefixStore(f"launch/{restart}", own), self.rank, self.size)
            self._watchdog = Watchdog(board, hosted, timeout_s, lambda: self.stage, self._rescue)
            if device_type == "cuda":
                self._take_gpu()
            self._meet(board, timeout_s, deadline)
            self._watchdog.start()
            self.agree(alike or {})
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
                store=PrefixStore(f"group/{restart}", self._store),
                rank=self.rank,
                world_size=self.size,
            )
        except Disagreement:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise RuntimeError(_one_line(error)) from error

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare `facts`, texts by what they are called, with those of all ranks, which all call this alike.

        Raises Disagreement, the same on all ranks, which says what differs from rank 0 and on which ranks.
        """
        if self.size == 1:
            return
        self._agreed += 1
        what = f"facts/{self._agreed}"
        mine = json.dumps({name: _digest(text) for name, text in sorted(facts.items())})
        self._board.tell(f"{what}/all", mine)
        self._board.tell(what, _digest(mine))
        deadline = time.monotonic() + self._timeout_s
        while (digests := self._board.told(what)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all ranks have come so far within {self._timeout_s:g} s")
            time.sleep(0.02)
        if len(set(digests)) == 1:
            return
        first, *others = [json.loads(text) for text in self._board.told(f"{what}/all")]
        names = sorted({name for one in (first, *others) for name in one})
        differ = {
            name: [rank for rank, one in enumerate(others, 1) if one.get(name) != first.get(name)] for name in names
        }
        told = [f"{name} ({name_ranks(ranks)})" for name, ranks in differ.items() if ranks]
        more = f" and {len(told) - MAX_NAMED} more" if len(told) > MAX_NAMED else ""
        raise Disagreement(f"not the same as on rank 0: {', '.join(told[:MAX_NAMED])}{more}")

    def report(self, message: str, exit_code: int) -> int:
        """This rank has failed. Prints `message`, or what it follows from, if no other rank speaks for the job.

        Returns the exit code that the job ends with. `close` and the end of the process must follow soon.
        """
        if self.size == 1 or not self._started:
            if self.rank == 0:  # all ranks find the same before they meet
                say(message)
            return exit_code
        mine = Failure(self.rank, self.stage, message, exit_code)
        end_within(END_S, exit_code)
        if self._watchdog is None:  # there was no store to be reached, so the others cannot be asked
            if self.rank == 0 or message not in [WORDS[signum] for signum in SENT]:  # sent: it is one of many to end
                say(mine.line)
            return exit_code
        first = self._watchdog.conclude(mine)
        if first is mine:
            self.at_failure = None  # its own: what there is to keep, the caller has kept
        return first.exit_code

    def close(self) -> None:
        """Leave the job, after success as after a failure. Bounded; may be called again."""
        if self._closed or self._watchdog is None:
            return
        self._closed = True
        self._watchdog.release()
        failure = self._watchdog.failure
        if failure is not None:
            end_within(END_S, failure.exit_code)
            self._rescue()
        # What is lost when the timer strikes; closed: nothing to lose.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        timer = end_within(DESTROY_S, failure.exit_code if failure else 0)
        _destroy_group()
        timer.cancel()
        self._watchdog.farewell()
        self._watchdog.stop()

    def _connect(self, host: bool, hosted: bool, timeout_s: float, deadline: float) -> TCPStore:
        """A client of the job's store. host: be the host as well; hosted: rank 0 is."""
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        name = "rank 0" if hosted else "the launcher"
        if not host and (error := _reach(address, port, deadline)):
            raise RuntimeError(f"{name} did not come within {timeout_s:g} s ({address}:{port}: {_one_line(error)})")
        # The host is its own first client, whatever others call it.
        where, timeout = "localhost" if host else address, timedelta(seconds=timeout_s)
        try:
            store = _within(
                deadline, lambda: TCPStore(where, port, is_master=host, timeout=timeout, wait_for_workers=False)
            )
        except (RuntimeError, OSError) as error:
            if host and errno.errorcode[errno.EADDRINUSE] in str(error):
                problem = "is taken on this machine, by another job or by a second process of RANK 0"
                raise RuntimeError(f"MASTER_PORT {port} {problem}") from error
            does = "cannot be had here" if host else f"is not {name}'s, or it has not answered for {timeout_s:g} s"
            raise RuntimeError(f"{address}:{port} {does} ({_one_line(error)})") from error
        if host and (error := _reach(address, port, deadline)):
            reason = f"{address}:{port}: {_one_line(error)}"
            raise RuntimeError(f"rank 0 does not reach itself under MASTER_ADDR within {timeout_s:g} s ({reason})")
        return store

    def _meet(self, board: Board, timeout_s: float, deadline: float) -> None:
        """Wait for all ranks. Not with the store's own wait, which is deaf to failures of others and to Ctrl-C."""
        board.arrive()
        while not board.all_arrived():
            failure, _ = board.read()
            if failure is not None:
                raise RuntimeError(failure.message)  # said by another; report() will find that out
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.size)) - set(board.arrived()))
                raise RuntimeError(f"{name_ranks(missing)} did not come within {timeout_s:g} s")
            time.sleep(0.1)

    def _take_gpu(self) -> None:
        import torch

        count = torch.cuda.device_count()
        if self.local_rank >= count:
            gpus = {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")
            raise RuntimeError(f"{self.local_size} processes on this machine, which has {gpus}")
        torch.cuda.set_device(self.local_rank)

    def _rescue(self) -> None:
        with self._lock:
            call, self.at_failure = self.at_failure, None
        if call is None:
            return
        try:
            say(call() or "")
        except Exception as error:  # the end must go on, and has a reason already
            say(f"warning: {type(error).__name__}: {_one_line(error)}")


def _whole(env: Mapping[str, str], name: str, least: int) -> int:
    if name not in env:
        raise ValueError(f"{name} is not set, but {'RANK' if 'RANK' in env else 'WORLD_SIZE'} is")
    if not env[name].strip().isdecimal() or int(env[name]) < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {env[name]!r}")
    return int(env[name])


def _reach(address: str, port: int, deadline: float) -> OSError | None:
    """Wait until something listens there; else why not. TCPStore waits too, but deaf to Ctrl-C, and with warnings."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error
        time.sleep(0.1)


def _within(deadline: float, call: Callable[[], Any]) -> Any:
    """call(), which may be deaf to Ctrl-C and know no end: in a thread. TimeoutError some time after the deadline."""
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            value, error = answers.get(timeout=0.1)
            if error is not None:
                raise error
            return value
        if time.monotonic() > deadline + ANSWER_S:
            raise TimeoutError("no answer")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _destroy_group() -> None:
    dist = sys.modules["torch.distributed"]
    if dist.is_initialized():
        # After a failure its connections are broken; that they cannot be taken down in order is no news.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _one_line(error: BaseException) -> str:
    """The first line: torch appends the C++ stack to its errors."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
