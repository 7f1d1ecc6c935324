"""What the wheel installs: `wan` and nothing else, whatever lies beside it or in the working folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCES = ("wan", "cache", "configs", "distributed", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what pip would put in site-packages."""
    work = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, work / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(build, cwd=work, check=True, capture_output=True)
    (wheel,) = (work / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(work / "site")
    return work / "site"


@pytest.fixture
def elsewhere(tmp_path):
    """A working folder with packages whose names were once ours."""
    for name in ("cache", "configs", "distributed", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of the working folder')\n")
    return tmp_path


def run(installed, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_only_wan_is_installed(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"wan"}


def test_the_page_of_a_server_is_installed_whole(installed):
    own = {path.name for path in (REPO / "wan/serve/web").iterdir() if path.is_file()}
    assert own == {path.name for path in (installed / "wan/serve/web").iterdir()}


def test_embedded_models_are_installed_whole(installed):
    assets = REPO / "wan/assets"
    wanted = {path.relative_to(assets) for path in assets.rglob("*") if path.is_file()}
    assert {path.relative_to(installed / "wan/assets") for path in (installed / "wan/assets").rglob("*.*")} >= wanted


def test_a_wheel_makes_a_video_where_folders_have_its_old_names(installed, elsewhere):
    size = ("--frame_num", "1", "--sample_steps", "1", "--save_file", "one.png", "--quiet")
    assert '"steps": 1' in run(installed, elsewhere, "-m", "wan", *size)
    assert "Draw the skip map" in run(installed, elsewhere, "-m", "wan.cache.report", "--help")


def test_dask_keeps_its_own(installed, tmp_path):
    pytest.importorskip("dask")
    code = "import {}; print(distributed.Client.__module__, wan.distributed.grid.Grid.__module__)"
    for order in ("distributed, wan.distributed.grid", "wan.distributed.grid, distributed"):
        assert run(installed, tmp_path, "-c", code.format(order)).split() == [
            "distributed.client",
            "wan.distributed.grid",
        ]
