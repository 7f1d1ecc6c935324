"""The tokens of one forward: where they are in space and time, who has which, and how they attend to each other.

They come in groups, one after another, each a grid with a place of its own: the video is one, whatever else a task
puts beside it are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wan.distributed.parallel import Parallel
from wan.models.attention import BackEnd
from wan.models.dit.rope import rope_table
from wan.models.ops.reference import Norm, Reference, Segments


@dataclass(frozen=True)
class Group:
    """Tokens of a grid.

    grid, origin: (frames, rows, columns), and the position of its first token among all, which may be negative
    extent: the (frames, rows, columns) of positions that the grid is spread over; None: its own
    time: the timestep of these tokens; None: that of the step
    is_seen: whether the head makes something of them
    """

    grid: tuple[int, int, int]
    origin: tuple[int, int, int] = (0, 0, 0)
    extent: tuple[int, int, int] | None = None
    time: float | None = None
    is_seen: bool = True

    @property
    def count(self) -> int:
        return math.prod(self.grid)


class Times(NamedTuple):
    """What a forward is told of time: `t` [B] or [B, tokens], on the CPU, one of the steps of a schedule."""

    t: Tensor
    schedule: Schedule

    @classmethod
    def of(cls, t: Tensor) -> Times:
        """Of a step that stands alone."""
        [times] = Schedule([t])
        return times


class Schedule:
    """The timesteps of all the steps that one network takes in a run.

    They are read by the host once, here. The first forward embeds those of all steps, so that the others copy nothing
    to the device; what it made belongs to that network and to the weights it had.
    """

    def __init__(self, steps: Iterable[Tensor]):
        self.steps = [t.cpu() for t in steps]
        self.embedded: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}  # by the distinct timesteps of a step

    def __iter__(self) -> Iterator[Times]:
        """Step by step."""
        return (Times(t, self) for t in self.steps)


class Sequence:
    """The tokens of one forward, of which this rank has a part; `attention`: a back end of `wan.models.attention`,
    `ops`: the elementwise chains.

    Blocks ask it for all that concerns more than one token, or the place of one in space and time.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        parallel: Parallel,
        attention: BackEnd,
        ops: Reference,
        head_dim: int,
        device: torch.device,
    ):
        self.groups, self.attention, self.ops = tuple(groups), attention, ops
        self.shards = parallel.tokens(sum(group.count for group in self.groups))
        places = tuple((group.grid, group.origin, group.extent or group.grid) for group in self.groups)
        self.rope_LD = self.shards.shard(rope_table(places, head_dim, device), dim=0)

    # In time

    def segments(self, t: Tensor, batch: int) -> tuple[tuple[float, ...], Segments]:
        """The distinct timesteps of all tokens, in order, and which of them those of this rank have.

        t: [B], [1], or one for each token of the groups without a time of their own (what exceeds them is ignored).
        """
        told = sum(group.count for group in self.groups if group.time is None)
        if t.ndim == 2 and t.shape[1] < told:
            raise ValueError(f"{t.shape[1]} timesteps for {told} tokens")
        told_BL = (t[:, :told] if t.ndim == 2 else t[:, None].expand(-1, told)).expand(batch, -1)
        parts, start = [], 0
        for group in self.groups:
            if group.time is None:
                parts.append(told_BL[:, start : start + group.count])
                start += group.count
            else:
                parts.append(told_BL.new_full((1, 1), group.time).expand(batch, group.count))
        time_BL = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        values = torch.unique(torch.unique_consecutive(time_BL))
        mine, counts = torch.unique_consecutive(self.shards.shard(time_BL, dim=1).reshape(-1), return_counts=True)
        rows = torch.searchsorted(values, mine)
        return tuple(values.tolist()), list(zip(rows.tolist(), counts.tolist(), strict=True))

    def set_time(self, time_RC: Tensor, projected_R6C: Tensor, segments: Segments) -> None:
        """What the network makes of each distinct timestep, and which tokens have which."""
        self._time_R1C, self._projected_R6C, self._segments = time_RC[:, None], projected_R6C, segments

    def modulation(self, learned: nn.Parameter) -> tuple[Tensor, ...]:
        """Shifts, scales and gates, fp32 `[R, C]` each: six of a block, two of the head."""
        time = self._projected_R6C if learned.shape[1] == 6 else self._time_R1C
        return (time + learned.float()).unbind(1)

    def norm(self, x_BLC: Tensor, norm: Norm) -> Tensor:
        """LayerNorm, where it is modulated by what each token's time says."""
        return self.ops.norm(x_BLC, norm, self._segments)

    def gated_add(self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor) -> Tensor:
        """`x + gate * y`."""
        return self.ops.gated_add(x_BLC, y_BLC, gate_RC, self._segments)

    def gated_add_norm(self, x_BLC: Tensor, y_BLC: Tensor, gate_RC: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """`x + gate * y`, or `x + y`, and its norm."""
        return self.ops.gated_add_norm(x_BLC, y_BLC, gate_RC, norm, self._segments)

    # Among ranks

    def shard(self, x_BLC: Tensor) -> Tensor:
        """This rank's part of all tokens."""
        return self.shards.shard(x_BLC, dim=1)

    def mine(self, group: int) -> tuple[slice, range]:
        """Of a group's tokens those that this rank has: where they are among all that it has, and which of the group's
        they are."""
        first, start = sum(one.count for one in self.groups[:group]), self.shards.start
        begin = min(max(start, first), first + self.groups[group].count)
        end = max(min(start + self.shards.size, first + self.groups[group].count), begin)
        return slice(begin - start, end - start), range(begin - first, end - first)

    def gather(self, x_BLC: Tensor) -> Tensor:
        """Of the parts of all ranks, the tokens that are seen."""
        x_BLC = self.shards.gather(x_BLC, dim=1)
        if all(group.is_seen for group in self.groups):
            return x_BLC
        parts = x_BLC.split([group.count for group in self.groups], dim=1)
        return torch.cat([part for part, group in zip(parts, self.groups, strict=True) if group.is_seen], dim=1)

    def frames_of(self, group: int) -> list[tuple[int, slice]]:
        """The tokens of a group that this rank has: for each latent frame with any, which of this rank's they are."""
        start = sum(one.count for one in self.groups[:group]) - self.shards.start
        frames, rows, columns = self.groups[group].grid
        found = []
        for frame in range(frames):
            first, end = (start + at * rows * columns for at in (frame, frame + 1))
            first, end = max(first, 0), min(end, self.shards.size)
            if first < end:
                found.append((frame, slice(first, end)))
        return found

    def attend(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        """Self-attention of this rank's queries to all keys and values."""
        return self.shards.attention(self.attention, q_BLHD, k_BLHD, v_BLHD)
