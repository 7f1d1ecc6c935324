"""A VAE over the rows of a picture: every process of a group gets what one process alone computes."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from wan.distributed.halo import RowShards
from wan.distributed.shards import ALONE, Group, split
from tests.dist.processes import run
from wan.models.tae import TAE
from wan.models.vae import WanVAE

pytestmark = pytest.mark.dist

CONFIGS = {
    "2.1": {"version": "2.1", "dim": 8, "z_dim": 16},
    "2.2": {"version": "2.2", "dim": 8, "dec_dim": 12, "z_dim": 48},
    "tae": {"z_dim": 48, "patch_size": 2, "widths": (8, 8, 8, 8), "encoder_width": 8},
}


class Case(NamedTuple):
    """One call. Rows, columns and the tile's side in latent units; 0: no tiles. extra: pixel rows beyond these."""

    call: str
    version: str
    frames: int
    rows: int
    columns: int = 2
    tile: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    extra: int = 0


# 2 processes divide none of 5, 3 and 7 rows, 4 have fewer than one each of 3, 2 and 1.
CASES = [
    Case(call, version, **shape)
    for call, version in product(("decode", "encode"), CONFIGS)
    for shape in (
        {"frames": 9, "rows": 5},
        {"frames": 5, "rows": 3, "batch": 2},
        {"frames": 1, "rows": 4, "columns": 3},
        {"frames": 5, "rows": 2},
        {"frames": 5, "rows": 1},
        {"frames": 1, "rows": 7, "columns": 5, "tile": 5},
        {"frames": 5, "rows": 5, "dtype": torch.bfloat16},
    )
]
CASES.append(Case("encode", "2.1", frames=5, rows=5, extra=4))


def make(version):
    config = CONFIGS[version]
    return (TAE if "widths" in config else WanVAE)(**config).eval()


def compute(case, group=ALONE):
    torch.manual_seed(0)
    vae = make(case.version).to(case.dtype)
    tile_px = case.tile * vae.stride_s
    if case.call == "decode":
        z = torch.randn(case.batch, vae.z_dim, (case.frames + 3) // 4, case.rows, case.columns)
        return vae.decode(z, tile_px, group)
    height, width = case.rows * vae.stride_s + case.extra, case.columns * vae.stride_s
    return vae.encode(torch.rand(case.batch, 3, case.frames, height, width) * 2 - 1, tile_px, group)


def picture(dtype):
    """Two places for each of 7 rows, along axis 1."""
    return torch.arange(1, 3 * 14 * 2 + 1).view(3, 14, 2).to(dtype)


# Places of a halo before and after, and the type of what it is put on.
HALOS = list(product([(0, 1), (1, 0), (1, 1), (2, 1), (2, 2)], (torch.float32, torch.bfloat16)))


def extend_pictures(group):
    rows = RowShards(group, 7)
    return [rows.extend(rows.part(picture(dtype), 1, 2), 1, *halo) for halo, dtype in HALOS]


def count_rows(group):
    """Those of 7 that go into the decoder and come from the encoder."""
    vae, seen = make("2.1"), []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    vae.encoder.register_forward_hook(lambda _, __, out: seen.append(out.shape[2]))
    vae.decode(torch.randn(1, 16, 1, 7, 2), group=group)
    vae.encode(torch.rand(1, 3, 1, 56, 16), group=group)
    return seen


PAIRS = {(0, 2): CASES[0], (1, 3): CASES[2]}  # which of 4 processes share which call


def compute_in_pairs():
    handles = {pair: dist.new_group(pair) for pair in PAIRS}  # all processes make all groups
    return [compute(PAIRS[pair], Group(handles[pair])) for pair in PAIRS if dist.get_rank() in pair]


def work():
    """All that a process is started for, by name."""
    group = Group(dist.group.WORLD)
    with torch.inference_mode():
        return {
            "cases": [compute(case, group) for case in CASES],
            "halos": extend_pictures(group),
            "rows": count_rows(group),
            "pairs": compute_in_pairs() if group.size == 4 else [],
        }


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of processes: what each of them found."""
    return {count: run(count, work, tmp_path_factory.mktemp("ranks")) for count in (2, 4)}


def check(case, actual, wanted):
    assert actual.dtype == torch.float32 and actual.shape == wanted.shape and wanted.std() > 0.01
    if case.dtype == torch.float32:
        assert (actual - wanted).abs().max() <= 1e-5
    else:
        assert (actual - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_equals_one_process(results, index):
    wanted = compute(CASES[index])
    for ranks in results.values():
        for found in ranks:
            check(CASES[index], found["cases"][index], wanted)
            assert torch.equal(found["cases"][index], ranks[0]["cases"][index])


@pytest.mark.parametrize("count", [2, 4])
def test_a_halo_is_the_neighbours_rows(results, count):
    sizes = [2 * size for size in split(7, count)]
    for rank, found in enumerate(results[count]):
        for ((before, after), dtype), actual in zip(HALOS, found["halos"], strict=True):
            whole = F.pad(picture(dtype), (0, 0, before, after))
            assert torch.equal(actual, whole.narrow(1, sum(sizes[:rank]), before + sizes[rank] + after))


@pytest.mark.parametrize("count", [2, 4])
def test_the_work_is_shared(results, count):
    assert [found["rows"] for found in results[count]] == [[size, size] for size in split(7, count)]


def test_groups_work_side_by_side(results):
    for pair, case in PAIRS.items():
        for rank in pair:
            (actual,) = results[4][rank]["pairs"]
            check(case, actual, compute(case))


def test_one_process_copies_nothing():
    rows, x = RowShards(ALONE, 7), picture(torch.float32)
    assert rows.padding(1) == 1
    assert rows.part(x, 1, 2) is rows.extend(x, 1, 1, 1) is rows.inner(x, 1, 1, 1) is rows.gather(x, 1, 2) is x
    rows.exchange(x, 1, 1, 1)
    assert torch.equal(x, picture(torch.float32))
