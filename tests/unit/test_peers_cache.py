"""Caches beside cache-dit's: both sides compute the same, blocks are counted, a missing peer is one line."""

import sys

import pytest
import torch

pytest.importorskip("diffusers")
from wan.cache import NoCache, StepContext

from benchmarks import peers, peers_cache
from wan.models.dit import WanModel

CONFIG = peers.DIT | {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 3, "text_dim": 32, "text_len": 16}
SIZE = (2, 4, 6)


def test_both_sides_have_the_same_weights():
    """With a text that is shorter than its room, and channels of an image beside the latent."""
    torch.manual_seed(0)
    config = CONFIG | {"in_dim": 20, "model_type": "i2v", "clip": False}
    ours = WanModel(**config).eval()
    for parameter in ours.parameters():
        parameter.data.normal_(std=0.1)
    x, y, text = torch.randn(1, 16, *SIZE), torch.randn(1, 4, *SIZE), torch.randn(5, 32)
    theirs, ctx = peers_cache.Theirs(config, ours).eval(), StepContext(0, 1, 700.0, 0.7)
    with torch.inference_mode():
        expected = ours(x, torch.tensor([700]), [text], y=y)
        assert torch.allclose(theirs(x, None, [text], y=y, ctx=ctx, cache=NoCache()), expected, atol=1e-4, rtol=1e-4)


def test_a_missing_peer_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    assert peers.main(["cache", "--tasks", "t2v-tiny"]) == 1
    error = capsys.readouterr().err
    assert "error: cache-dit cannot be imported" in error and error.count("\n") == 1


def test_equal_compute_is_read_off_the_front():
    rows = [
        {"family": "a", "compute": compute, "psnr_db": db}
        for compute, db in ((0.4, 30), (0.5, 28), (0.6, 40), (0.9, 50))
    ]
    rows.append({"family": "b", "compute": 0.7, "psnr_db": 60})
    found = peers_cache.at_equal_compute(rows)
    assert found["a"] == {"0.4": 30, "0.45": 32.5, "0.5": 35, "0.6": 40}
    assert set(found["b"].values()) == {None}


def test_overhead_is_measured_for_each(monkeypatch):
    monkeypatch.setattr(peers_cache, "DBCache", lambda networks, threshold, taylor_order: NoCache())
    found = peers_cache.overhead(CONFIG, SIZE, runs=1)
    assert list(found) == ["ours, fbcache residual_rel_l1", "cache-dit, DBCache", "cache-dit, DBCache, TaylorSeer"]
    assert all(one["step_seconds"] > 0 for one in found.values())


def test_the_peer_skips_blocks_and_begins_anew_with_each_run():
    pytest.importorskip("cache_dit")
    network = peers_cache.Theirs(CONFIG).eval()
    calls = []
    for block in network.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    cache = peers_cache.DBCache({"model": network}, 1e9, None)
    steps = [StepContext(step, 4, 900.0 - step, 0.9 - step / 1000) for step in range(4)]
    for _ in range(2):
        calls.clear()
        with torch.inference_mode(), cache.run(steps):
            for ctx in steps:
                network(torch.randn(1, 16, *SIZE), None, [torch.randn(5, 32)], ctx=ctx, cache=cache)
        assert 4 < len(calls) < 12
