"""Which network of a task runs at a step, and which ones are in memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class Experts:
    """The networks of a task by name ("model", or "high" and "low"), each loaded when it is first asked for.

    `keep_all` False: asking for one lets go of the other first, so that two experts never share the memory.
    """

    def __init__(self, load: Callable[[str], nn.Module], keep_all: bool):
        self._load, self._keep_all = load, keep_all
        self._models: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._models:
            if not self._keep_all:
                self._models.clear()
            self._models[name] = self._load(name)
        return self._models[name]

    def release(self) -> None:
        self._models.clear()
