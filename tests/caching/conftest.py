"""What several of these tests run once: small networks, a run without a cache, processes that share the tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caching.network import sample, tiny_model
from tests.caching.toy import CUTS

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models():
    one = tiny_model(0)
    return {"model": one, "high": one, "low": tiny_model(1)}


@pytest.fixture(scope="module")
def plain(models):
    """Latents without a cache."""
    return sample(models)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Rank -> case -> decisions, of processes that share a sequence."""
    folder, size = tmp_path_factory.mktemp("ranks"), max(CUTS)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.caching.toy", str(rank), str(size), str(folder)],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * size, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
