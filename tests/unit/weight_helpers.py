"""Sources without files, and where to find the facts and golden cases."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.golden.cases import Case, load_cases
from wan.plan.runs import build
from wan.tasks import load_task
from wan.weights.source import Source, TensorInfo

REPO = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SWAN_SHARED", REPO.parent / "shared"))


class DictSource(Source):
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor], path: str = "memory.safetensors"):
        super().__init__([Path(path)], {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()})
        self._tensors = tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if rows is None else tensor[slice(*rows)]).clone()


class ShapeSource(Source):
    """A checkpoint of which only names and shapes exist."""

    def __init__(self, shapes: dict[str, list[int]], path: str = "shapes.safetensors"):
        super().__init__([Path(path)], {name: TensorInfo(tuple(s), torch.bfloat16) for name, s in shapes.items()})


def sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A safetensors file of these shapes in bf16, whose data is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@cache
def dit_shapes(task: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a task's transformer."""
    return {name: tuple(one.shape) for name, one in build("dit", load_task(task).dit).state_dict().items()}


@cache
def fact(relative: str):
    """A JSON file of the facts folder; skips the test where that folder is absent."""
    path = SHARED / "facts" / relative
    if not path.is_file():
        pytest.skip(f"{path} is not here; set SWAN_SHARED")
    return json.loads(path.read_text(encoding="utf-8"))


def manifest(name: str) -> dict[str, list[int]]:
    """Tensor name -> shape of a released checkpoint."""
    return dict(fact(f"state_dicts/{name}.json"))


def golden(name: str) -> Case:
    """A golden case from the repository, else from the shared folder; skips if it is in neither."""
    for folder in (REPO / "tests" / "golden" / "cases", SHARED / "golden"):
        if (folder / f"{name}.json").exists() or (folder / name / "samples.json").exists():
            return next(case for case in load_cases(folder) if case.name == name)
    pytest.skip(f"golden case {name} is not here; set SWAN_SHARED")


@contextlib.contextmanager
def memory_asked_for(monkeypatch, limit_bytes: int):
    """Within, `torch.empty` may be asked for so much in all: tracemalloc does not see the memory of tensors."""
    empty, asked = torch.empty, 0

    def counting(*size, dtype=torch.float32, **options):
        nonlocal asked
        sizes = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        asked += math.prod(sizes) * dtype.itemsize
        assert asked <= limit_bytes, f"{asked:,} bytes of tensors, {limit_bytes:,} are allowed"
        return empty(*size, dtype=dtype, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counting)
        yield
