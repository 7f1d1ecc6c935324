"""The processes that make one video, as a grid: cfg x ring x ulysses. On one process every call is the identity.

cfg: the two branches of classifier-free guidance; ring and ulysses: the tokens, see `ring.py` and `ulysses.py` (both
together: arXiv 2405.07719). Ranks that differ in ulysses only are neighbours, for it exchanges most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from wan.distributed.ring import ring_attention
from wan.distributed.shards import ALONE, Group, Imagined, Shards
from wan.distributed.ulysses import to_heads, to_tokens


class Attention(Protocol):
    """softmax(q k^T / sqrt(D)) v of `[B, L, H, D]`; `with_lse` also gives the log of the sum of the exponentials, fp32
    `[B, L, H]`."""

    def __call__(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor: ...

    def with_lse(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]: ...


class Parallel:
    """This process's place in the grid. Without sizes: one process alone.

    With sizes, whose product is the number of processes, torch.distributed must have been initialised; all processes
    make the same Parallel. local_size: how many of them are on this machine. mesh: the DeviceMesh (cfg, ring, ulysses),
    None on one process.
    """

    def __init__(self, cfg: int = 1, ring: int = 1, ulysses: int = 1, *, device_type: str = "cpu", local_size: int = 1):
        self.world = self.cfg = self.ring = self.ulysses = self.sequence = ALONE
        self.mesh, self.local_size = None, local_size
        if cfg * ring * ulysses == 1:
            return
        self.mesh = dist.init_device_mesh(device_type, (cfg, ring, ulysses), mesh_dim_names=("cfg", "ring", "ulysses"))
        sequences = dist.init_device_mesh(device_type, (cfg, ring * ulysses), mesh_dim_names=("cfg", "sequence"))
        self.cfg, self.sequence = _group(sequences, "cfg"), _group(sequences, "sequence")
        self.ring, self.ulysses = _group(self.mesh, "ring"), _group(self.mesh, "ulysses")
        self.world = Group(dist.group.WORLD)

    @classmethod
    def imagined(cls, cfg: int = 1, ring: int = 1, ulysses: int = 1) -> Parallel:
        """The first of so many processes that are not there, see `shards.Imagined`."""
        one = cls()
        sizes = {
            "cfg": cfg,
            "ring": ring,
            "ulysses": ulysses,
            "sequence": ring * ulysses,
            "world": cfg * ring * ulysses,
        }
        for axis, size in sizes.items():
            setattr(one, axis, Imagined(count=size) if size > 1 else ALONE)
        return one

    # The tokens

    def tokens(self, count: int) -> TokenShards:
        """`count` tokens, shared by the ranks of the sequence."""
        return TokenShards(self, count)

    def reduce_scalar(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Sums of a few numbers over the ranks that share a sequence, the same on all of them."""
        return self.sequence.sum(values)

    # The branches of guidance

    def branches(self, compute: Callable[[str], Tensor], names: Sequence[str]) -> list[Tensor]:
        """`compute(name)` for each name; one by one, or, along cfg, each on ranks of its own and then exchanged."""
        if self.cfg.size == 1 or len(names) == 1:
            return [compute(name) for name in names]
        if len(names) != self.cfg.size:
            raise ValueError(f"{len(names)} branches on {self.cfg.size} parts of the ranks")
        mine = compute(names[self.cfg.rank]).contiguous()
        results = [torch.empty_like(mine) for _ in names]
        self.cfg.gather_each(results, mine)
        return results

    def exchange(self, values: tuple[float, ...]) -> list[tuple[float, ...]]:
        """A few numbers of this rank's branch -> those of each branch."""
        mine = torch.tensor(values, dtype=torch.float64)
        both = [torch.empty_like(mine) for _ in range(self.cfg.size)]
        dist.all_gather(both, mine, group=self.cfg.handle)
        return [tuple(one.tolist()) for one in both]

    # What one rank makes for all

    def gather_objects(self, mine: Any) -> list[Any]:
        """What every rank gives, in their order. For small things: they travel pickled."""
        if self.world.size == 1:
            return [mine]
        results: list[Any] = [None] * self.world.size
        dist.all_gather_object(results, mine)
        return results

    def told(self, make: Callable[[], Any]) -> Any:
        """`make()` of the first rank, or the error that it raises there, on every rank; the others do not call it. For
        small things: they travel pickled."""
        mine = None, None
        if self.world.rank == 0:
            try:
                mine = make(), None
            except Exception as error:
                mine = None, error
        made, error = self.gather_objects(mine)[0]
        if error is not None:
            raise error
        return made

    def once(self, make: Callable[[], list[Tensor]], device: torch.device | str) -> list[Tensor]:
        """`make()` of the first rank, on every rank's `device`; the others do not call it."""
        if self.world.size == 1:
            return make()
        tensors = [tensor.contiguous() for tensor in make()] if self.world.rank == 0 else []
        told = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if self.world.rank > 0:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in told[0]]
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
        return tensors


def _group(mesh: dist.DeviceMesh, axis: str) -> Group:
    size = mesh.size(mesh.mesh_dim_names.index(axis))
    return Group(mesh.get_group(axis)) if size > 1 else ALONE


class TokenShards(Shards):
    """The tokens of one sequence. Shape legend: B batch, L tokens of this rank, H heads, D head width."""

    def __init__(self, parallel: Parallel, count: int):
        super().__init__(parallel.sequence, count)
        self._ring, self._ulysses = parallel.ring, parallel.ulysses
        width = self._ulysses.size
        # Tokens of the members of this rank's ulysses group, and, with those of such a group together, of its ring.
        first = self._ring.rank * width
        self._lengths = self.sizes[first : first + width]
        self._ring_lengths = [sum(self.sizes[i : i + width]) for i in range(0, len(self.sizes), width)]

    def attention(self, attention: Attention, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        """Self-attention of this rank's queries to the keys and values of all ranks: `[B, L, H, D]`."""
        if self._ulysses.size == 1:
            return self._attend(attention, q_BLHD, k_BLHD, v_BLHD)
        heads = q_BLHD.shape[2]
        qkv = to_heads((q_BLHD, k_BLHD, v_BLHD), self._lengths, self._ulysses)
        return to_tokens(self._attend(attention, *qkv), heads, self._lengths, self._ulysses)

    def _attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 0:  # fewer heads than ranks: this one only passes tokens on
            return q
        if self._ring.size == 1:
            return attention(q, k, v)
        return ring_attention(attention.with_lse, q, k, v, self._ring_lengths, self._ring)
