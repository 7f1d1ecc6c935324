"""What several of these tests run once: small networks, a run without a cache, processes that share the tokens."""

from __future__ import annotations

import json

import pytest

from tests.caching.network import sample, tiny_model
from tests.caching.toy import CUTS, rank_main
from tests.dist.processes import fork


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
    fork(size, rank_main, size, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
