"""The committed cases, and those of the folder in SWAN_GOLDEN, as pytest tests."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.golden.__main__ import main, replay
from tests.golden.cases import Case, hash_tensor, load_cases

FOLDERS = [Path(__file__).parent / "cases"]
if os.environ.get("SWAN_GOLDEN"):
    FOLDERS.append(Path(os.environ["SWAN_GOLDEN"]))
CASES = load_cases(FOLDERS[0])


def _is_here(case: Case) -> bool:
    """Whether the very same case is among the committed ones."""
    here = next((one for one in CASES if one.name == case.name), None)
    if here is None or None in (here.tensors_path, case.tensors_path):
        return False
    return here.meta == case.meta and filecmp.cmp(here.tensors_path, case.tensors_path, shallow=False)


CASES += [case for folder in FOLDERS[1:] if folder.is_dir() for case in load_cases(folder) if not _is_here(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case):
    with torch.no_grad():
        outcome, line = replay(case)
    if outcome == "without runner":
        pytest.skip(line)
    assert outcome == "passed", line


def test_weights_from_a_hash():
    """The first values that the generator of the cases lists for one of its tensors."""
    values = hash_tensor("padding_tokens", [1, 1, 1, 32], 3.464102, seed=1606)
    assert values.shape == (1, 1, 1, 32)
    assert values.flatten()[:3].tolist() == [-1.6756021976470947, 0.8761967420578003, -1.3084405660629272]


def test_periodic_storage(tmp_path):
    save_file({"tiled/weights/w": torch.arange(3.0)}, tmp_path / "case.safetensors")
    (tmp_path / "case.json").write_text(json.dumps({"tiled": {"weights/w": [2, 4]}}))
    (case,) = load_cases(tmp_path)
    assert case.group("weights")["w"].tolist() == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert replay(case)[0] == "without runner"


def test_a_crash_is_a_failure(tmp_path):
    (tmp_path / "broken.json").write_text(json.dumps({"kind": "scheduler", "solver": "unipc", "tensors": {}}))
    (tmp_path / "worse.json").write_text(json.dumps({"samples": [{}]}))
    lines = [replay(case) for case in load_cases(tmp_path)]
    assert [outcome for outcome, _ in lines] == ["failed", "failed"]
    assert main([str(tmp_path)]) == 1
