"""What the command lines share: a parser and a failure that end in one line on stderr and an exit code.

Exit codes: 0 done, 1 a file or the machine is at fault, 2 the request is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from wan.errors import SwanError, UsageError, one_line


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def run_command(body: Callable[[], int], report: Callable[[str, int], int] | None = None) -> int:
    """Run `body` and return its exit code, or that of its failure. Never raises for a failed run.

    report: takes the line about the failure and the exit code, and returns the one to end with; prints it by default.
    """
    report = report or _print
    try:
        return body()
    except KeyboardInterrupt:
        return _fail("interrupted", 130, report)
    except SwanError as error:
        return _fail(f"error: {one_line(error)}", error.exit_code, report)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {one_line(error)}"
        return _fail(f"{message} (set SWAN_DEBUG=1 to see where)", 1, report)


def _fail(message: str, exit_code: int, report: Callable[[str, int], int]) -> int:
    if os.environ.get("SWAN_DEBUG") == "1":
        traceback.print_exc()
    return report(message, exit_code)


def _print(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code
