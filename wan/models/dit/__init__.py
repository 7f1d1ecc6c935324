"""The Wan diffusion transformer.

Source: behaviour of the official Wan2.1 / Wan2.2 `WanModel`; parameter names are theirs.
Shape legend: B batch, L tokens of this rank, M context tokens, C width, H heads, D head width, R distinct timesteps.
"""

from wan.models.dit.block import CLIP_DIM, CLIP_TOKENS
from wan.models.dit.model import WanModel
from wan.models.dit.sequence import Schedule

__all__ = ["CLIP_DIM", "CLIP_TOKENS", "Schedule", "WanModel"]
