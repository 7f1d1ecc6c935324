"""Which task a checkpoint is for, told from its transformers' tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError, one_line, printable
from wan.tasks import load_task, task_names
from wan.weights.infer import check_dit, identify
from wan.weights.locate import OVERRIDES, in_cache, locate
from wan.weights.source import Source, open_source


def tell_task(ckpt_dir: str | None, files: Mapping[str, str]) -> str:
    """The name of the one task that the transformer fits, or both of them: those among `files` ("dit", "high", "low"),
    or in the folder, or what lies in the cache of a hub id; of one that is not there, the task that names it.

    Raises UsageError where none fits or several do, with what was found, and SwanError for files that are damaged.
    """
    specs = [load_task(name) for name in task_names()]
    if ckpt_dir and not Path(ckpt_dir).exists():
        named = [spec.name for spec in specs if ckpt_dir.partition("@")[0] in spec.get("hub", ())]
        ckpt_dir = str(in_cache(ckpt_dir) or "") or None
        if ckpt_dir is None and len(named) == 1:
            return named[0]
    sources: dict[tuple[str, ...], Source] = {}
    fitting, seen = [], {}
    for spec in specs:
        try:
            for paths in _transformers(ckpt_dir, spec, files):
                key = tuple(map(str, paths))
                if key not in sources:
                    sources[key] = open_source(paths)
                seen[sources[key].describe()] = sources[key]
                check_dit(sources[key], spec)
        except SwanError:
            continue
        fitting.append(spec.name)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"this checkpoint fits the tasks {', '.join(fitting)}: say which with --task")
    told = "; ".join(f"{name} holds {identify(source) or 'no Wan transformer'}" for name, source in seen.items())
    raise UsageError(f"cannot tell the task of this checkpoint: {told or _why(ckpt_dir, files, specs)}; give --task")


def _transformers(ckpt_dir: str | None, spec: Mapping[str, Any], files: Mapping[str, str]) -> list[list[Path]]:
    """The files of each. Raises SwanError where one is missing."""
    given = {name: path for name, path in files.items() if name in ("dit", "high", "low")}
    # A file stands in for what is not looked at.
    others = {name: __file__ for name in OVERRIDES if name not in ("dit", "high", "low")}
    return list(locate(ckpt_dir, spec, {**others, **given}).dit.values())


def _why(ckpt_dir: str | None, files: Mapping[str, str], specs: list[Any]) -> str:
    try:
        _transformers(
            ckpt_dir, next(spec for spec in specs if ("experts" in spec) == ("high" in files or "low" in files)), files
        )
    except SwanError as error:
        return one_line(error)
    return f"nothing is known of {printable(ckpt_dir)}"
