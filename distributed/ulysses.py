"""DeepSpeed Ulysses (arXiv 2309.14509): tokens of all heads <-> some heads of all tokens, by one exchange each way.

Heads and tokens that the processes do not divide travel in unequal parts: nothing is padded.
Shape legend: N tensors, B batch, L tokens of this process, T tokens of the group, H heads, G heads of this process,
D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from wan.distributed.grid import split
from wan.distributed.shards import Group


def to_heads(x_NBLHD: Sequence[Tensor], lengths: Sequence[int], group: Group) -> tuple[Tensor, ...]:
    """N tensors `[B, L, H, D]`, together, to N `[B, T, G, D]`. lengths: L of each member."""
    B, L, H, D = x_NBLHD[0].shape
    heads, N = split(H, group.size), len(x_NBLHD)
    parts = zip(*(x.split(heads, dim=2) for x in x_NBLHD), strict=True)  # by receiver
    mine = heads[group.rank]
    sent = [one.reshape(-1) for part in parts for one in part]
    received = _exchange(sent, [N * B * L * h * D for h in heads], [N * B * t * mine * D for t in lengths], group)
    received = [one.view(N, B, t, mine, D) for one, t in zip(received, lengths, strict=True)]
    return torch.cat(received, dim=2).unbind(0)


def to_tokens(x_BTGD: Tensor, heads: int, lengths: Sequence[int], group: Group) -> Tensor:
    """`[B, T, G, D]` to `[B, L, H, D]`, H = `heads`; the way back."""
    B, _, G, D = x_BTGD.shape
    sizes, L = split(heads, group.size), lengths[group.rank]
    sent = [one.reshape(-1) for one in x_BTGD.split(list(lengths), dim=1)]
    received = _exchange(sent, [B * t * G * D for t in lengths], [B * L * h * D for h in sizes], group)
    return torch.cat([one.view(B, L, h, D) for one, h in zip(received, sizes, strict=True)], dim=2)


def _exchange(parts: list[Tensor], sent_sizes: list[int], sizes: list[int], group: Group) -> tuple[Tensor, ...]:
    """Empties `parts`: they may be copies."""
    sent = torch.cat(parts)
    parts.clear()
    received = sent.new_empty(sum(sizes))
    group.all_to_all(received, sent, sizes, sent_sizes)
    return received.split(sizes)
