"""The keys of one configuration, each checked against the table when it is made; which of them were asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, NoReturn

from wan.compat.lightx2v.keys import KEYS, Key
from wan.errors import UsageError
from wan.options.values import shown


def is_nothing(value: Any) -> bool:
    """Whether it asks for nothing."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def place_of(key: str, places: str | Mapping[str, str]) -> str:
    """The file that a key is from, for the beginning of a message."""
    place = places if isinstance(places, str) else places.get(key)
    return f"{place}: " if place else ""


class Given:
    """Called with a key it gives its value, or None; what nobody asks for is told in the end, by `unused`.

    config: as LightX2V has it; places: the file that it is from, or that of each key, for messages; defaults: keys that
    nobody gave; ours: options of ours that go first; table: what keys may be, those of the value of `within`, where
    that is one.
    Raises UsageError for keys and values that the table does not let through, one line with the file and the key.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        places: str | Mapping[str, str] = "",
        defaults: Collection[str] = (),
        ours: Mapping[str, Any] | None = None,
        table: Mapping[str, Key] = KEYS,
        within: str = "",
    ):
        self.table, self.notes, self.ours = table, [], ours or {}
        self._places, self._within = places, within
        self._values: dict[str, Any] = {}
        self._asked, self._defaults = set(), defaults
        for name, value in config.items():
            self._take(str(name), value)

    def __call__(self, name: str) -> Any:
        self._asked.add(name)
        return self._values.get(name)

    def is_default(self, name: str) -> bool:
        return name in self._defaults

    def where(self, name: str) -> str:
        """The beginning of a message about a key."""
        outer = self._within.partition(" ")[0]
        return place_of(outer or name, self._places) + (f"{self._within}: " if self._within else "")

    def inner(self, name: str, value: Mapping[str, Any], table: Mapping[str, Key], number: int = 0) -> Given:
        """The keys of a table that is the value of a key, or a part of it."""
        return Given(value, self._places, (), {}, table, f"{name} {number}" if number else name)

    def refuse(self, name: str, why: str) -> NoReturn:
        raise UsageError(f"{self.where(name)}{name} {shown(self._values.get(name))}: {why}")

    def note(self, name: str, why: str) -> None:
        self.notes.append(f"{self.where(name)}{name} {shown(self._values.get(name))}: {why}")

    def unused(self) -> list[str]:
        """Lines on keys that act, but not in this configuration."""
        for name in [one for one in self._values if one not in self._asked and one not in self._defaults]:
            if not is_nothing(self._values[name]):
                self.note(name, f"has no effect {self.table[name].when}")
        return self.notes

    def names(self) -> dict[str, str]:
        """Flag -> the keys that set it, for messages."""
        named: dict[str, list[str]] = {}
        for name in [one for one in self._values if one in self._asked and not is_nothing(self._values[one])]:
            for flag in self.table[name].flags:
                named.setdefault(flag, []).append(name)
        return {flag: " and ".join(sorted(keys)) for flag, keys in named.items()}

    def _take(self, name: str, value: Any) -> None:
        key = self.table.get(name)
        if key is None:
            near = difflib.get_close_matches(name, self.table, 1)
            raise UsageError(f"{self.where(name)}unknown key {shown(name)}{f'; is it {near[0]}?' if near else ''}")
        if value is None or (value is False and key.kind != "flag"):  # LightX2V's own word for nothing
            return
        if not _is_of(key.kind, value):
            raise UsageError(f"{self.where(name)}{name} must be {_CALLED[key.kind]}, not {shown(value)}")
        self._values[name] = value
        if key.verdict in ("acts", "told"):
            return
        self._asked.add(name)
        said = list(value) if isinstance(value, tuple) else value
        if name in self._defaults or any(type(one) is type(said) and one == said for one in key.fine):
            return
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
