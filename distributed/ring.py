"""Ring attention (arXiv 2310.01889): keys and values go round, each part is attended to and the results are merged.

Shape legend: B batch, L tokens of this process, M tokens of the part that is here now, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from wan.distributed.shards import Group

# (q, k, v) -> (attention [B, L, H, D], log of the sum of the exponentials [B, L, H], fp32)
AttentionWithLSE = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ring_attention(
    attention: AttentionWithLSE, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: Sequence[int], group: Group
) -> Tensor:
    """Attention of this process's queries to the keys and values of all. lengths: tokens of each member.

    The next part travels while the present one is computed. Merged in fp32, rounded once to the type of `q`.
    """
    part_2BMHD, out, lse = torch.stack([k_BLHD, v_BLHD]), None, None
    for turn in range(group.size):
        arriving, transfers = None, []
        if turn < group.size - 1:
            B, _, H, D = k_BLHD.shape
            arriving = part_2BMHD.new_empty(2, B, lengths[(group.rank - turn - 1) % group.size], H, D)
            transfers = group.exchange([(group.rank + 1, part_2BMHD)], [(group.rank - 1, arriving)])
        part_out, part_lse = attention(q_BLHD, *part_2BMHD)
        out, lse = merge(out, lse, part_out, part_lse)
        for transfer in transfers:
            transfer.wait()
        part_2BMHD = arriving
    return out.to(q_BLHD.dtype)


def merge(out: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmax-weighted means as one: each weighs as much as the sum of its exponentials. Changes `out`."""
    if out is None:
        return part.float(), part_lse
    share = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    return torch.lerp(out, part.float(), share), torch.logaddexp(lse, part_lse)
