"""What tasks put beside the blocks of the transformer: an adapter each, which changes what blocks hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wan.models.dit.block import Context, Hold
from wan.models.dit.sequence import Group, Sequence

After = Callable[[int, Tensor], Tensor]  # after(i, x): hidden states after block i -> what block i + 1 gets


class Adapter:
    """One that does nothing.

    It has no state of its own: what one forward needs is held by the `After` that `begin` makes.

    inputs: the arguments of the model's forward that are its own; each must be given
    names: its modules at the top of the model, by their names there
    """

    inputs: tuple[str, ...]
    names: dict[str, nn.Module]

    def embed(self, inputs: dict[str, Any], x_BLC: Tensor, groups: list[Group]) -> tuple[Tensor, list[Group]]:
        """All tokens of a forward, with what it adds to those of the video, which come first, and behind them."""
        return x_BLC, groups

    def begin(self, inputs: dict[str, Any], x_BLC: Tensor, sequence: Sequence, context: Context, hold: Hold) -> After:
        """Once a forward. x: the tokens of this rank as they enter block 0. Raises ValueError for inputs that do not
        fit. What it returns may be asked for blocks in part, not at all, or again."""
        return lambda block, x_BLC: x_BLC

    def empty_inputs(self, latent: Tensor) -> dict[str, Any]:
        """Its inputs without values, for latents [B, C, F, H, W] on the meta device: what a plan computes with."""
        return {}

    def modules(self, block: int) -> dict[str, nn.Module]:
        """What is used after that block (-1: before the first), by its path in the model, in the order of use."""
        return {}
