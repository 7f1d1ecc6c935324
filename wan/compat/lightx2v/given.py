"""The keys of one configuration, each checked against the table when it is made; which of them were asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

from wan.compat.lightx2v.keys import KEYS, Key
from wan.errors import UsageError
from wan.options.values import shown


def is_nothing(value: Any) -> bool:
    """Whether it asks for nothing."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, Mapping)) and not value)


class Given:
    """Called with a key it gives its value, or None; what nobody asks for is told in the end, by `unused`.

    config: as LightX2V has it; where: the file it is from and ": ", for messages; table: what its keys may be.
    Raises UsageError for keys and values that the table does not let through, one line with the file and the key.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "", table: Mapping[str, Key] = KEYS):
        self.where, self.table, self.notes = where, table, []
        self._values: dict[str, Any] = {}
        self._asked: set[str] = set()
        for name, value in config.items():
            self._take(str(name), value)

    def __call__(self, name: str) -> Any:
        self._asked.add(name)
        return self._values.get(name)

    def refuse(self, name: str, why: str) -> NoReturn:
        raise UsageError(f"{self.where}{name} {shown(self._values.get(name))}: {why}")

    def note(self, name: str, why: str) -> None:
        self.notes.append(f"{self.where}{name} {shown(self._values.get(name))}: {why}")

    def unused(self) -> list[str]:
        """Lines on keys that act, but not in this configuration."""
        left = [name for name, value in self._values.items() if name not in self._asked and not is_nothing(value)]
        return [f"{self.where}{name} {shown(self._values[name])}: has no effect {self.table[name].when}" for name in left]

    def names(self) -> dict[str, str]:
        """Flag -> the keys that set it, for messages."""
        named: dict[str, list[str]] = {}
        for name in self._values.keys() & self._asked:
            for flag in self.table[name].flags:
                named.setdefault(flag, []).append(name)
        return {flag: " and ".join(sorted(keys)) for flag, keys in named.items()}

    def _take(self, name: str, value: Any) -> None:
        key = self.table.get(name)
        if key is None:
            near = difflib.get_close_matches(name, self.table, 1)
            raise UsageError(f"{self.where}unknown key {shown(name)}{f'; is it {near[0]}?' if near else ''}")
        if value is None or (value is False and key.kind != "flag"):  # LightX2V's own word for nothing
            return
        if not _is_of(key.kind, value):
            raise UsageError(f"{self.where}{name} must be {_CALLED[key.kind]}, not {shown(value)}")
        self._values[name] = value
        if key.verdict == "acts" or value in key.fine:
            return
        self._asked.add(name)
        if key.verdict == "refused":
            self.refuse(name, key.why)
        if key.verdict == "idle":
            self.note(name, f"has no effect: {key.why}")


_CALLED = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "numbers": "a number or a list of numbers",
    "table": "a table of keys",
    "list": "a list",
    "text": "text",
    "picture": "a path or a picture",
    "any": "",
}


def _is_of(kind: str, value: Any) -> bool:
    if kind in ("whole", "number"):
        return _is_number(value) and (kind == "number" or value == int(value))
    return {
        "flag": lambda: isinstance(value, bool),
        "numbers": lambda: all(map(_is_number, value)) if isinstance(value, (list, tuple)) else _is_number(value),
        "table": lambda: isinstance(value, Mapping),
        "list": lambda: isinstance(value, (list, tuple)),
        "text": lambda: isinstance(value, str) or hasattr(value, "__fspath__"),
        "picture": lambda: True,  # the option that takes it says what it may be
        "any": lambda: True,
    }[kind]()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
