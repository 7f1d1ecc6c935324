"""The comparison with diffusers, at tiny sizes: it must compare equal work and count it rightly."""

import json

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict

from benchmarks import common, peers
from benchmarks.peers import Case, alternate, compare, products
from wan.plan import forward_flops

DIT = peers.DIT | {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 32, "text_len": 16}
VAE = peers.VAE | {"dim": 8, "z_dim": 4}
CASES = [("dit", DIT, (2, 4, 6)), ("decode", VAE, (2, 4, 6)), ("encode", VAE, (5, 32, 48))]


@pytest.fixture(autouse=True)
def diffusers():
    return pytest.importorskip("diffusers")  # two seconds, which is not for collecting tests


@pytest.mark.parametrize("part, config, size", CASES)
def test_both_sides_compute_the_same(part, config, size):
    result = compare(Case(part, config, size, "fp32"), runs=2, memory=False)
    assert result["max_difference_over_std"] < 1e-4
    assert [len(runs) for runs in result["seconds"].values()] == [2, 2]
    assert result["floor"]["seconds"] > 0
    assert 0.5 < result["tflop"]["ours"] / result["tflop"]["diffusers"] <= 1.001
    json.dumps(result)


def test_bf16_is_compared_too():
    assert compare(Case("dit", DIT, (2, 4, 6)), runs=1, memory=False)["max_difference_over_std"] < 0.2


def test_products_are_those_of_the_plan():
    counted = products(Case("dit", peers.DIT, (3, 32, 32)), "ours")
    expected = forward_flops(EasyDict(dit=peers.DIT), (16, 3, 32, 32)).total / 1e12
    assert counted.tflop() == pytest.approx(expected, rel=0.01)


def test_products_count_what_runs():
    x, weight, filters = torch.randn(5, 6), torch.randn(7, 6), torch.randn(4, 3, 3, 3)
    with common.Products() as counted:
        F.linear(x, weight)
        F.linear(x, weight)
        F.conv2d(torch.randn(1, 3, 8, 8), filters, padding=1)
        F.scaled_dot_product_attention(*(torch.randn(1, 2, 5, 6) for _ in range(3)))
    flops = 2 * (2 * 5 * 6 * 7) + 2 * 64 * 4 * 27 + 4 * 2 * 5 * 5 * 6
    assert counted.tflop() * 1e12 == pytest.approx(flops)
    measured = counted.measure(torch.float32, repeats=1)
    assert set(measured["by_kind"]) == {"matrix product", "convolution", "attention"}


def test_runs_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or name for name in ("a", "b")}
    seconds, results = alternate(calls, 3)
    assert order == ["a", "b", "b", "a", "a", "b"] and results == {"a": "a", "b": "b"}


@pytest.mark.parametrize("permitted", [True, False])
def test_peak_bytes_sees_what_is_freed_again(monkeypatch, permitted):
    if not permitted:

        def refuse(*_, **__):
            raise PermissionError

        monkeypatch.setattr(common.Path, "write_text", refuse)
    mebibyte = 1 << 20
    # Of 64: without the kernel's own mark, the last sample may come before the last pages.
    assert 48 * mebibyte < common.peak_bytes(lambda: torch.ones(16 * mebibyte)) < 80 * mebibyte


@pytest.mark.slow
def test_memory_in_fresh_processes(tmp_path):
    result = compare(Case("decode", VAE, (2, 16, 16), "fp32"), runs=1)
    assert all(size > 0 for size in result["peak_bytes"].values())
    common.report(result, tmp_path / "results" / "x.json")
    assert json.loads((tmp_path / "results" / "x.json").read_text())["peak_ratio"] == result["peak_ratio"]
