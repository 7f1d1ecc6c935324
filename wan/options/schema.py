"""How the fields of LoadOptions, Sample and Output say what their options are. No torch.

A field that a user can give is declared by `option`, one that follows from others by `derived`. The command line,
replay, files of options, the engine and the adapters read `flags`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from easydict import EasyDict

from wan.options.values import of_kind

Part = TypeVar("Part")


@dataclass
class Asked:
    """What is being checked. get: the given values by flag, each of its kind or None; done: the fields checked so far,
    of all parts; world_size: processes that make the video together; told: how the task was, where it was not given."""

    spec: EasyDict
    get: Mapping[str, Any]
    world_size: int = 1
    told: str = ""
    warnings: list[str] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)
    _known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What several fields need, made when the first one asks."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


Check = Callable[[Asked, Any], Any]  # (what is checked, the value given or None) -> the value of the field


# What --help calls a value, by its kind.
VALUES = {
    **dict.fromkeys(("texts", "path", "file", "picture"), "FILE"),
    **{"text": "TEXT", "name": "NAME", "pictures": "FILE,FILE,...", "loras": "FILE[:X]"},
    **{"bool": "BOOL", "whole": "N", "number": "X", "numbers": "X,X,..."},
}


@dataclass(frozen=True)
class Option:
    """A flag. kind: see `values.of_kind`; value: what --help calls its value, "": as `VALUES` has it; stored: whether a
    video stores it; spelled: other spellings on the command line; flag: its name, where that is not the field's."""

    kind: str
    help: str
    group: str
    value: str = ""
    stored: bool = True
    spelled: tuple[str, ...] = ()
    flag: str = ""


def option(group: str, kind: str, help: str, check: Check = lambda at, given: given, **more: Any) -> Any:
    """A field that a flag sets, see Option. check: also fills in the default, and raises UsageError."""
    return field(metadata={"option": Option(kind, help, group, **more), "check": check})


def is_given(at: Asked, given: Any) -> bool:
    """The check of a flag without a value."""
    return bool(given)


def derived(check: Callable[[Asked], Any], **of_field: Any) -> Any:
    """A field that follows from what was checked before."""
    return field(metadata={"check": lambda at, given: check(at)}, **of_field)


def flag_of(one: Field) -> str:
    """The flag that sets a field; the field's own name where none does."""
    return getattr(one.metadata.get("option"), "flag", "") or one.name


def options_of(part: type) -> Iterator[tuple[str, Option]]:
    """The flags of a part: those of its fields, and those it lists as `OTHERS`."""
    for one in fields(part):
        if "option" in one.metadata:
            yield flag_of(one), one.metadata["option"]
    yield from part.OTHERS.items()


def check_part(part: type[Part], at: Asked) -> Part:
    """The part, its fields checked in their order. Raises UsageError or SwanError, one line."""
    values = {}
    for one in fields(part):
        values[one.name] = at.done[one.name] = one.metadata["check"](at, at.get.get(flag_of(one)))
    return part(**values)


def of_kinds(given: Mapping[str, Any], flags: Mapping[str, Option]) -> dict[str, Any]:
    """A value or None for each flag. Raises UsageError for one that is not of the flag's kind."""
    return {name: of_kind(given.get(name), name, one.kind) for name, one in flags.items()}
