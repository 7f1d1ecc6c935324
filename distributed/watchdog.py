"""What the processes of a job tell each other beside their collectives, and the threads that end one in bounded time.

The main thread may be inside a collective for as long as its timeout, deaf to signals and to the failures of others. So
two threads stand beside it: the pulse talks to the store, the guard waits for signals, of which it hears through
`signal.set_wakeup_fd`, and ends the process where the main thread does not. What the main thread does about signals:
see `signals.py`. Knows nothing of Wan; imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from wan.distributed.signals import WORDS, listening

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD_S = 0.5  # from beat to beat
STILL_S = 3.0  # without a beat for so long: lost, where something has failed already
TERMINATED_S = 2.0  # the same after what launchers send: less, for some launchers kill a few seconds later
GRACE_S = 3.0  # for the main thread to end by itself
ANSWER_S = 5.0  # for the store, once this process is ending
FAREWELL_S = 10.0  # for the others, before the process that hosts the store leaves
MAX_RANKS_NAMED = 16  # in one line
END_S = 28.0  # for all of that together; torchrun kills after 30 s

GONE = "gone"  # the last beat
# Signals that a launcher sends to all when one has failed: what they follow from is worth looking for.
SENT = tuple(signum for signum in WORDS if signum != signal.SIGINT)

# What a collective says when another process is at fault: gloo, NCCL, sockets, exceptions of torch.distributed.
_SECONDARY = re.compile(
    r"gloo|nccl|Dist(Backend|Network|Store)?Error|connection (was likely )?(closed|reset|refused|aborted)|broken pipe"
    r"|timed out waiting|wait timeout|socket (closed|timeout|error)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Why a job ends: what a rank says, who in doing what."""

    rank: int
    stage: str
    message: str
    exit_code: int

    @property
    def secondary(self) -> bool:
        """Whether it looks like the consequence of another rank's end."""
        return self.message in [WORDS[signum] for signum in SENT] or bool(_SECONDARY.search(self.message))

    @property
    def line(self) -> str:
        """The message, with the rank and its stage behind `error:`. An interruption is nobody's fault."""
        if self.message in WORDS.values():
            return self.message
        prefix, text = re.fullmatch(r"((?:internal )?error: )?(.*)", self.message, re.DOTALL).groups(default="")
        return f"{prefix}rank {self.rank}, {self.stage}: {text}"


def say(line: str) -> None:
    """One line on stderr, in one write, for several processes share it."""
    if line and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the end must go on
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def name_ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - MAX_RANKS_NAMED} more" if len(ranks) > MAX_RANKS_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:MAX_RANKS_NAMED]))}{more}"


def _describe_loss(ranks: Sequence[int]) -> str:
    return f"error: lost {name_ranks(ranks)}, which ended without a word (killed?)"


def end_within(seconds: float, exit_code: int) -> threading.Timer:
    """End this process then, whatever its threads are stuck in. Nothing is flushed: that may be what is stuck."""
    timer = threading.Timer(seconds, os._exit, [exit_code])
    timer.daemon = True
    timer.start()
    return timer


class Silence:
    """For how long each of some values has stood still. Time in which this process itself was stopped counts little."""

    def __init__(self) -> None:
        self._values: Sequence[Any] = ()
        self._seconds: list[float] = []
        self._last = time.monotonic()

    def update(self, values: Sequence[Any]) -> list[float]:
        now = time.monotonic()
        step, self._last = min(now - self._last, 10 * PERIOD_S), now
        if len(values) != len(self._values):
            self._values, self._seconds = (None,) * len(values), [0.0] * len(values)
        before = zip(values, self._values, self._seconds, strict=True)
        self._seconds = [seconds + step if value == old else 0.0 for value, old, seconds in before]
        self._values = tuple(values)
        return self._seconds


class Board:
    """What all ranks see, in a store: the first failure of the job, and of each rank a beat: a number, or GONE.

    Its store client is its own: a client that waits for a key makes all other calls on it wait.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self.rank, self.size, self._store = rank, size, store
        self.has_place = False  # this process is the one of its rank
        store.compare_set("failure", "", "")  # there from now on: who reads a key that is not there waits for it

    def arrive(self) -> None:
        """RuntimeError where the ranks are not told the same number of ranks, or two the same rank."""
        size = self._store.compare_set("size", "", str(self.size)).decode()
        if size != str(self.size):
            raise RuntimeError(f"WORLD_SIZE is {self.size}, but {size} on another rank")
        token = secrets.token_hex(8)
        if self._store.compare_set(f"who/{self.rank}", "", token).decode() != token:
            raise RuntimeError(f"another process has RANK {self.rank} too")
        self.has_place = True
        self.beat(0)
        self._store.add("arrived", 1)

    def all_arrived(self) -> bool:
        return self._store.add("arrived", 0) >= self.size

    def arrived(self) -> list[int]:
        return [rank for rank in range(self.size) if self._store.check([f"beat/{rank}"])]

    def beat(self, beat: int | str) -> None:
        self._store.set(f"beat/{self.rank}", str(beat))

    def tell(self, what: str, text: str) -> None:
        self._store.set(f"{what}/{self.rank}", text)

    def told(self, what: str) -> list[str] | None:
        """What each rank told; None until all have."""
        keys = [f"{what}/{rank}" for rank in range(self.size)]
        return [text.decode() for text in self._store.multi_get(keys)] if self._store.check(keys) else None

    def fail(self, failure: Failure) -> Failure:
        """The first failure of the job: `failure` itself if there was none."""
        mine = json.dumps(asdict(failure))
        first = self._store.compare_set("failure", "", mine).decode()
        return failure if first == mine else Failure(**json.loads(first))

    def read(self, ranks: Sequence[int] = ()) -> tuple[Failure | None, list[str]]:
        """The failure, if there is one, and the beats of these ranks, which must have arrived."""
        first, *beats = self._store.multi_get(["failure", *(f"beat/{rank}" for rank in ranks)])
        return (Failure(**json.loads(first)) if first else None), [beat.decode() for beat in beats]

    def watch(self, seconds: float) -> tuple[Failure | None, list[int]]:
        """Wait so long for a failure. Without one: the ranks that should beat and have not, in all this time."""
        ranks = self.arrived()
        until = time.monotonic() + seconds
        failure, before = self.read(ranks)
        while failure is None and time.monotonic() < until:
            time.sleep(PERIOD_S / 5)
            failure, _ = self.read()
        if failure is not None:
            return failure, []
        _, now = self.read(ranks)
        return None, [rank for rank, old, new in zip(ranks, before, now, strict=True) if old == new != GONE]

    def wait_for_others(self, seconds: float) -> None:
        """Until all other ranks that arrived are gone or beat no more, or `seconds` are over."""
        others = [rank for rank in self.arrived() if rank != self.rank]
        silence, until = Silence(), time.monotonic() + seconds
        while time.monotonic() < until:
            _, beats = self.read(others)
            if all(beat == GONE or still > STILL_S for beat, still in zip(beats, silence.update(beats), strict=True)):
                return
            time.sleep(PERIOD_S / 5)


class Pulse(threading.Thread):
    """Beats, and sees the failure of another, ranks that beat no more, and the loss of the store.

    Rank 0 watches all, the others rank 0: a few bytes for each rank and period.
    """

    def __init__(self, board: Board, timeout_s: float):
        super().__init__(name="pulse", daemon=True)
        self.rounds = 0
        self.failure: Failure | None = None
        self.silent: list[int] = []
        self.lost = self.first_gone = False  # the store is; rank 0 has said so
        self._board, self._timeout_s = board, timeout_s
        self._stopped = threading.Event()

    def run(self) -> None:
        first, silence = self._board.rank == 0, Silence()
        watched = range(1, self._board.size) if first else [0]
        while not self._stopped.wait(PERIOD_S):
            try:
                self._board.beat(self.rounds + 1)
                self.failure, beats = self._board.read(watched)
            except RuntimeError:  # what the store raises once its host is gone, in several ways
                self.lost = True
                return
            ranks = zip(watched, beats, silence.update(beats), strict=True)
            self.silent = [rank for rank, beat, still in ranks if beat != GONE and still > self._timeout_s]
            self.first_gone = not first and beats[0] == GONE
            self.rounds += 1

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(2 * PERIOD_S)


class Watchdog:
    """Sees to it that this process ends when the job does, and that one rank says why.

    hosted: by rank 0, where no launcher hosts the store. stage: tells what this rank is doing. rescue: called before
    this process is ended.
    """

    def __init__(
        self, board: Board, hosted: bool, timeout_s: float, stage: Callable[[], str], rescue: Callable[[], None]
    ):
        self.failure: Failure | None = None  # why this process ends, once that is settled
        self._board, self._hosted, self._timeout_s = board, hosted, timeout_s
        self._host_lost = _describe_loss([0]) if hosted else "error: lost the launcher"
        self._stage, self._rescue = stage, rescue
        self._pulse, self._silence = Pulse(board, timeout_s), Silence()
        self._guard = threading.Thread(target=self._stand_guard, name="guard", daemon=True)
        self._released = threading.Event()
        self._stopped = self._unanswered = False
        self._listening = contextlib.ExitStack()
        self._wakeup_fd = -1

    def start(self) -> None:
        """From the main thread, which alone may set signal handlers. All ranks have arrived."""
        self._ear, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._signals = self._listening.enter_context(listening())
        self._pulse.start()
        self._guard.start()

    def conclude(self, mine: Failure) -> Failure:
        """This rank has failed with `mine`. Returns what the job ends with, printed if it is this rank's."""
        self.release()
        if self.failure is None and mine.secondary:
            mine = self._trace(mine, STILL_S)
        return self.settle(mine)

    def release(self) -> None:
        """The main thread ends by itself from here on. Waits for what the guard is about to settle."""
        self._released.set()
        if self._guard.ident is not None:
            self._signals.end()
        if self._guard.is_alive():
            with contextlib.suppress(BlockingIOError):  # full of signals: it is awake anyway
                self._bell.send(b"\0")
            self._guard.join(ANSWER_S)

    def settle(self, cause: Failure) -> Failure:
        """Enter `cause` as the reason of the end, if it is this rank's and the first; then print it."""
        if self.failure is None:
            first = cause
            if cause.rank == self._board.rank:
                # Without a store the ranks cannot agree on one that speaks, so each does.
                with contextlib.suppress(RuntimeError):
                    first = self._ask(lambda: self._board.fail(cause))
            self.failure = first
            if first is cause and cause.rank == self._board.rank:
                say(first.line)
        return self.failure

    def farewell(self) -> None:
        """Say that this rank needs the store no more; its host stays until the others have said so."""
        self._pulse.stop()
        # The job is over for this process: a store that is gone by now has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            if self._board.has_place:  # else it is another process's to say
                self._ask(lambda: self._board.beat(GONE))
            if self._hosted and self._board.rank == 0:
                self._ask(lambda: self._board.wait_for_others(FAREWELL_S), FAREWELL_S)

    def stop(self) -> None:
        """Give back the signals. From the main thread, after `release` and `farewell`."""
        if self._stopped or self._guard.ident is None:
            return
        self._stopped = True
        self._listening.close()
        signal.set_wakeup_fd(self._wakeup_fd)
        if not self._guard.is_alive():  # else it still reads from there
            self._ear.close()
            self._bell.close()

    # The guard

    def _stand_guard(self) -> None:
        while True:
            signum = self._next_signal()
            if signum is None and self._released.is_set():
                return
            ends = time.monotonic() + GRACE_S
            cause = self._cause(signum)
            if cause is None:
                continue
            timer = end_within(END_S, cause.exit_code)
            if signum in SENT:
                self.settle(cause)
            if not self._released.wait(max(0.0, ends - time.monotonic())):
                self._leave(self.settle(cause))
            timer.cancel()  # the main thread has limits of its own

    def _next_signal(self) -> int | None:
        if not select.select([self._ear], [], [], PERIOD_S)[0]:
            return None
        signals = self._ear.recv(4096)
        return next((signum for signum in (*SENT, signal.SIGINT) if signum in signals), None)

    def _cause(self, signum: int | None) -> Failure | None:
        """The reason to end this process, if there is one."""
        pulse = self._pulse
        waiting_s = self._silence.update([pulse.rounds])[0]
        if pulse.failure is not None:
            return pulse.failure
        if signum is not None:
            told = self._mine(WORDS[signum], 128 + signum)
            return self._trace(told, TERMINATED_S) if signum in SENT else told
        if pulse.silent:
            return self._mine(f"error: {name_ranks(pulse.silent)} has not answered for {self._timeout_s:g} s", 1)
        if self._host_excused():
            return None
        if pulse.lost:
            return self._mine(self._host_lost, 1)
        if waiting_s > self._timeout_s:
            host = "rank 0" if self._hosted else "the launcher"
            return self._mine(f"error: {host} has not answered for {self._timeout_s:g} s", 1)
        return None

    def _trace(self, mine: Failure, seconds: float) -> Failure:
        """What `mine` follows from: another's failure, ranks that no longer beat, a lost store, or else nothing."""
        try:
            failure, lost = self._ask(lambda: self._board.watch(seconds), seconds)
        except RuntimeError:
            return mine if self._host_excused() else replace(mine, message=self._host_lost, exit_code=1)
        return failure or (replace(mine, message=_describe_loss(lost), exit_code=1) if lost else mine)

    def _host_excused(self) -> bool:
        """Whether the store may be gone: rank 0 was done, and did not wait for this rank any longer."""
        return self._hosted and self._pulse.first_gone

    def _ask(self, call: Callable[[], Any], seconds: float = 0.0) -> Any:
        """call(), which takes `seconds`. RuntimeError if it takes longer: a suspended host neither answers nor ends."""
        if self._unanswered:
            raise RuntimeError("the store did not answer before")
        answers: queue.SimpleQueue[tuple[Any, RuntimeError | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((call(), None))
            except RuntimeError as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            value, error = answers.get(timeout=seconds + ANSWER_S)
        except queue.Empty:
            value, error = None, RuntimeError("the store does not answer")
        if error is not None:
            self._unanswered = True
            raise error
        return value

    def _mine(self, message: str, exit_code: int) -> Failure:
        return Failure(self._board.rank, self._stage(), message, exit_code)

    def _leave(self, failure: Failure) -> NoReturn:
        self._rescue()
        self.farewell()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(failure.exit_code)
