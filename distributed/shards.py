"""An axis that the processes of a group share: each holds a run of it, in order of rank, as equally long as may be.

Nothing is padded where it is computed with, so any length goes on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """`x` of all members, equally long, one after the other along the first axis of `out`."""
        _all_gather(out, x, group=self.handle)

    def gather_each(self, outs: list[Tensor], x: Tensor) -> None:
        """`x` of each member, alike."""
        dist.all_gather(outs, x, group=self.handle)

    def all_to_all(self, out: Tensor, x: Tensor, sizes: list[int], sent_sizes: list[int]) -> None:
        """Places of `x` to each member, and of `out` from each."""
        dist.all_to_all_single(out, x, sizes, sent_sizes, group=self.handle)

    def exchange(self, sent: Sequence[Message], received: Sequence[Message]) -> list[dist.Work]:
        """Tensors to and from members, on their way until the results have been waited for."""
        ways = [(dist.isend, sent), (dist.irecv, received)]
        calls = [
            dist.P2POp(way, tensor, self.global_rank(rank), self.handle)
            for way, messages in ways
            for rank, tensor in messages
        ]
        return dist.batch_isend_irecv(calls)


Message = tuple[int, Tensor]  # with the number of the member that it goes to or comes from


@dataclass(frozen=True)
class Imagined(Group):
    """Number 0 of so many processes that are not there: nothing travels. For counting what one of them needs."""

    count: int = 1

    @property
    def size(self) -> int:
        return self.count

    @property
    def rank(self) -> int:
        return 0

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        pass

    def gather_each(self, outs: list[Tensor], x: Tensor) -> None:
        pass

    def all_to_all(self, out: Tensor, x: Tensor, sizes: list[int], sent_sizes: list[int]) -> None:
        pass

    def exchange(self, sent: Sequence[Message], received: Sequence[Message]) -> list[dist.Work]:
        return []


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
        self.group.all_gather(all_parts, sent)
        parts = [one[: size * scale] for one, size in zip(all_parts.split(longest), self.sizes, strict=True)]
        return torch.cat(parts).movedim(0, dim).contiguous()
