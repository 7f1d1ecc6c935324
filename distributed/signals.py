"""How a process hears that it should end: SIGINT, SIGTERM and SIGHUP are one thing, alone or as one of several.

The first signal raises KeyboardInterrupt in the main thread. Python drops that exception where it is raised in a
`__del__` or a callback, C code may swallow it, and an import that it hits may go on half done: so the signal is
remembered, raised again where Python says that it dropped it, kept back during imports, and looked at by `check`.
Imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

REPEAT_S = 3.0  # a signal within so long of the one before is the same one: `timeout` and terminals send several
AGAIN_S = 0.05  # from a dropped exception to the next: by then, the callback is over

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    WORDS[signal.SIGHUP] = "terminated (hangup)"


class Signals:
    """The signals of this process, see `listening`. received: the first one."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._raised_at = -math.inf
        self._held = 0
        self._ending = False
        self._handlers: dict[int, Any] = {}
        self._hook: Any = None

    @property
    def word(self) -> str:
        """What is said of the end that was asked for."""
        return WORDS[self.received or signal.SIGINT]

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or signal.SIGINT)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self.received is not None and not self._ending:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, a first signal is remembered, and raised at the end or by `check`; a later one is raised at once."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held:
            self.check()

    def end(self) -> None:
        """The process is ending by itself: from here on, signals change nothing."""
        self._ending = True

    def leave(self, exit_code: int) -> None:
        """All is done and said but for what libraries do at the end of a process, which a signal now cuts short."""
        for signum in self._handlers:
            signal.signal(signum, lambda *_: os._exit(exit_code))
        self._handlers.clear()  # nothing is given back
        atexit.register(_end, exit_code)  # is called first, being last

    def _listen(self) -> None:
        for signum in WORDS:
            # nohup ignores SIGHUP, and a shell SIGINT for what it starts in the background: so be it.
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._handlers[signum] = signal.signal(signum, self._receive)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped

    def _stop(self) -> None:
        sys.unraisablehook = self._hook
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: set by C code, which Python cannot do

    def _receive(self, signum: int, frame: object) -> None:
        is_first = self.received is None
        self.received = self.received or signum
        repeated = time.monotonic() - self._raised_at < REPEAT_S
        if self._ending or repeated or (is_first and self._held):
            return
        self._raised_at = time.monotonic()
        raise KeyboardInterrupt

    def _dropped(self, report: Any) -> None:
        """Python's hook for exceptions that nobody can catch."""
        if self.received is None or not issubclass(report.exc_type, KeyboardInterrupt):
            self._hook(report)
            return
        self._raised_at = -math.inf
        # Not from here: the handler would run in this very call.
        timer = threading.Timer(AGAIN_S, _interrupt_main_thread, [self.received])
        timer.daemon = True
        timer.start()


def _interrupt_main_thread(signum: int) -> None:
    """A signal of another thread would be handled by the main one, but not wake it where it sleeps or waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signum)
    else:  # Windows
        signal.raise_signal(signum)


_current: Signals | None = None


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """The signals of this process, heard within. Inside another `listening`: the same ones. In a thread: none."""
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Signals()
        return
    _current = signals = Signals()
    try:
        signals._listen()
        yield signals
    finally:
        signals._stop()
        _current = None


def _end(exit_code: int) -> None:
    """What else is called at the end of a process, and that end: taking down what torch imports would take a second."""
    atexit.unregister(_end)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
