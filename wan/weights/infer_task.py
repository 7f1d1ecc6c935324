"""The task of a checkpoint, told from the shapes of its transformer. No torch, but where that fails."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError
from wan.tasks import load_task, task_names
from wan.weights.containers import gguf_header, pth_header
from wan.weights.containers.opened import OpenedFile
from wan.weights.containers.safetensors_header import read_header, read_index
from wan.weights.infer import describe_dit, infer_dit_config, misfits
from wan.weights.locate import EXPERT, files_at, locate
from wan.weights.source import Source, TensorInfo, open_source, sniff

_VERSION = re.compile(r"wan[-_. ]?2[-_. ]?([12])(?!\d)", re.IGNORECASE)  # in names, of 2.1 or 2.2
_BOTH = "give both with --high and --low"


def infer_task(ckpt_dir: str, files: Mapping[str, str], among: Sequence[str] = ()) -> tuple[str, str]:
    """(name of the task, how it was told). ckpt_dir: a folder or hub id; files: single files in place of the folder's,
    by "dit", or "high" and "low"; one of all these is there. among: the tasks that it may be, all where there are none.

    The task is one whose YAML has these shapes. Raises UsageError where it cannot be told, SwanError for files that are
    no transformer, or that of no task.
    """
    specs = [load_task(name) for name in among or task_names()]
    for part in ("dit", "high", "low"):
        if part in files:
            return _of_file(Path(files[part]), specs, has_two=part != "dit"), f"told from {files[part]}"
    by_name = [spec.name for spec in specs if ckpt_dir.partition("@")[0] in spec.get("hub", ())]
    if len(by_name) == 1 and not os.path.isdir(ckpt_dir):
        return by_name[0], "told from the hub id"
    return _of_folder(ckpt_dir, specs), "told from the checkpoint"


def _of_file(path: Path, specs: Sequence[Any], has_two: bool) -> str:
    source, config = _look(files_at(path))
    fits = [spec for spec in specs if not misfits(config, spec)]
    alone, pairs = ([spec.name for spec in fits if ("experts" in spec) == two] for two in (False, True))
    if not has_two and pairs:
        name, experts = f"{path.parent.name}/{path.name}", " or ".join(pairs)
        version = _VERSION.search(path.name) or _VERSION.search(path.parent.name)
        if EXPERT.search(name) or not alone or (version and version[1] == "2"):
            raise UsageError(f"{path}: one of the two experts of {experts}, as it seems; {_BOTH}")
        if not version:
            told = f"{', '.join(alone)}, or one of the two experts of {experts}"
            raise UsageError(f"{path}: may be {told}; say which with --task, or {_BOTH}")
    return _one(source, pairs if has_two else alone, specs, "of two experts " if has_two else "")


def _of_folder(ckpt_dir: str, specs: Sequence[Any]) -> str:
    """Of one that has two experts, all else is left out: under diffusers' names the first is found alone as well."""
    problems, found = [], []
    for spec in specs:
        try:
            parts = locate(ckpt_dir, spec, partial=True).dit.values()
        except SwanError as error:  # several files to choose from
            problems.append(error)
            continue
        if any(parts):
            found.append((all(parts), spec, tuple(next(filter(None, parts)))))
    if not found:
        if problems:
            raise problems[0]
        if not os.path.isdir(ckpt_dir):
            raise UsageError(
                f"{ckpt_dir}: not here to be looked into: say with --task what it is: {', '.join(task_names())}"
            )
        locate(ckpt_dir, next((spec for spec in specs if "experts" not in spec), specs[0]))  # says what is missing
    looks, faults = {}, []
    for *_, files in found:
        try:
            looks[files] = _look(files)
        except SwanError as error:  # a branch alone, to tasks that know nothing of its base
            faults.append(error)
    if not looks:
        raise faults[0]
    found = [one for one in found if one[2] in looks]
    fits = [(whole, spec, files) for whole, spec, files in found if not misfits(looks[files][1], spec)]
    for is_whole, has_two in ((True, True), (True, False), (False, True)):
        some = {spec.name: files for whole, spec, files in fits if (whole, "experts" in spec) == (is_whole, has_two)}
        for files in some.values():
            if not has_two and len(files) == 1 and EXPERT.search(files[0].name):
                return _of_file(files[0], specs, has_two=False)
            return _one(looks[files][0], list(some), specs)
    return _one(looks[found[0][2]][0], [], specs)


def _one(source: Source, fits: Sequence[str], specs: Sequence[Any], which: str = "") -> str:
    if not fits:
        tasks = f"no task {which}has such a transformer ({', '.join(spec.name for spec in specs)})"
        raise SwanError(f"{source.describe()}: holds {describe_dit(source)}; {tasks}")
    if len(fits) > 1:
        raise UsageError(f"{source.describe()}: may be {' or '.join(fits)}; say which with --task")
    return fits[0]


def _look(paths: Sequence[Path]) -> tuple[Source, dict[str, Any]]:
    """The file, and the configuration of the transformer in it."""
    try:
        shapes = {name: tuple(shape) for path in paths for name, shape in _read_shapes(path).items()}
        source = Source(paths, {name: TensorInfo(shape, None) for name, shape in shapes.items()})
        return source, infer_dit_config(source)
    except SwanError:  # MLX has other names; or the file is at fault, and it is said how
        source = open_source(paths)
        return source, infer_dit_config(source)


def _read_shapes(path: Path) -> dict[str, Sequence[int]]:
    """Name -> shape of the tensors of a file, or of the shards of an index."""
    kind = sniff(path)
    if kind == "index":
        shards = {path.parent / name for name in read_index(path).values()}
        return {name: shape for shard in sorted(shards) for name, shape in _read_shapes(shard).items()}
    if kind == "safetensors":
        return {name: one["shape"] for name, one in read_header(path)[0].items() if name != "__metadata__"}
    opened = OpenedFile(path)
    if kind == "pth":
        return {name: view.shape for name, view in pth_header.read_header(opened).items()}
    with opened.open() as file:
        return {one.name: one.ne[::-1] for one in gguf_header.read_header(path, file, opened.size_bytes).tensors}
