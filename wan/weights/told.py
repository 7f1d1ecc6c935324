"""Which task a checkpoint is for, told from its transformers' tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from wan.errors import SwanError, UsageError
from wan.tasks import load_task, task_names
from wan.weights.infer import check_dit, identify
from wan.weights.locate import locate
from wan.weights.source import Source, open_source


def tell_task(ckpt_dir: str | None, files: Mapping[str, str]) -> str:
    """The name of the one task that the transformer fits, or both of them: those among `files` ("dit", "high", "low"),
    or in the folder, or what lies in the cache of a hub id; of one that is not there, the task that names it.

    Raises UsageError where none fits or several do, with what was found, and SwanError for files that are damaged.
    """
    specs = [load_task(name) for name in task_names()]
    sources: dict[tuple[str, ...], Source | SwanError] = {}
    given = {name: path for name, path in files.items() if name in ("dit", "high", "low")}
    fitting = []
    for spec in specs:
        with contextlib.suppress(SwanError):
            found = locate(ckpt_dir, spec, given, partial=True).dit.values()
            if not all(found):
                continue
            for paths in found:
                check_dit(_opened(sources, paths), spec)
            fitting.append(spec.name)
    named = [spec.name for spec in specs if ckpt_dir and ckpt_dir.partition("@")[0] in spec.get("hub", ())]
    if not sources and len(named) == 1:  # a hub id, of which nothing is here
        return named[0]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"this checkpoint fits the tasks {', '.join(fitting)}: say which with --task")
    for damaged in sources.values():
        if isinstance(damaged, SwanError):
            raise damaged
    held = [f"{one.describe()} holds {identify(one) or 'no Wan transformer'}" for one in sources.values()]
    if not held:
        raise SwanError(
            f"{ckpt_dir}: no transformer of any task is there, or not all of one; --task says which is looked for"
        )
    raise UsageError(f"cannot tell the task of this checkpoint: {'; '.join(held)}; give --task")


def _opened(sources: dict[tuple[str, ...], Source | SwanError], paths: list[Path]) -> Source:
    """Each opened once. Raises SwanError for one that is damaged."""
    key = tuple(map(str, paths))
    if key not in sources:
        try:
            sources[key] = open_source(paths)
        except SwanError as error:
            sources[key] = error
    if isinstance(sources[key], SwanError):
        raise sources[key]
    return sources[key]
