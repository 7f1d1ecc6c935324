"""Values of options, as text or as numbers. Each error names the flag and what is allowed."""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from wan.errors import UsageError
from wan.files import open_plain
from wan.options.names import MAX_CHARS, MAX_PICTURES, MAX_TEXTS

QUOTES = "'\""
MAX_FP32 = 3.4e38  # what is computed with is held in fp32
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 2


def or_default(value: Any, default: Any) -> Any:
    """`value`, or the default where no value was given; unlike `or`, an empty text or a 0 counts as given."""
    return default if value is None else value


def of_kind(value: Any, flag: str, kind: str) -> Any:
    """`value`, which must be of the kind that its flag takes, whoever gave it: a Python caller or the file of a replay.

    kind: text, texts (a list, or the path of a file with one a line), name (short), path or file (comes back as text, ~
    expanded), picture (or a PIL image or array), pictures (a list of those, or text with commas between them), flag or
    bool, number or whole (or text for one), numbers (text, one number or a list), loras (text, a pair of path and
    strength, or a list of both). None stays None.

    Raises UsageError.
    """
    if value is None:
        return None
    if kind == "pictures":
        parts = value if isinstance(value, (list, tuple)) else value.split(",") if isinstance(value, str) else [value]
        if len(parts) > MAX_PICTURES or any(part is None for part in parts):
            raise UsageError(f"--{flag} must be 1 to {MAX_PICTURES} pictures, not {shown(value)}")
        return [of_kind(part.strip() if isinstance(part, str) else part, flag, "picture") for part in parts]
    if kind == "texts":
        parts = list(value) if isinstance(value, (list, tuple)) else _lines(value, flag)
        if not parts or len(parts) > MAX_TEXTS:
            raise UsageError(f"--{flag} must be 1 to {MAX_TEXTS} texts, not {len(parts)}")
        parts = [of_kind(part, flag, "text") for part in parts]
        if not all(part and part.strip() for part in parts):
            raise UsageError(
                f"--{flag}: text {[bool(part and part.strip()) for part in parts].index(False) + 1} is empty"
            )
        return parts
    if kind == "picture" and isinstance(value, str) and not value:
        raise UsageError(f"--{flag} is an empty path")
    if kind == "picture" and not isinstance(value, (str, os.PathLike)):
        return _picture(value, flag)
    kind = {"picture": "path", "file": "path", "bool": "flag", "whole": "number"}.get(kind, kind)
    if kind in MAX_CHARS:
        value = os.fspath(value) if kind == "path" and isinstance(value, os.PathLike) else value
        if kind == "text" and isinstance(value, str):
            with contextlib.suppress(UnicodeError):  # where the system says that it is not UTF-8, and the terminal is
                value = os.fsencode(value).decode("utf-8")
        _check_text(value, flag, kind)
        return os.path.expanduser(value) if kind == "path" else value
    parts = value if isinstance(value, (list, tuple)) else [value]
    fits, allowed = {
        "flag": (isinstance(value, bool), "true or false"),
        "number": (_numeric(value), "a number"),
        "numbers": (all(map(_numeric, parts)), "a number or a list of numbers"),
        "loras": (_is_lora(value) or all(map(_is_lora, parts)), "FILE, FILE:STRENGTH or a list of [FILE, STRENGTH]"),
    }[kind]
    if not fits:
        raise UsageError(f"--{flag} must be {allowed}, not {shown(value)}")
    return value


def _lines(value: Any, flag: str) -> list[str]:
    """Of a file, without those that are empty."""
    path = of_kind(value, flag, "path")
    if not os.path.isfile(path):
        raise UsageError(f"--{flag}: no file {path}")
    try:
        with open_plain(path) as file:
            text = file.read(MAX_TEXTS * MAX_CHARS["text"]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--{flag}: {path} is not UTF-8 text") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _picture(value: Any, flag: str) -> Any:
    """A PIL image, or a uint8 array [H, W, 3], as PIL image."""
    if hasattr(value, "__array_interface__"):
        from PIL import Image

        if isinstance(value, Image.Image):
            return value
        if getattr(value, "dtype", None) == "uint8" and value.ndim == 3 and value.shape[2] == 3 and value.size:
            return Image.fromarray(value)
    raise UsageError(f"--{flag} must be a path, a PIL image or an array uint8 [H, W, 3], not {shown(value)}")


def _check_text(value: Any, flag: str, kind: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"--{flag} must be {'a path' if kind == 'path' else 'text'}, not {shown(value)}")
    if len(value) > MAX_CHARS[kind]:
        raise UsageError(f"--{flag} has {len(value)} characters; at most {MAX_CHARS[kind]} are allowed")
    try:
        os.fsencode(value) if kind == "path" else value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--{flag} is not valid UTF-8 text") from error
    if kind == "path" and "\0" in value:
        raise UsageError(f"--{flag}: no file has a null byte in its name")


def _numeric(value: Any) -> bool:
    return isinstance(value, (str, Real)) and not isinstance(value, bool)


def _is_lora(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and _numeric(value[1])
    path = value[0] if pair else value
    return isinstance(path, (str, os.PathLike)) and len(os.fspath(path)) <= MAX_CHARS["path"]


def shown(value: Any) -> str:
    """A value for a message: however long or deep it is, a few words."""
    return _SHORT.repr(value).replace("\n", " ")  # of an array


def number(value: Any, flag: str, convert: Callable[[Any], Any], allowed: str, fits: Callable[[Any], bool]) -> Any:
    """`value` as a number that `fits`. Flags arrive as text, Python callers and replay give numbers."""
    try:
        if isinstance(value, bool) or (convert is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"--{flag} must be {allowed}, not {shown(value)}") from error
    if not fits(number) or (convert is float and abs(number) > MAX_FP32):
        raise UsageError(f"--{flag} must be {allowed}, not {shown(value).strip(QUOTES)}")
    return number


def listed(value: Any) -> list[Any]:
    """The parts of a list, or of text with commas or blanks between them."""
    if isinstance(value, str):  # between two commas there is an empty part
        return [one for part in value.split(",") for one in part.split() or [""]]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def whole(value: Any, default: int, flag: str, least: int, most: int) -> int:
    allowed = f"a whole number from {least} to {most}"
    return number(or_default(value, default), flag, int, allowed, lambda n: least <= n <= most)


def choice(value: Any, default: str, flag: str, allowed: tuple[str, ...]) -> str:
    value = or_default(value, default)
    if value not in allowed:
        raise UsageError(f"unknown --{flag} {shown(value)}; choose one of: {', '.join(allowed)}")
    return value


def is_number(value: Any) -> bool:
    """Whether it is a number, or text for one, that fp32 can hold."""
    try:
        return abs(float(value)) <= MAX_FP32 and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        return False


def absolute(value: str | None) -> str | None:
    return str(Path(value).resolve()) if value and os.path.exists(value) else value or None
