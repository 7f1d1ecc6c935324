"""Counted bytes and FLOPs beside their formulas, and what is predicted from them."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from wan.distributed.grid import Grid

from benchmarks import comm, roofline
from benchmarks.comm import (
    CASES,
    Case,
    attention_rows,
    build,
    count,
    count_grids,
    flops_row,
    guidance_rows,
    weights_row,
)
from benchmarks.roofline import Published, Tally, Transfer, best, check, fake_rank, step_seconds, transfer_seconds
from wan.models.dit.rope import rope_table
from wan.plan import forward_flops, parameters

SMALL = Case("t2v-1.3B", 208, 112, 9)  # 273 tokens, 12 heads: 8 ranks divide neither
CASE = CASES["1.3B 480p"]
LAYERS = CASE.spec.dit.num_layers


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    assert not dist.is_initialized()
    assert "meta" not in dist.Backend.backend_capability["fake"]


@pytest.fixture(scope="module")
def tallies():
    return count_grids({"1.3B 480p": CASE}, [1, 2, 4, 8])


@pytest.fixture(scope="module")
def small():
    return count_grids({"small": SMALL}, [2, 8])


def test_bytes_are_those_of_the_formulas(small, tallies):
    rows = attention_rows({"small": SMALL}, small) + attention_rows({"1.3B 480p": CASE}, tallies)
    assert {(row["ranks"], row["ulysses"]) for row in rows} == {
        (P, U) for P in (2, 4, 8) for U in (1, 2, 4, 8) if U <= P
    }
    assert all(row["ratio"] == pytest.approx(1, rel=0.01) and row["runs"] == row["ranks"] for row in rows)
    guidance = guidance_rows({"small": SMALL}, small)
    assert [row["counted"] for row in guidance] == [16 * 3 * 14 * 26 * 4] and guidance[0]["ratio"] == 1


def test_uneven_ranks_receive_what_others_send(small):
    by_rank = small["small"][Grid(ulysses=8)]
    for call in range(2):
        calls = {rank: tally.transfers["layer"][call] for rank, tally in by_rank.items()}
        for rank, one in calls.items():
            assert one.received == {other: calls[other].sent[rank] for other in calls if other != rank}
    sent = [tally.sent("ulysses") for tally in by_rank.values()]
    assert len(set(sent)) == 3 and sent[1] > sent[4]  # heads 2 and 1, and rank 0 has a token more


def test_few_ranks_stand_for_all():
    grid, case = Grid(ulysses=16), Case("t2v-1.3B", 208, 112, 9)
    runs = comm.ranks_to_run(case, grid)
    assert runs == {0: 1, 1: 11, 12: 4}  # 1 head with 18 and 17 tokens; none
    model, sent = build(case.spec, 1), {}
    for rank in range(grid.size):
        with fake_rank(grid, rank) as parallel:
            sent[rank] = count(case, model, parallel, grid, rank).sent("ulysses")
    assert sum(times * sent[rank] for rank, times in runs.items()) == sum(sent.values())


def test_a_ring_sends_to_the_next_of_its_ranks():
    grid = Grid(cfg=2, ring=2, ulysses=2)
    with fake_rank(grid, 5) as parallel:
        tally = count(SMALL, build(SMALL.spec, 1), parallel, grid, 5)
    ring = [one for one in tally.transfers["layer"] if one.axis == "ring"]
    assert [(one.ranks, list(one.sent)) for one in ring] == [([5, 7], [7])]
    assert ring[0].behind == 4 * 137 * 137 * 128 * 6  # its group's tokens to themselves, 6 heads
    assert [one.ranks for one in tally.transfers["layer"] if one.axis == "ulysses"] == 2 * [[4, 5]]
    assert [(one.axis, one.ranks) for one in tally.transfers["rest"]] == [
        ("gather", [4, 5, 6, 7]),
        ("guidance", [1, 5]),
    ]


def test_shared_weights():
    row = weights_row("1.3B", 8)
    assert row["parameters"] == parameters(CASE.spec)["dit"]
    assert row["ratio"] == pytest.approx(1, rel=0.01)
    assert 1.01 < row["ratio_to_two_bytes_each"] < 1.02  # fp32 modulation
    assert weights_row("1.3B", 16, per_machine=8)["counted"] == row["counted"]
    assert type(rope_table((((1, 1, 1), (0, 0, 0), (1, 1, 1)),), 128)) is torch.Tensor  # no fake one is kept


def test_flops(tallies):
    row = flops_row("1.3B 480p", CASE)
    assert all(row["rounds_to_known"].values())
    flops, whole = tallies["1.3B 480p"][Grid()][0].flops, forward_flops(CASE.spec, CASE.latent)
    for kind, parts in {"matmul": whole.linear, "attention": whole.attention}.items():
        assert LAYERS * flops["layer", kind] + flops["rest", kind] == pytest.approx(sum(parts.values()), rel=0.01)


def test_rank_0_has_most_to_do(small):
    for by_rank in small["small"].values():
        for counts in ([tally.flops for tally in by_rank.values()], [tally.passes for tally in by_rank.values()]):
            first, *others = counts
            assert all(first[kind] >= other[kind] for other in others for kind in first)


@pytest.mark.parametrize("gpu", roofline.GPUS)
def test_more_gpus_are_predicted_to_be_faster(tallies, gpu):
    by_grid = {grid: one[0] for grid, one in tallies["1.3B 480p"].items()}
    alone = step_seconds(by_grid[Grid()], LAYERS, gpu)
    steps = {size: best(by_grid, size, LAYERS, gpu)[1] for size in (1, 2, 4, 8)}
    assert alone.exposed == alone.hidden == 0
    for size, step in steps.items():
        assert step.compute >= alone.compute / size and step.total > step.compute
    assert [step.total for step in steps.values()] == sorted((step.total for step in steps.values()), reverse=True)
    slower = step_seconds(by_grid[Grid(ulysses=8)], LAYERS, gpu, efficiency=0.5)
    assert slower.compute == pytest.approx(2 * step_seconds(by_grid[Grid(ulysses=8)], LAYERS, gpu).compute)


def test_weights_that_do_not_hide_cost_time(tallies):
    tally = tallies["1.3B 480p"][Grid(2, 1, 4)][0]
    bare = step_seconds(tally, LAYERS, "H100")
    assert step_seconds(tally, LAYERS, "H100", weights=1e9).total == bare.total
    held = step_seconds(tally, LAYERS, "H100", weights=450e9)
    assert held.total == pytest.approx(1 + bare.exposed)


def test_links():
    GB = 10**9
    exchange = Transfer("ulysses", [0, 1, 8], {1: 45 * GB, 8: GB}, {1: GB, 8: 10 * GB})
    assert transfer_seconds(exchange, 0) == pytest.approx(0.2)  # received over InfiniBand; 0.1 over NVLink
    assert transfer_seconds(Transfer("ring", [0, 1], {1: 9 * GB}, {}), 0) == pytest.approx(0.02)
    assert transfer_seconds(Transfer("ring", [0, 4, 8, 12], {4: 9 * GB}, {}), 0) == pytest.approx(0.18)


def test_an_efficiency_is_that_of_one_gpu(tallies):
    by_grid = {grid: one[0] for grid, one in tallies["1.3B 480p"].items()}
    alone = step_seconds(by_grid[Grid()], LAYERS, "H100").total
    row = check(Published("x", "1.3B 480p", 40 * alone, 10 * alone, 20), by_grid, LAYERS, {})
    assert row["efficiency"] == pytest.approx(0.5) and row["speedup"] == 4
    assert 40 / 8 < row["predicted_eight"] / alone < 40 / 7
    assert row["error"] == pytest.approx(row["predicted_eight"] / (10 * alone) - 1)


def test_what_is_tallied():
    x, y = torch.empty(4, 8, device="meta"), torch.empty(8, 4, device="meta")
    with torch.no_grad(), Tally(Grid(), 0) as tally:
        x.mul_(2)  # reads and writes
        torch.empty_like(x).copy_(x.view(4, 8))  # the same
        torch.ones(4).add_(1)  # on the CPU
        x @ y
    assert tally.passes == {"rest": 4 * x.nbytes} and tally.flops == {("rest", "matmul"): 2 * 4 * 8 * 4}
    with fake_rank(Grid(ulysses=4), 2), Tally(Grid(ulysses=4), 2) as tally:
        dist.all_reduce(torch.ones(3))
        with pytest.raises(NotImplementedError, match="c10d.broadcast_ is not counted"):
            dist.broadcast(torch.ones(3), src=0)
    assert [(one.axis, one.sent) for one in tally.transfers["rest"]] == [("vote", {0: 12, 1: 12, 3: 12})]


def test_a_real_group_is_left_alone():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="twice"), fake_rank(Grid(ulysses=2)):
            pass
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()


def test_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, value in {"CASES": {"1.3B 480p": CASE}, "PUBLISHED_CASES": {}, "RANKS": (2, 8), "GPUS": (1, 8)}.items():
        monkeypatch.setattr(comm, name, value)
    monkeypatch.setattr(comm, "NETWORKS", {"1.3B": "t2v-1.3B"})
    monkeypatch.setattr(comm, "KNOWN_TFLOP", {"1.3B 480p": (82, 198, 4, 283)})
    monkeypatch.setattr(roofline, "PUBLISHED", [Published("x", "1.3B 480p", 2.0, 0.5)])
    out, picture = tmp_path / "x.json", tmp_path / "x.png"
    assert comm.main(["--out", str(out), "--picture", str(picture)]) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "FLOPs 1.3B 480p, cross_attention: 0.7729 of the known figure\n" in text
    assert [row["gpus"] for row in result["roofline"]["steps"]] == [1, 8, 1, 8]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert comm.main(["--out", str(tmp_path / "none" / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: no folder ")
