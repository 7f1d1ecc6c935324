"""An axis that the processes of a group share: each holds a run of it, in order of rank, as equally long as may be.

Nothing is padded where it is computed with, so any length goes on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from wan.distributed.grid import split

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


@dataclass(frozen=True)
class Group:
    """Processes that work together: `size` of them, of which this is number `rank`. handle: None for one alone."""

    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.handle is None else dist.get_world_size(self.handle)

    @property
    def rank(self) -> int:
        return 0 if self.handle is None else dist.get_rank(self.handle)

    def global_rank(self, rank: int) -> int:
        """Number of a member in the whole world."""
        return dist.get_global_rank(self.handle, rank % self.size)

    def sum(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Sums over the group, in fp64, the same on all members. On the CPU: no device is waited for."""
        if self.handle is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.handle)
        return tuple(sums.tolist())


ALONE = Group()


class Shards:
    """An axis of `total` places over a group. `sizes` are those of all members; this one's begin at `start`."""

    def __init__(self, group: Group, total: int):
        self.group, self.total = group, total
        self.sizes = split(total, group.size)
        self.start, self.size = sum(self.sizes[: group.rank]), self.sizes[group.rank]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of `x`, which all hold whole: `total` places along `dim`."""
        if self.group.size == 1:
            return x
        return x.narrow(dim, self.start, self.size).contiguous()

    def gather(self, x: Tensor, dim: int, scale: int = 1) -> Tensor:
        """The whole of what `shard` cut along `dim`, on every member. scale: places of `x` for each of the axis."""
        if self.group.size == 1:
            return x
        # Collectives gather equal parts only, so shorter ones travel with a tail that is cut off on arrival.
        part, longest = x.movedim(dim, 0), self.sizes[0] * scale
        sent = part.new_zeros(longest, *part.shape[1:])
        sent[: len(part)] = part
        all_parts = sent.new_empty(self.group.size * longest, *part.shape[1:])
        _all_gather(all_parts, sent, group=self.group.handle)
        parts = [one[: size * scale] for one, size in zip(all_parts.split(longest), self.sizes, strict=True)]
        return torch.cat(parts).movedim(0, dim).contiguous()
