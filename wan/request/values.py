"""Values of options, as text or as numbers. Each error names the flag and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wan.errors import UsageError
from wan.request.options import MAX_PROMPT_CHARS


def or_default(value: Any, default: Any) -> Any:
    """`value`, or the default where no value was given; unlike `or`, an empty text or a 0 counts as given."""
    return default if value is None else value


def text(text: Any, flag: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"--{flag} must be text, not {text!r}")
    if len(text) > MAX_PROMPT_CHARS:
        raise UsageError(f"--{flag} has {len(text)} characters; at most {MAX_PROMPT_CHARS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--{flag} is not valid UTF-8 text") from error
    return text


def number(value: Any, flag: str, convert: Callable[[Any], Any], allowed: str, fits: Callable[[Any], bool]) -> Any:
    """`value` as a number that `fits`. Flags arrive as text, Python callers and replay give numbers."""
    try:
        if isinstance(value, bool) or (convert is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"--{flag} must be {allowed}, not {value!r}") from error
    if not fits(number):
        raise UsageError(f"--{flag} must be {allowed}, not {value}")
    return number


def whole(value: Any, default: int, flag: str, least: int, most: int) -> int:
    allowed = f"a whole number from {least} to {most}"
    return number(or_default(value, default), flag, int, allowed, lambda n: least <= n <= most)


def choice(value: Any, default: str, flag: str, allowed: tuple[str, ...]) -> str:
    value = or_default(value, default)
    if value not in allowed:
        raise UsageError(f"unknown --{flag} {value!r}; choose one of: {', '.join(allowed)}")
    return value


def is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        return False


def absolute(value: str | None) -> str | None:
    return str(Path(value).resolve()) if value and os.path.exists(value) else value or None
