"""One object has the files of a run: found once, opened once, and the same for checks, plan and loading."""

import collections
import json
import os
import shutil

import pytest

from wan.cli import main
from wan.engine import Engine
from wan.errors import SwanError
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.checkpoint import Checkpoint
from wan.weights.containers import gguf, pth, safetensors_file

SPEC = load_task("t2v-tiny")
TINY = embedded_checkpoint(SPEC)
SMALL = {"prompt": "a red circle", "size": "32*32", "frame_num": 5, "sample_steps": 2, "seed": 1}


@pytest.fixture
def opened(monkeypatch):
    """Path of a weight file -> how often its header was read."""
    counts = collections.Counter()

    def counting(module, name):
        read = getattr(module, name)

        def wrapped(first, *rest):
            counts[str(getattr(first, "path", first))] += 1
            return read(first, *rest)

        monkeypatch.setattr(module, name, wrapped)

    counting(safetensors_file, "parse_header")
    counting(gguf, "read_header")
    counting(pth, "read_header")
    return counts


def as_argv(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_a_run_opens_each_file_once(opened, tmp_path, capsys):
    assert main([*as_argv(SMALL), "--save_file", str(tmp_path / "x.mp4"), "--quiet"]) == 0
    assert len(opened) == 3 and set(opened.values()) == {1}, opened


def test_a_dry_run_opens_each_file_once(opened, capsys):
    assert main([*as_argv(SMALL), "--dry_run", "--json"]) == 0
    assert len(opened) == 3 and set(opened.values()) == {1}, opened
    rows = json.loads(capsys.readouterr().out)["files"]
    assert [row["component"] for row in rows] == ["dit", "t5", "tokenizer", "vae"]


def test_an_engine_opens_each_file_once_for_all_videos(opened):
    with Engine(residency="stage") as engine:
        for seed in (1, 2):
            video = engine.generate(**SMALL | {"seed": seed})
            assert video.request.load.checkpoint is None  # or a video would keep files open
    assert len(opened) == 3 and set(opened.values()) == {1}, opened


def test_what_was_checked_is_what_is_read(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    [path] = Checkpoint(folder, SPEC).paths("vae")
    with Engine(ckpt_dir=str(folder)) as engine:
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.replace(tmp_path / "other", path)
        with pytest.raises(SwanError, match="the file changed after it was opened"):
            engine.generate(**SMALL)


def test_missing_components_are_listed_where_they_may_be(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    for path in Checkpoint(folder, SPEC).paths("t5"):
        path.unlink()
    with pytest.raises(SwanError, match="t5 is missing"):
        Checkpoint(folder, SPEC)
    some = Checkpoint(folder, SPEC, partial=True)
    assert some.paths("t5") == [] and some.paths("vae") and some.source("dit") is some.source("model")
    assert not some.hub and Checkpoint("org/no-such-model", SPEC, {"dit": folder}, partial=True).hub
