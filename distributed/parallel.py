"""Where a model's tokens are cut up, attended to and put together again.

The model's text always makes these three calls. On one rank, all there is today, each of them is the identity.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Parallel:
    """One rank, which holds all tokens and all heads.

    Shape legend: B batch, L tokens of the queries, M tokens of the keys, H heads, D head width.
    """

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of `x`, which all ranks hold whole, along the token axis `dim`."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole of what `shard` has cut along `dim`, on every rank."""
        return x

    def attention(self, attention: Callable, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """Self-attention of this rank's queries to the keys and values of all ranks: `[B, L, H, D]`."""
        return attention(q_BLHD, k_BMHD, v_BMHD)
