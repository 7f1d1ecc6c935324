"""What ranks send and compute, counted, and how fast that can be, predicted: python -m benchmarks.comm

Needs no GPU and takes no time of one. The real network and the real `Parallel` run as one rank of a fake process group,
on the meta device: a dispatch mode sees each collective, product and pass over memory, with its true size. One layer
of real width runs; the others are alike.

    attention  bytes that a rank sends for one layer, bf16, beside `attention_bytes` of distributed/grid.py
    guidance   bytes that a rank sends to the other branch in a step, beside one fp32 latent
    weights    bytes that a rank receives in a forward when weights are shared out, beside `weight_bytes`
    FLOPs      of one forward of the whole network, by torch's FlopCounterMode, beside `forward_flops` and a table
    roofline   predicted seconds of a step on up to 64 GPUs, beside published ones: see roofline.py

Bytes are those of the calls; a byte to oneself is none. They are means over ranks: over all of them up to 8, above that
over those of the first and last place of the ring, which differ by one token; heads differ along ulysses, where all run.
An all-gather counts as each rank sending its part to each other, an all-reduce as twice the tensor's other parts.
FSDP does not run on the meta device, so there the weights are fake tensors, and the embedding of the time, which has to
read its values, is left out: its weights are still gathered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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
from distributed.grid import Grid, attention_bytes, grids, weight_bytes
from distributed.parallel import Parallel
from wan.command import Parser, run_command
from wan.conditioning.sizes import latent_shape
from wan.errors import UsageError
from wan.memory import forward_flops
from wan.models.attention import BackEnd
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel
from wan.tasks import load_task

PARTS = ("linear", "self_attention", "cross_attention")
AXES = {"alltoall_base_": "ulysses", "send": "ring", "_allgather_base_": "gather", "allgather_": "guidance"}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
# Allocations, and views that their schema does not call so: no pass over memory.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "alias"}


class Case:
    """A network and a size of video. task: None for a network that is not one of configs/tasks."""

    def __init__(self, task: str, width: int, height: int, frames: int, **changes: int):
        self.task, self.size, self.changes = task, (width, height, frames), changes

    @cached_property
    def spec(self) -> Any:
        spec = load_task(self.task)
        spec.dit.update(self.changes)
        return spec

    @cached_property
    def latent(self) -> tuple[int, int, int, int]:
        width, height, frames = self.size
        return latent_shape(self.spec.vae.z_dim, frames, height, width, self.spec.vae_stride[1])

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
I2V = {"i2v-14B 480p": Case("i2v-14B", 832, 480, 81)}  # of published figures
TABLE_RANKS = (2, 4, 8, 16, 64)
GPUS = (1, 2, 4, 8, 16, 32, 64)
# TFLOP of one forward, in the order of PARTS, and the total, rounded to whole ones: the figures of the plan of this work.
FLOPS_TABLE = {
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
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=grid.size)
    try:
        yield Parallel(*grid)
    finally:
        dist.destroy_process_group()


class Transfer:
    """A collective, or one turn of a ring, among `ranks`. sent, received: bytes by the other rank.

    behind: FLOPs of the attention that is computed while it travels.
    """

    def __init__(self, axis: str, ranks: Sequence[int], sent: dict[int, int], received: dict[int, int]):
        self.axis, self.ranks, self.sent, self.received = axis, tuple(ranks), sent, received
        self.behind = 0


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
        tensor = next(iter(tree_leaves(args[1]))) if "gather" in name else next(iter(tree_leaves(args[0])))
        if name == "send":
            sent, received = {ranks[args[2]]: tensor.nbytes}, {}
        elif name == "alltoall_base_":
            sent, received = (dict(zip(ranks, (n * tensor.itemsize for n in sizes))) for sizes in (args[4], args[3]))
        else:
            share = 2 * tensor.nbytes // len(ranks) if name == "allreduce_" else tensor.nbytes
            sent, received = dict.fromkeys(ranks, share), dict.fromkeys(ranks, share)
        for sizes in (sent, received):
            sizes.pop(self.rank, None)
        one = Transfer(AXES[name], ranks, sent, received)
        self.transfers[self.place].append(one)
        self._leaving = one if name == "send" else None

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
