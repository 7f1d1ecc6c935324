"""What the command lines share: a parser, signals, and a failure that ends in one line on stderr and an exit code.

Exit codes: 0 done, 1 a file or the machine is at fault, 2 the request is wrong, 130 interrupted (SIGINT), 143
terminated (SIGTERM), 129 hung up (SIGHUP). What cannot be said on stderr is no reason to end a run; a reader of stdout
that has gone wants no more, which is no failure either.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from wan.distributed.signals import Signals, listening
from wan.errors import SwanError, UsageError, one_line


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's. SwanError where there is no folder to work in; --help needs none."""
        parsed = super().parse_args(*args, **kwargs)
        try:
            os.getcwd()
        except OSError as error:  # libraries of torch end the process
            raise SwanError(f"the working folder is gone ({error.strerror}); cd to one that is there") from error
        return parsed

    def _print_message(self, message: str, file: Any = None) -> None:
        put(message, end="")  # --help and --version


def module_parser(module: str, doc: str | None, **more: Any) -> Parser:
    """Of `python -m MODULE`, which is told of as it stands in `doc`."""
    how = argparse.RawDescriptionHelpFormatter
    return Parser(prog=f"python -m {module}", description=doc, formatter_class=how, allow_abbrev=False, **more)


def run_process(main: Callable[[], int]) -> NoReturn:
    """A command line as a process: run `main`, which may import what it needs, and exit with what it returns."""
    _open_standard_files()
    with listening() as signals:
        try:
            code = run_command(main)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):
                _drop(stream)
        signals.leave(code)
    sys.exit(code)


def run_command(body: Callable[[], int], report: Callable[[str, int], int] | None = None) -> int:
    """Run `body` and return its exit code, or that of its failure. Never raises for a failed run.

    report: takes the line about the failure and the exit code, and returns the one to end with; prints it by default.
    """
    report = report or _print
    with _forgiving_stderr(), listening() as signals:
        try:
            return body()
        except (Exception, KeyboardInterrupt) as error:
            message, exit_code = _describe(error, signals)
            signals.end()
            if os.environ.get("SWAN_DEBUG") == "1":
                traceback.print_exc()
            return report(message, exit_code)


def put(text: str, end: str = "\n") -> None:
    """Print on stdout, at once. SwanError where it cannot be written; a reader that has gone is no error."""
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.write(_encodable(text + end, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
    except (OSError, ValueError) as error:  # ValueError: closed since
        _drop(sys.stdout)
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SwanError(f"cannot write to standard output: {reason}") from error


def _describe(error: BaseException, signals: Signals) -> tuple[str, int]:
    """The line about a failure, and its exit code. What fails after a signal fails because of it."""
    if isinstance(error, KeyboardInterrupt) or signals.received is not None:
        return signals.word, signals.exit_code
    if isinstance(error, SwanError):
        return f"error: {one_line(error)}", error.exit_code
    message = f"internal error: {type(error).__name__}: {one_line(error)}"
    return f"{message} (set SWAN_DEBUG=1 to see where)", 1


def _print(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code


class _Forgiving:
    """A stream for messages that may be closed, full, or without a reader."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(_encodable(text, self._stream))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _forgiving_stderr() -> Iterator[None]:
    """print(file=sys.stderr), progress bars and the warnings of libraries never fail within."""
    if isinstance(sys.stderr, _Forgiving):
        yield
        return
    with contextlib.ExitStack() as stack:
        # Without a stderr, print(file=sys.stderr) would print on stdout.
        stream = sys.stderr or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stderr(_Forgiving(stream)))
        yield


def _encodable(text: str, stream: TextIO) -> str:
    """The text with escapes for what the stream's encoding does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _open_standard_files() -> None:
    """A file that is opened later must not take the number of a closed stdin, stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _drop(stream: TextIO) -> None:
    """What a stream holds and could not write is written nowhere, or Python's end would try again and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
