"""Conditioning by a branch of the network (VACE): a source video, a mask of what is made anew, reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.cache import StepContext
from wan.conditioning.condition import Condition
from wan.conditioning.image import Encode
from wan.conditioning.sizes import latent_frames


@dataclass(frozen=True)
class VaceCondition(Condition):
    """context: [1, 96, R + T', h, w] of R references and the video, see `vace_context`
    scale: what hints are multiplied by
    extra_frames: R"""

    context: Tensor
    scale: float = 1.0
    extra_frames: int = 0

    def inputs(self, ctx: StepContext) -> dict[str, Any]:
        return {"vace_context": self.context, "vace_context_scale": self.scale}


def vace_condition(
    encode: Encode, frames: Tensor, mask: Tensor, references: Sequence[Tensor] = (), *, context_scale: float = 1.0
) -> VaceCondition:
    """Condition of a VACE run.

    frames:     [3, T, H, W] in [-1, 1], T = 4n + 1; without a source video zeros
    mask:       [1, T, H, W] in 0..1: 1 where the video is made anew
    references: [3, 1, H, W] in [-1, 1] each
    """
    return VaceCondition(vace_context(encode, frames, mask, references), context_scale, len(references))


def vace_context(encode: Encode, frames: Tensor, mask: Tensor, references: Sequence[Tensor]) -> Tensor:
    """[1, 96, R + T', h, w]: latents of what is kept and of what is replaced, with grey in place of the other, and 64
    channels of mask; in front, each in a latent frame of its own, the references, which are all kept."""
    is_new = mask > 0.5
    kept = encode(frames.masked_fill(is_new, 0)[None])
    replaced = encode(frames.masked_fill(~is_new, 0)[None])
    video = torch.cat([kept, replaced, mask_channels(mask, *kept.shape[-2:]).to(kept)[None]], dim=1)
    pictures = [encode(picture[None]) for picture in references]
    rest = video.shape[1] - kept.shape[1]
    padded = [F.pad(latent, (0, 0, 0, 0, 0, 0, 0, rest)) for latent in pictures]
    return torch.cat([*padded, video], dim=2)


def mask_channels(mask: Tensor, height: int, width: int) -> Tensor:
    """[1, T, H, W] -> [H/height * W/width, T', height, width]: the pixels of a cell are its channels, row by row.

    In time each latent frame takes the nearest frame, by the centres of both: of 81 frames 1, 5, 9, ...
    """
    frames, rows, columns = mask.shape[1:]
    cells = mask[0].view(frames, height, rows // height, width, columns // width)
    channels = cells.permute(2, 4, 0, 1, 3).reshape(-1, frames, height, width)
    return F.interpolate(channels[None], size=(latent_frames(frames), height, width), mode="nearest-exact")[0]
