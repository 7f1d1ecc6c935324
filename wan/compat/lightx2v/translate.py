"""A configuration of LightX2V -> our options, by the table in `keys`. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from easydict import EasyDict

from wan.compat.lightx2v import parts
from wan.compat.lightx2v.given import Given, place_of
from wan.compat.lightx2v.keys import KEYS
from wan.compat.lightx2v.models import model_class, task_of
from wan.errors import SwanError, UsageError
from wan.options import FLAGS, of_part
from wan.options.beside import beside
from wan.options.files import told_task
from wan.options.schema import of_kinds
from wan.tasks import load_task


@dataclass(frozen=True)
class Translated:
    """options: ours, by their flags; spec: of their task; notes: what has no effect here, or another one; names: flag
    -> the keys that set it; schemes: component -> (key, how its weights must be quantised); places: as they were given.
    """

    options: dict[str, Any]
    spec: EasyDict
    notes: tuple[str, ...]
    names: dict[str, str]
    schemes: dict[str, tuple[str, str]]
    places: str | Mapping[str, str] = ""

    def part(self, name: str) -> dict[str, Any]:
        """The options of one part: load, sample or output."""
        return of_part(self.options, name)

    def renamed(self, error: SwanError) -> SwanError:
        """An error about options, which speaks of the keys that they came from."""
        return renamed(error, self.names, self.places)

    def check_schemes(self, checkpoint: Any) -> None:
        """Raises UsageError where a component of a `wan.weights.checkpoint.Checkpoint` is not quantised as keys say."""
        for part, (key, scheme) in self.schemes.items():
            for name in filter(checkpoint.paths, checkpoint.files.dit if part == "dit" else [part]):
                _check_scheme(checkpoint.source(name), f"{place_of(key, self.places)}{key}", scheme)


def renamed(error: SwanError, names: Mapping[str, str], places: str | Mapping[str, str]) -> SwanError:
    """The error, with flags called by the `names` of their keys, and the file of the first of these."""
    return type(error)(retold(str(error), names, places))


def retold(line: str, names: Mapping[str, str], places: str | Mapping[str, str]) -> str:
    """A line about options; as `renamed`."""
    named = [names[flag] for flag in re.findall(r"--(\w+)", line) if flag in names]
    if not named:
        return line
    place = place_of(named[0].split()[0], places)
    if named[0] == "parallel":  # several flags, which the line is about together
        return f"{place}parallel: {line}"
    return place + re.sub(r"--(\w+)", lambda flag: names.get(flag[1], flag[0]), line)


def translate(
    config: Mapping[str, Any],
    places: str | Mapping[str, str] = "",
    given: Mapping[str, Any] | None = None,
    spec: EasyDict | None = None,
    defaults: Collection[str] = (),
) -> Translated:
    """What a configuration means here.

    places: the file that it is from, or that of each key, for messages; given: options of ours beside it, which go
    first; spec: the task, where it is known; defaults: keys that nobody gave. Raises UsageError for keys and values
    that are unknown, wrong, or contradict each other, one line with the file and the key.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    at = Given(config, places, defaults, given)
    options = parts.files(at)
    try:
        spec = spec or _task(at, options | given)
    except SwanError as error:
        raise renamed(error, {flag: keys for flag, keys in at.names().items() if flag not in given}, places) from None
    for part in parts.PARTS:
        options |= part(at, spec)
    options, given = beside({flag: value for flag, value in options.items() if value is not None}, given, spec)
    said = parts.schemes(at, spec)
    _tell_model(at, spec)
    notes = tuple(at.unused())
    names = {flag: keys for flag, keys in at.names().items() if flag in options and flag not in given}
    return Translated({**options, **given, "task": spec.name}, spec, notes, names, said, places)


def _task(at: Given, options: Mapping[str, Any]) -> EasyDict:
    """The task that is given, or that of the model class, or that of the checkpoint, or the default."""
    name, task = at("model_cls"), at("task") or None
    if name is not None:
        model_class(name, at.where("model_cls"))  # is it one of ours?
    if options.get("task") is not None:
        return load_task(options["task"])
    get = of_kinds(options, FLAGS)
    if name is not None:
        return task_of(name, task, get, at.where("task"))
    if task is not None:
        at.refuse("task", "it is told by model_cls, which is not given")
    return load_task(told_task(get)[0])


def _tell_model(at: Given, spec: EasyDict) -> None:
    """Note keys that say what the model has, and say it wrong."""
    for name, key in KEYS.items():
        if key.verdict != "told" or (said := at(name)) is None:
            continue
        has: Any = spec
        for part in key.spec.split("."):
            has = (has or {}).get(part)
        has = has is not None if isinstance(said, bool) else has
        if has != (list(said) if isinstance(said, tuple) else said):
            at.note(name, f"has no effect: {spec.name} has {has!r}")


def _check_scheme(source: Any, key: str, scheme: str) -> None:
    stored = {str(one.name) for name in source.keys() if (one := source.block_type(name)) is not None}
    held = ", ".join(sorted(stored)) or "no quantised"
    family = scheme.split("-")[0]
    if family == "gguf":
        fits = any(name[:1] in "QI" for name in stored)
    else:
        fits = any(name.startswith(family) for name in stored)
    if not fits:
        raise UsageError(f"{key} {scheme!r}: {source.describe()} holds {held} weights")
