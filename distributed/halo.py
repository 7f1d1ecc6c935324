"""The rows of a picture over the processes of a group, and their halo: the neighbours' rows on both sides of a seam.

A layer whose window reaches over a seam computes on its own rows and a halo, which is exchanged or, at the outer border
of the picture, zero. So the window needs no padding along the rows. On one process there is neither seam nor halo: all
calls give what they were given, and the layer pads by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from wan.distributed.shards import ALONE, Group, Shards


class RowShards(Shards):
    """An axis of `total` rows over a group, of which everything computed has a multiple: `scale` places for each row.

    before, after: places of the halo on the two sides, at most as many as any member has of its own. Gradients do not
    pass from process to process.
    """

    def __init__(self, group: Group, total: int):
        # With fewer rows than members each computes the whole: nobody is idle, so nobody is waited for.
        super().__init__(group if group.size <= total else ALONE, total)

    def part(self, x: Tensor, dim: int, scale: int = 1) -> Tensor:
        """This process's part of `x`, which all hold whole; a view."""
        if self.group.size == 1:
            return x
        return x.narrow(dim, self.start * scale, self.size * scale)

    def padding(self, places: int) -> int:
        """How many places a window that looks so far still has to be padded by: none where there is a halo."""
        return places if self.group.size == 1 else 0

    def extend(self, x: Tensor, dim: int, before: int, after: int) -> Tensor:
        """`x` with its halo: a copy, or on one process `x` itself."""
        if self.group.size == 1 or before == after == 0:
            return x
        shape = list(x.shape)
        shape[dim] += before + after
        out = x.new_empty(shape)
        self.inner(out, dim, before, after).copy_(x)
        self.exchange(out, dim, before, after)
        return out

    def inner(self, x: Tensor, dim: int, before: int, after: int) -> Tensor:
        """`x` without its halo; a view."""
        if self.group.size == 1:
            return x
        return x.narrow(dim, before, x.shape[dim] - before - after)

    def exchange(self, x: Tensor, dim: int, before: int, after: int) -> None:
        """Fills the halo of `x` in place. All members call it, and with the same halo."""
        if self.group.size == 1 or before == after == 0:
            return
        own = self.inner(x, dim, before, after)
        size = own.shape[dim]
        seams = (  # neighbour, its places in our halo, our places in its halo
            (self.group.rank - 1, x.narrow(dim, 0, before), own.narrow(dim, 0, after)),
            (self.group.rank + 1, x.narrow(dim, before + size, after), own.narrow(dim, size - before, before)),
        )
        sent, received, arrivals = [], [], []
        for neighbour, halo, edge in seams:
            if not 0 <= neighbour < self.group.size:
                halo.zero_()
                continue
            if edge.numel():
                sent.append((neighbour, edge.contiguous()))
            if halo.numel():
                arrivals.append((halo, torch.empty_like(halo, memory_format=torch.contiguous_format)))
                received.append((neighbour, arrivals[-1][1]))
        for transfer in self.group.exchange(sent, received):
            transfer.wait()
        for halo, arrived in arrivals:
            halo.copy_(arrived)


WHOLE = RowShards(ALONE, 0)  # one process; it has all rows, however many there are
