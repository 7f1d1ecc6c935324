"""What ranks send and compute, counted, and how fast that can be, predicted: python -m benchmarks.comm

Needs no GPU, and nothing is timed. The real network and the real `Parallel` run as one rank of a fake process group, on
the meta device, where a dispatch mode sees each collective, product and pass over memory in its true size. One layer of
the real width runs; the others are alike.

    attention  bytes that a rank sends for one layer, bf16, beside `attention_bytes` of distributed/grid.py
    guidance   bytes that a rank sends to the other branch in a step, beside the size of one fp32 latent
    weights    bytes that a rank receives in a forward when weights are shared out, beside `weight_bytes`
    FLOPs      of one forward of the whole network, by torch's FlopCounterMode, beside `forward_flops` and known figures
    roofline   predicted seconds of a step on up to 64 GPUs, and published ones, see roofline.py

Bytes are what the calls are given; what a rank sends itself counts as nothing. They are means over ranks: over all of
them up to 8, above that one rank runs for all that have as many heads and tokens. With an all-gather each rank sends its
part to each other one. FSDP refuses the meta device: there, weights are fake tensors, and the embedding of the time,
which has to read its input, is passed over, its weights being gathered all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.common import machine
from benchmarks.roofline import draw, format_roofline, predict
from distributed.fsdp import own_rows, shard_model, weight_mesh, with_rows
from distributed.grid import Grid, attention_bytes, grids, split, weight_bytes
from distributed.parallel import Parallel
from wan.command import Parser, run_command
from wan.conditioning.sizes import latent_shape
from wan.errors import UsageError
from wan.memory import forward_flops
from wan.models import rope
from wan.models.attention import BackEnd
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel
from wan.tasks import load_task

PARTS = ("linear", "self_attention", "cross_attention")
AXES = {"alltoall_base_": "ulysses", "send": "ring", "_allgather_base_": "gather", "allgather_": "guidance"}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
# Allocations, and views that their schema does not call so: no pass over memory.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "alias"}


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


@contextmanager
def fake_rank(grid: Grid, rank: int = 0) -> Iterator[Parallel]:
    """The `Parallel` of a rank whose group sends nothing anywhere. This process must be in no group."""
    if grid.size == 1:
        yield Parallel()
        return
    devices = dist.Backend.backend_capability["fake"]
    devices.append("meta")  # or isend refuses its tensors
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=grid.size)
        try:
            yield Parallel(*grid)
        finally:
            dist.destroy_process_group()
    finally:
        devices.remove("meta")


@dataclass
class Transfer:
    """A collective, or one turn of a ring, among `ranks`. sent, received: bytes by the other rank.

    behind: FLOPs of the attention that is computed while it travels.
    """

    axis: str
    ranks: list[int]
    sent: dict[int, int]
    received: dict[int, int]
    behind: int = 0


class Tally(TorchDispatchMode):
    """What one rank does: `work[place]`, FLOPs ("matmul", "attention") and bytes read and written by all other
    operations ("memory"), and `transfers[place]`. place: "layer", or "rest" for all that is not in a block."""

    def __init__(self, grid: Grid, rank: int):
        super().__init__()
        self.grid, self.rank, self.place = grid, rank, "rest"
        self.work: dict[str, Counter[str]] = {"layer": Counter(), "rest": Counter()}
        self.transfers: dict[str, list[Transfer]] = {"layer": [], "rest": []}
        self._leaving: Transfer | None = None

    def sent(self, axis: str) -> int:
        """Bytes along an axis, of one layer or outside of layers."""
        return sum(sum(one.sent.values()) for part in self.transfers.values() for one in part if one.axis == axis)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._transfer(func.overloadpacket.__name__, args)
        else:
            self._compute(func, args, kwargs or {}, out)
        return out

    def _transfer(self, name: str, args: Sequence[Any]) -> None:
        if name == "recv_":  # counted where it is sent
            return
        if name not in AXES:
            raise NotImplementedError(f"c10d.{name} is not counted")
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(group)
        tensor = tree_leaves(args[1] if "gather" in name else args[0])[0]  # what is sent, or as long
        if name == "send":
            sent, received = {ranks[args[2]]: tensor.nbytes}, {}
        elif name == "alltoall_base_":
            sent, received = (dict(zip(ranks, (n * tensor.itemsize for n in sizes))) for sizes in (args[4], args[3]))
        else:
            sent, received = dict.fromkeys(ranks, tensor.nbytes), dict.fromkeys(ranks, tensor.nbytes)
        for sizes in (sent, received):
            sizes.pop(self.rank, None)
        transfer = Transfer(AXES[name], ranks, sent, received)
        self.transfers[self.place].append(transfer)
        self._leaving = transfer if name == "send" else None

    def _compute(self, func, args, kwargs: dict[str, Any], out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        packet, work = func.overloadpacket, self.work[self.place]
        if any(tensor.device.type != "meta" for tensor in tensors):  # timesteps, the table of rotations
            return
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            work["attention" if packet is FLASH else "matmul"] += flops
            if packet is FLASH and self._leaving is not None:
                self._leaving.behind, self._leaving = flops, None
        elif not func.is_view and packet.__name__ not in FREE:
            if packet is torch.ops.aten.copy_:  # does not read what it overwrites
                tensors = tensors[1:]
            work["memory"] += sum(tensor.nbytes for tensor in tensors)


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
    block = model.blocks[0]
    hooks = [
        block.register_forward_pre_hook(lambda *_: setattr(tally, "place", "layer")),
        block.register_forward_hook(lambda *_: setattr(tally, "place", "rest")),
    ]
    with tally:
        parallel.branches(prediction(case, model), ("cond", "uncond")[: grid.cfg])
    for hook in hooks:
        hook.remove()
    return tally


# Bytes


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


def count_grids(cases: Mapping[str, Case], sizes: Sequence[int]) -> dict[str, dict[Grid, dict[int, Tally]]]:
    """Tallies by case, grid and rank; always one of rank 0."""
    models = {name: build(case.spec, 1) for name, case in cases.items()}
    found: dict[str, dict[Grid, dict[int, Tally]]] = {name: {} for name in cases}
    for grid in [grid for size in sizes for grid in grids(size)]:
        runs = {name: ranks_to_run(case, grid) for name, case in cases.items()}
        for rank in sorted(set().union(*runs.values())):
            with fake_rank(grid, rank) as parallel:
                for name, case in cases.items():
                    if rank in runs[name]:
                        tally = count(case, models[name], parallel, grid, rank)
                        found[name].setdefault(grid, {})[rank] = tally
    return found


def attention_rows(cases: Mapping[str, Case], tallies: Mapping[str, Mapping[Grid, Mapping[int, Tally]]]) -> list[dict]:
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
            row |= {"counted": counted, "formula": formula}
            rows.append(row | {"ratio": sum(counted.values()) / sum(formula.values())})
    return rows


def guidance_rows(cases: Mapping[str, Case], tallies: Mapping[str, Mapping[Grid, Mapping[int, Tally]]]) -> list[dict]:
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
    stored, count = (
        sum(size(one) for one in model.parameters())
        + (layers - 1) * sum(size(one) for one in model.blocks.parameters())
        for size in (lambda one: one.nbytes, lambda one: one.numel())
    )
    tally = Tally(Grid(), 0)
    with fake_rank(Grid(ulysses=ranks)):
        shard_model(model, model.blocks, weight_mesh("cpu", per_machine))
        for name, parameter in list(model.named_parameters()):
            first, last = own_rows(parameter)
            with fake:
                rows = torch.empty(last - first, *parameter.shape[1:], dtype=parameter.dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, with_rows(parameter, rows))
        # A table that is kept for the next caller must not be a fake one.
        with patch.object(rope, "_table", rope._table.__wrapped__), fake, torch.no_grad(), tally:
            time_RC = torch.empty(1, spec.dit.dim)
            model.embed_time = lambda t, tokens: (time_RC, time_RC[:, None].expand(1, 6, -1), [(0, tokens.total)])
            model(torch.empty(1, spec.dit.in_dim, 1, 2, 2), torch.empty(1), torch.empty(1, 1, spec.dit.text_dim))
    root, block = (sum(one.received.values()) for one in tally.transfers["rest"])
    share = len(tally.transfers["rest"][0].ranks)
    counted, formula = root + layers * block, weight_bytes(share, stored)
    row = {"network": network, "ranks": ranks, "sharing": share, "parameters": count, "stored": stored}
    row |= {"counted": counted, "formula": formula, "ratio": counted / formula}
    return row | {"two_bytes_each": weight_bytes(share, 2 * count), "ratio_to_that": counted / weight_bytes(share, 2 * count)}


# FLOPs


def flops_row(name: str, case: Case) -> dict[str, Any]:
    """Of one forward of all layers on one rank, in TFLOP."""
    model = build(case.spec, case.spec.dit.num_layers)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        prediction(case, model)("cond")
    by_module = counter.get_flop_counts()

    def products(kind: str) -> float:  # on the meta device, attention is two of them
        modules = (counts for module, counts in by_module.items() if module.endswith(f".{kind}"))
        return sum(counts[torch.ops.aten.bmm] for counts in modules) / 1e12

    total = counter.get_total_flops() / 1e12
    counted = {"self_attention": products("self_attn"), "cross_attention": products("cross_attn")}
    counted = {"linear": total - sum(counted.values()), **counted, "total": total}
    formula = {part: flops / 1e12 for part, flops in forward_flops(case.spec, case.tokens).items()}
    formula["total"] = sum(formula.values())
    row = {"case": name, "tokens": case.tokens, "counted": counted, "formula": formula}
    row["ratio"] = {part: counted[part] / formula[part] for part in counted}
    if name in KNOWN_TFLOP:
        row["known"] = dict(zip(counted, KNOWN_TFLOP[name]))
        row["rounds_to_known"] = {part: round(counted[part]) == known for part, known in row["known"].items()}
    return row
