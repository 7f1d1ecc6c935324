"""What is written appears whole or not at all. What killed runs left is removed, what others are writing is not."""

import os
import subprocess
import sys
import time

import pytest

from wan.files import atomic, atomic_folder

fcntl = pytest.importorskip("fcntl")  # on Windows an open file cannot be removed

LEFT = """
import os, sys
from pathlib import Path
from wan.files import atomic, atomic_folder
with (atomic_folder if sys.argv[1] == "folder" else atomic)(Path("out")) as temporary:
    (temporary / "part" if sys.argv[1] == "folder" else temporary).write_text("half")
    os._exit(9)
"""


def hidden(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_removed_by_the_next(kind, tmp_path, monkeypatch):
    root = os.getcwd()
    done = subprocess.run([sys.executable, "-c", LEFT, kind], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 9 and len(hidden(tmp_path)) == 1
    with atomic(tmp_path / "next") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["next"] and (tmp_path / "next").read_text() == "whole"


def test_what_others_are_writing_stays(tmp_path):
    with atomic(tmp_path / "a") as one, atomic_folder(tmp_path / "b") as other:
        with atomic(tmp_path / "c"):
            assert {one.name, other.name} < hidden(tmp_path)
        one.write_text("one")
        (other / "two").write_text("two")
    assert (tmp_path / "a").read_text() == "one" and (tmp_path / "b" / "two").read_text() == "two"
    assert not hidden(tmp_path)


def test_files_of_other_machines_are_left_for_a_day(tmp_path):
    """Their locks may not be seen here."""
    fresh, old, kept = (tmp_path / f".swan-{name}" for name in ("01234567-aa.tmp", "01234567-bb.tmp", "cc.old"))
    for path in (fresh, old, kept):
        path.write_text("half")
        os.utime(path, (time.time() - 3600 * (1 if path == fresh else 25),) * 2)
    with atomic(tmp_path / "a"):
        assert fresh.exists() and not old.exists() and kept.exists()


def test_links_and_pipes_under_such_names_are_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with atomic(tmp_path / "a") as temporary:
        prefix = temporary.name.rpartition("-")[0]
    (tmp_path / f"{prefix}-1.tmp").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / f"{prefix}-2.tmp")
    with atomic(tmp_path / "a"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_takes_the_place_of_another(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"] and not hidden(tmp_path)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"] and not hidden(tmp_path)
