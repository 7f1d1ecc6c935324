"""What ranks send and compute, counted, and how fast that can be, predicted: python -m benchmarks.comm

Needs no GPU, and nothing is timed. The real network and the real `Parallel` run as one rank of a fake process group, on
the meta device, where a dispatch mode sees each collective, product and pass over memory in its true size. One layer of
the real width runs; the others are alike.

    attention  bytes that a rank sends for one layer, bf16, beside `attention_bytes` of distributed/grid.py
    guidance   bytes that a rank sends to the other branch in a step, beside the size of one fp32 latent
    weights    bytes that a rank receives in a forward when weights are shared out, beside `weight_bytes`
    FLOPs      of one forward of the whole network, as the plan has them, beside known figures
    roofline   predicted seconds of a step on up to 64 GPUs, and published ones, see roofline.py

Bytes are what the calls are given; what a rank sends itself counts as nothing. They are means over ranks: over all of
them up to 8, above that one rank runs for all that have as many heads and tokens. In an all-gather each rank sends its
part to each other one. FSDP refuses the meta device: there, weights are fake tensors, and the embedding of the time,
which has to read its input, is passed over, its weights being gathered all the same.

What is more than 1 % off is listed. The known figures are whole TFLOP, so small ones are off by their rounding. FSDP
shares out rows and pads them to as many as there are ranks, so a modulation, one row, travels once for each rank; and 2
bytes for each parameter are too few, for what forms the modulation is fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wan.distributed.fsdp import own_rows, shard_model, weight_mesh, with_rows
from wan.distributed.grid import Grid, attention_bytes, grids, split, weight_bytes
from wan.distributed.parallel import Parallel

from benchmarks.common import machine
from benchmarks.roofline import FLASH, Tally, aligned, draw, fake_rank, format_roofline, predict
from wan.command import Parser, run_command
from wan.conditioning.sizes import latent_shape
from wan.errors import UsageError
from wan.models.attention import BackEnd
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel, rope
from wan.plan import forward_flops
from wan.tasks import load_task


@dataclass(frozen=True)
class Case:
    """A task of configs/tasks and a size of video."""

    task: str
    width: int
    height: int
    frames: int

    @cached_property
    def spec(self) -> Any:
        return load_task(self.task)

    @property
    def latent(self) -> tuple[int, int, int, int]:
        return latent_shape(self.spec.vae.z_dim, self.frames, self.height, self.width, self.spec.vae_stride[1])

    @property
    def tokens(self) -> int:
        return prod(size // patch for size, patch in zip(self.latent[1:], self.spec.dit.patch_size))


CASES = {
    "1.3B 480p": Case("t2v-1.3B", 832, 480, 81),
    "1.3B 720p": Case("t2v-1.3B", 1280, 720, 81),
    "5B 480p": Case("ti2v-5B", 832, 480, 81),
    "5B 720p": Case("ti2v-5B", 1280, 704, 121),
    "14B 480p": Case("t2v-14B", 832, 480, 81),
    "14B 720p": Case("t2v-14B", 1280, 720, 81),
}
PUBLISHED_CASES = {"i2v-14B 480p": Case("i2v-14B", 832, 480, 81)}
NETWORKS = {"1.3B": "t2v-1.3B", "5B": "ti2v-5B", "14B": "t2v-14B"}
RANKS = (2, 4, 8, 16, 64)  # of the tables of bytes
GPUS = (1, 2, 4, 8, 16, 32, 64)  # of the roofline
# Figures that were known before, of one forward, in whole TFLOP: PARTS and their sum.
KNOWN_TFLOP = {
    "1.3B 480p": (82, 198, 3, 283),
    "14B 480p": (785, 879, 14, 1678),
    "14B 720p": (1810, 4682, 32, 6523),
    "5B 720p": (238, 274, 5, 517),
}


# One rank


def _flash(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    """What `sdpa` is on a GPU: one product, whose scores never come into memory. The meta device would write them."""
    out, lse = FLASH(*(x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD)))[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


def build(spec: Any, layers: int) -> WanModel:
    """The network on the meta device, in bf16 but for what stays in fp32."""
    with torch.device("meta"):
        model = WanModel(**{**spec.dit, "num_layers": layers}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not WanModel.keep_fp32(name):
            parameter.data = parameter.data.bfloat16()
    return model


def prediction(case: Case, model: WanModel) -> Callable[[str], Tensor]:
    """One forward of either branch."""
    dit = case.spec.dit
    x = torch.empty(1, dit.in_dim, *case.latent[1:], device="meta")
    text = torch.empty(1, dit.text_len, dit.text_dim, device="meta")
    image = torch.empty(1, CLIP_TOKENS, CLIP_DIM, device="meta") if model.img_emb is not None else None
    return lambda branch: model(x, torch.tensor([500]), text, clip_fea=image)


@torch.no_grad()  # inference mode would hand `linear` on whole, and not as the products that are counted
def count(case: Case, model: WanModel, parallel: Parallel, grid: Grid, rank: int = 0) -> Tally:
    """A forward of a model of one layer, and with cfg the exchange of the branches."""
    tally = Tally(grid, rank)
    model.parallel, model.attention = parallel, BackEnd(lambda *qkv: _flash(*qkv)[0], _flash)
    with tally, tally.places({model.blocks[0]: "layer"}):
        parallel.branches(prediction(case, model), ("cond", "uncond")[: grid.cfg])
    return tally


# Bytes

ByRank = dict[str, dict[Grid, dict[int, Tally]]]  # by case, grid and rank


def ranks_to_run(case: Case, grid: Grid) -> dict[int, int]:
    """Ranks that run, and for how many each stands."""
    if grid.cfg > 1 or grid.size not in RANKS:
        return {0: 1}
    if grid.size <= 8:
        return dict.fromkeys(range(grid.size), 1)
    heads, tokens = split(case.spec.dit.num_heads, grid.ulysses), split(case.tokens, grid.size)
    alike: dict[tuple[int, int], list[int]] = {}
    for rank in range(grid.size):
        alike.setdefault((heads[rank % grid.ulysses], tokens[rank]), []).append(rank)
    return {ranks[0]: len(ranks) for ranks in alike.values()}


def count_grids(cases: Mapping[str, Case], sizes: Sequence[int]) -> ByRank:
    """Of each grid of so many ranks; always also that of rank 0."""
    models = {name: build(case.spec, 1) for name, case in cases.items()}
    found: ByRank = {name: {} for name in cases}
    for grid in [grid for size in sizes for grid in grids(size)]:
        runs = {name: ranks_to_run(case, grid) for name, case in cases.items()}
        for rank in sorted(set().union(*runs.values())):
            with fake_rank(grid, rank) as parallel:
                for name, case in cases.items():
                    if rank in runs[name]:
                        tally = count(case, models[name], parallel, grid, rank)
                        found[name].setdefault(grid, {})[rank] = tally
    return found


def attention_rows(cases: Mapping[str, Case], tallies: ByRank) -> list[dict[str, Any]]:
    """Means over ranks; `runs` of them ran."""
    rows = []
    for name, case in cases.items():
        for grid in (grid for grid in tallies[name] if grid.cfg == 1 and grid.size in RANKS):
            runs, by_rank = ranks_to_run(case, grid), tallies[name][grid]
            counted = {
                axis: sum(times * by_rank[rank].sent(axis) for rank, times in runs.items()) / grid.size
                for axis in ("ulysses", "ring")
            }
            formula = attention_bytes(grid, case.tokens, case.spec.dit.dim, 2)
            row = {"case": name, "ranks": grid.size, "ulysses": grid.ulysses, "ring": grid.ring, "runs": len(runs)}
            ratios = [counted[axis] / formula[axis] for axis in counted if formula[axis]]
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            rows.append(row | {"counted": counted, "formula": formula, "ratio": worst})
    return rows


def guidance_rows(cases: Mapping[str, Case], tallies: ByRank) -> list[dict[str, Any]]:
    """Of rank 0 on every grid that has the branches apart; all send as much."""
    rows = []
    for name, case in cases.items():
        counted = {one[0].sent("guidance") for grid, one in tallies[name].items() if grid.cfg == 2}
        formula = case.spec.dit.out_dim * prod(case.latent[1:]) * 4
        rows += [{"case": name, "counted": one, "formula": formula, "ratio": one / formula} for one in counted]
    return rows


def weights_row(network: str, ranks: int, per_machine: int = 1) -> dict[str, Any]:
    """per_machine: so many ranks share a copy, as where a machine has so many; 1: all do."""
    spec = load_task(NETWORKS[network])
    layers, model, fake = spec.dit.num_layers, build(spec, 1), FakeTensorMode()
    stored, parameters = (
        sum(size(one) for one in model.parameters())
        + (layers - 1) * sum(size(one) for one in model.blocks.parameters())
        for size in (lambda one: one.nbytes, lambda one: one.numel())
    )
    tally = Tally(Grid(), 0)
    with fake_rank(Grid(ulysses=ranks)):
        shard_model(model, list(model.units().values()), weight_mesh("cpu", per_machine))
        for name, parameter in list(model.named_parameters()):
            first, last = own_rows(parameter)
            with fake:
                rows = torch.empty(last - first, *parameter.shape[1:], dtype=parameter.dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, with_rows(parameter, rows))
        # A table that is kept for the next caller must not be a fake one.
        with patch.object(rope, "_table", rope._table.__wrapped__), fake, torch.no_grad(), tally:
            time_RC = torch.empty(1, spec.dit.dim)
            time = (time_RC, time_RC[:, None].expand(1, 6, -1))
            model.embed_time = lambda t, sequence, batch: (*time, [(0, sequence.shards.total)])
            model(torch.empty(1, spec.dit.in_dim, 1, 2, 2), torch.empty(1), torch.empty(1, 1, spec.dit.text_dim))
    root, block = (sum(one.received.values()) for one in tally.transfers["rest"])
    share = len(tally.transfers["rest"][0].ranks)
    counted, formula = root + layers * block, weight_bytes(share, stored)
    row = {"network": network, "ranks": ranks, "sharing": share, "parameters": parameters, "stored": stored}
    row |= {"counted": counted, "formula": formula, "ratio": counted / formula}
    halves = weight_bytes(share, 2 * parameters)
    return row | {"two_bytes_each": halves, "ratio_to_two_bytes_each": counted / halves}


# FLOPs


def flops_row(name: str, case: Case) -> dict[str, Any]:
    """Of one forward of all layers on one rank, in TFLOP."""
    counted = {part: flops / 1e12 for part, flops in forward_flops(case.spec, case.latent).by_kind().items()}
    counted["total"] = sum(counted.values())
    row: dict[str, Any] = {"case": name, "tokens": case.tokens, "counted": counted}
    row["known"] = known = dict(zip(counted, KNOWN_TFLOP[name]))
    row["ratio_to_known"] = {part: counted[part] / known[part] for part in known}
    row["rounds_to_known"] = {part: round(counted[part]) == known[part] for part in known}
    return row


# Text


def format_attention(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Bytes that a rank sends for one layer, MB along ulysses + ring: counted, formula, ratio (of the worse axis)"
    for network in NETWORKS:
        cases = [name for name in CASES if name.split()[0] == network]
        table = {}
        for row in (row for row in rows if row["case"] in cases):
            cells = [" + ".join(f"{one / 1e6:.3f}" for one in row[key].values()) for key in ("counted", "formula")]
            table.setdefault((row["ranks"], row["ulysses"], row["ring"]), []).extend([*cells, f"{row['ratio']:.4f}"])
        head = ["ranks", "U x R", *(text for name in cases for text in (name, "formula", "ratio"))]
        yield from ("", *aligned([head, *([f"{P}", f"{U} x {R}", *cells] for (P, U, R), cells in table.items())]))


def format_rest(result: dict[str, Any]) -> Iterator[str]:
    yield "\nBytes that a rank sends to the other branch in a step, MB"
    rows = [[one["case"], *_numbers(one, 1e6)] for one in result["guidance"]]
    yield from aligned([["case", "counted", "one latent", "ratio"], *rows])
    yield "\nBytes that a rank receives in a forward with shared weights (FSDP), GB; 2 N: all parameters in 16 bits"
    head = ["network", "ranks", "that share", "counted", "formula", "ratio", "2 N (P-1)/P", "ratio"]
    rows = [
        [one["network"], f"{one['ranks']}", f"{one['sharing']}", *_numbers(one, 1e9)]
        + [f"{one['two_bytes_each'] / 1e9:.3f}", f"{one['ratio_to_two_bytes_each']:.4f}"]
        for one in result["weights"]
    ]
    yield from aligned([head, *rows])
    yield "\nTFLOP of one forward: counted, as in the plan, and known figure"
    rows = [
        [one["case"], f"{one['tokens']}", part, f"{one['counted'][part]:.3f}"]
        + [f"{one['known'][part]}", f"{one['ratio_to_known'][part]:.4f}"]
        for one in result["flops"]
        for part in one["counted"]
    ]
    yield from aligned([["case", "tokens", "part", "counted", "known", "ratio"], *rows])
    yield "\nMore than 1 % off"
    yield from result["differences"] or ["nothing"]


def differences(result: dict[str, Any]) -> list[str]:
    """What is more than 1 % off, in words."""
    found = []
    for row in result["attention"]:
        where = f"attention {row['case']}, ulysses {row['ulysses']} x ring {row['ring']}"
        found.append((where, "the formula", row["ratio"]))
    found += [(f"guidance {row['case']}", "one latent", row["ratio"]) for row in result["guidance"]]
    for row in result["weights"]:
        where = f"weights {row['network']}, {row['sharing']} of {row['ranks']} ranks share"
        found += [(where, "the formula", row["ratio"]), (where, "2 N (P-1)/P", row["ratio_to_two_bytes_each"])]
    for row in result["flops"]:
        for part, ratio in row["ratio_to_known"].items():
            rounds = " and rounds to it" if row["rounds_to_known"][part] else ""
            found.append((f"FLOPs {row['case']}, {part}", f"the known figure{rounds}", ratio))
    return [f"{where}: {ratio:.4f} of {what}" for where, what, ratio in found if abs(ratio - 1) > 0.01]


def _numbers(row: dict[str, Any], unit: float) -> list[str]:
    return [f"{row['counted'] / unit:.3f}", f"{row['formula'] / unit:.3f}", f"{row['ratio']:.4f}"]


def measure() -> dict[str, Any]:
    """Everything, as JSON data."""
    every = CASES | PUBLISHED_CASES
    print("FLOPs, weights ...", file=sys.stderr)
    flops = [flops_row(name, CASES[name]) for name in KNOWN_TFLOP]
    weights = [weights_row(network, ranks) for network in NETWORKS for ranks in RANKS]
    weights += [weights_row(network, RANKS[-1], per_machine=8) for network in NETWORKS]
    tallies: ByRank = {name: {} for name in every}
    for size in GPUS:
        print(f"{size} ranks ...", file=sys.stderr)
        for name, by_grid in count_grids(every, [size]).items():
            tallies[name] |= by_grid
    received = {(row["network"], row["ranks"]): row["counted"] for row in weights if row["sharing"] == row["ranks"]}
    firsts = {name: {grid: one[0] for grid, one in by_grid.items()} for name, by_grid in tallies.items()}
    layers = {name: case.spec.dit.num_layers for name, case in every.items()}
    counted = {"attention": attention_rows(CASES, tallies), "guidance": guidance_rows(CASES, tallies)}
    counted |= {"weights": weights, "flops": flops}
    return counted | {"differences": differences(counted), "roofline": predict(firsts, layers, received)}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.comm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="FILE", help="write the JSON here")
    parser.add_argument("--picture", metavar="FILE", help="write a picture (PNG): seconds and bytes over ranks")
    args = parser.parse_args(argv)
    for path in filter(None, (args.out, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"no folder {Path(path).absolute().parent}")
    result = measure()
    lines = *format_attention(result["attention"]), *format_rest(result), *format_roofline(result["roofline"])
    print("\n".join(lines))
    if args.out:
        text = json.dumps({"machine": machine(), **result}, indent=1)
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.picture:
        draw(result, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
