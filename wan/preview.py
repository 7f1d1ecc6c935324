"""What the latent of a step will look like: by a TAE, or without a VAE by a linear map from each cell to a colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan.files import atomic
from wan.models.tae import TAE
from wan.models.vae_base import VideoVAE

_CELLS = 12  # side of the pictures that a map is fitted on
_PICTURES = 12
_GIF_MS = 120  # of one frame


class Preview:
    """A map of a VAE: colour = latent @ weight + bias, fitted by least squares on random pictures, each shown for five
    frames, which are two of the latent.

    It is fitted on the VAE at hand, which so can be any one: those of Wan, distilled ones, the embedded tiny one.
    """

    def __init__(self, vae: VideoVAE):
        device = next(vae.parameters()).device
        pictures = _pictures(torch.Generator().manual_seed(0))  # one pixel a cell
        videos = F.interpolate(pictures, scale_factor=vae.stride_s)[:, :, None].expand(-1, -1, 5, -1, -1)
        latents = torch.cat([vae.encode(video[None].to(device)) for video in videos]).float().cpu()
        rows = latents.movedim(1, -1).flatten(0, 3).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        target = pictures[:, :, None].expand(-1, -1, latents.shape[2], -1, -1).movedim(1, -1).flatten(0, 3).double()
        self.map = torch.linalg.lstsq(rows, target).solution.float()  # [z + 1, 3]

    def __call__(self, latent: Tensor) -> np.ndarray:
        """`[z, T', h, w]` -> uint8 `[T', h, w, 3]`."""
        colours = latent.float().cpu().movedim(0, -1) @ self.map[:-1] + self.map[-1]
        return _as_uint8(colours)


def preview_of(vae: VideoVAE) -> Callable[[Tensor], np.ndarray]:
    """What shows the latents of a VAE: by a TAE, which it holds, a picture of full size for each latent frame."""

    def sketch(latent: Tensor) -> np.ndarray:
        device = next(vae.parameters()).device
        return _as_uint8(vae.sketch(latent[None].to(device))[0].permute(1, 2, 3, 0).cpu())

    return sketch if isinstance(vae, TAE) else Preview(vae)


def _as_uint8(colours: Tensor) -> np.ndarray:
    return colours.add(1).mul(127.5).clamp(0, 255).to(torch.uint8).numpy()


def _pictures(generator: torch.Generator) -> Tensor:
    """[n, 3, rows, columns] in [-1, 1]: each a coloured rectangle over a grey background."""
    pictures = torch.rand(_PICTURES, 1, 1, 1, generator=generator).mul(2).sub(1).repeat(1, 3, _CELLS, _CELLS)
    for picture in pictures:
        side, top, left = (int(x) for x in torch.randint(_CELLS // 4, _CELLS // 2, (3,), generator=generator))
        picture[:, top : top + side, left : left + side] = torch.rand(3, 1, 1, generator=generator) * 2 - 1
    return pictures


def write_preview(path: str | Path, frames: np.ndarray, least_px: int = 256) -> None:
    """A PNG of the middle frame, or a GIF of all, enlarged by a whole number to at least so many px. Atomic."""
    from PIL import Image

    path, scale = Path(path), max(1, -(-least_px // max(frames.shape[1:3])))
    frames = frames if path.suffix.lower() == ".gif" else frames[len(frames) // 2 :][:1]
    first, *others = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)) for frame in frames]
    with atomic(path) as temporary:
        if path.suffix.lower() == ".gif":
            first.save(temporary, format="GIF", save_all=True, append_images=others, duration=_GIF_MS, loop=0)
        else:
            first.save(temporary, format="PNG")
