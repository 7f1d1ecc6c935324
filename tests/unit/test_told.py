"""The task told from a checkpoint."""

import json
import shutil

import pytest

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.cli import main
from wan.errors import SwanError, UsageError
from wan.options import build_request
from wan.tasks import REPO, load_task, task_names
from wan.weights.told import tell_task

OFFICIAL = [name for name in task_names() if not load_task(name).get("checkpoint")]
TINY = REPO / "wan/assets/tiny"


@pytest.fixture
def shrunk_tasks(monkeypatch):
    """All tasks, the official ones with little width and depth."""
    real = load_task
    monkeypatch.setattr("wan.weights.told.load_task", lambda name: shrunk(name) if name in OFFICIAL else real(name))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_task_by_its_folder(shrunk_tasks, tmp_path, name):
    folder = write_checkpoint(tmp_path / name, shrunk(name))
    fitting = {one for one in OFFICIAL if _alike(shrunk(one), shrunk(name))}
    if fitting == {name}:
        assert tell_task(str(folder), {}) == name
    else:  # little ones differ in less than those of real size
        with pytest.raises(UsageError, match="fits the tasks .*: say which with --task"):
            tell_task(str(folder), {})


def _alike(one, other):
    return one.dit == other.dit and one.get("experts") == other.get("experts")


def test_the_embedded_one_is_told_and_said(capsys, tmp_path):
    flags = ["--ckpt_dir", str(TINY.parent / "tiny_i2v"), "--dry_run", "--json"]
    assert main([*flags, "--save_file", str(tmp_path / "a.mp4")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["task"] == "i2v-tiny" and "task i2v-tiny, told from the checkpoint" in err
    request = build_request({"dit": str(TINY / "diffusion_pytorch_model.safetensors"), "save_file": "a.mp4"})
    assert request.load.task == "t2v-tiny"


def test_hub_ids_are_known():
    assert tell_task("Wan-AI/Wan2.1-T2V-1.3B", {}) == "t2v-1.3B"
    assert tell_task("Wan-AI/Wan2.2-I2V-A14B", {}) == "i2v-A14B"


def test_what_cannot_be_told(tmp_path):
    with pytest.raises(SwanError, match=r"no transformer of any task is there, or not all of one; --task says"):
        tell_task(str(tmp_path), {})
    shutil.copy(TINY / "Wan2.1_VAE.pth", tmp_path / "a.pth")
    with pytest.raises(UsageError, match="holds a Wan2.1 VAE .*; give --task"):
        tell_task(None, {"dit": str(tmp_path / "a.pth")})
    with pytest.raises(SwanError, match="org/unknown: no transformer"):
        tell_task("org/unknown", {})
