"""What every VAE has: normalised latents, tiles, work shared by rows, frames that come and go in chunks.

Processes of a group may share the work: all give the whole input and get the whole result, and in between each has
some of the latent's rows and the pixels of these. Beside the result, memory does not grow with the video's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from wan.distributed.halo import RowShards
from wan.distributed.shards import ALONE, Group
from wan.finite import NotFinite, is_finite
from wan.models.vae_blocks import State

# Per-channel statistics of the released latents: what the diffusion model sees is (latent - mean) / std.
LATENT_STATS = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
        + [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
        + [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891]
        + [0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502]
        + [-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723]
        + [-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901]
        + [0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659]
        + [0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944]
        + [0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}


class VideoVAE(nn.Module):
    """Pixels `[B, 3, T, H, W]` in [-1, 1] <-> latents `[B, z, T', h, w]`, T = 4T' - 3, of `stride_s` pixels a side.

    A network has an `encoder` and a `decoder`, called chunk by chunk with the State of the run, on activations
    `[B, T, H, W, C]`; `frames`, `latents`, `posterior_mean` and `pixels` are what stands around them.
    """

    encoder: nn.Module | None
    decoder: nn.Module

    def __init__(self, z_dim: int, stride_s: int, latent_mean: Iterable[float], latent_std: Iterable[float]):
        super().__init__()
        self.between_chunks: Callable[[], None] = lambda: None  # what it raises ends the work
        self.z_dim, self.stride_s = z_dim, stride_s
        self.latent_mean, self.latent_std = list(latent_mean), list(latent_std)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def frames(self, video: Tensor) -> Iterator[Tensor]:
        """The chunks that the encoder takes, one for each latent frame."""
        raise NotImplementedError

    def posterior_mean(self, encoded: Tensor, state: State) -> Tensor:
        """`[B, T', h, w, C] -> [B, T', h, w, z]`, of all that the encoder made."""
        raise NotImplementedError

    def latents(self, z: Tensor, state: State) -> Tensor:
        """`[B, z, T', h, w] -> [B, T', h, w, C]`, as the decoder takes them."""
        raise NotImplementedError

    def pixels(self, decoded: Tensor) -> Tensor:
        """What the decoder made, as pixels `[B, 3, T, H, W]`: one frame first, then four."""
        raise NotImplementedError

    def encode(self, video: Tensor, tile_px: int = 0, group: Group = ALONE) -> Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] -> normalised latent `[B, z, 1 + (T-1)//4, H/s, W/s]`, fp32.

        Frames beyond 4n+1 are dropped, as in the official code. `tile_px` > 0 encodes in overlapping square tiles.
        Each tile is shared by the `group`.
        """
        mean, std = self._stats(video)
        encode = partial(self.encode_raw, group=group)
        return (_tiled(encode, video, tile_px, 1 / self.stride_s, self.stride_s) - mean) * (1 / std)

    def decode(self, z: Tensor, tile_px: int = 0, group: Group = ALONE) -> Tensor:
        """Normalised latent `[B, z, T', h, w]` -> video `[B, 3, 4T'-3, sh, sw]` in [-1, 1], fp32.

        Raises NotFinite, which names the frames.
        """
        mean, std = self._stats(z)
        z = z.float() / (1 / std) + mean
        decode = partial(self.decode_raw, group=group)
        return _tiled(decode, z, tile_px // self.stride_s, self.stride_s, 1).clamp_(-1, 1)

    def encode_raw(self, video: Tensor, group: Group = ALONE) -> Tensor:
        """The posterior mean, not normalised (no sampling)."""
        count, rest = divmod(video.shape[3], self.stride_s)
        rows = RowShards(ALONE if rest else group, count)  # a height that the stride does not divide is not shared
        state, encoded = State(rows), []
        for chunk in self.frames(rows.part(video, 3, self.stride_s)):
            if encoded:
                self.between_chunks()
            encoded.append(self.encoder(chunk.contiguous(), state))
        mean = self.posterior_mean(torch.cat(encoded, 1), state)
        return rows.gather(mean.permute(0, 4, 1, 2, 3).float().contiguous(), 3)

    def decode_raw(self, z: Tensor, group: Group = ALONE) -> Tensor:
        """Pixels, not clamped, of a latent in the VAE's own scale. Raises NotFinite as soon as a frame is not."""
        B, _, T, h, w = z.shape
        video = None
        for start, chunk in self._decode_chunks(z, RowShards(group, h)):
            if not is_finite(chunk):  # before anything is clamped, which makes a number of an infinity
                last = start + chunk.shape[2]
                raise NotFinite(f"frame{f's {start + 1} to' if last > start + 1 else ''} {last} of the decoded video")
            if video is None:
                video = chunk.new_empty(B, 3, 4 * T - 3, *chunk.shape[3:], dtype=torch.float32)
            video[:, :, start : start + chunk.shape[2]] = chunk
        return video

    def _decode_chunks(self, z: Tensor, rows: RowShards) -> Iterator[tuple[int, Tensor]]:
        state = State(rows)
        start = 0
        for frame in self.latents(rows.part(z, 3), state).split(1, dim=1):
            self.between_chunks()
            chunk = self.pixels(self.decoder(frame, state))
            chunk = rows.gather(chunk, 3, self.stride_s)  # by chunks: less memory than strips of the whole video
            yield start, chunk
            start += chunk.shape[2]

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1)
            for values in (self.latent_mean, self.latent_std)
        )
        return mean, std


def _tiled(run, x: Tensor, tile: int, scale: float, align: int) -> Tensor:
    """Applies `run` to overlapping square tiles of the last two axes and blends them linearly.

    `tile` is the tile's side in units of `x` (0: no tiling), `scale` the output's size relative to the input, `align`
    what tile borders must be multiples of. A tile is at least two of these; a quarter of it overlaps the next.
    """
    H, W = x.shape[-2:]
    tile = tile // align * align
    if not tile or (H <= tile and W <= tile):
        return run(x)
    tile = max(tile, 2 * align)
    overlap = max(align, tile // 4 // align * align)
    out = weights = None
    for top in _starts(H, tile, tile - overlap):
        for left in _starts(W, tile, tile - overlap):
            y = run(x[..., top : top + tile, left : left + tile])
            if out is None:
                size = (int(H * scale), int(W * scale))
                out, weights = y.new_zeros(*y.shape[:-2], *size), y.new_zeros(size)
            ramp = int(overlap * scale)
            mask = _ramp(y, -2, ramp)[:, None] * _ramp(y, -1, ramp)
            window = (..., slice(int(top * scale), int(top * scale) + y.shape[-2]))
            window += (slice(int(left * scale), int(left * scale) + y.shape[-1]),)
            out[window] += y * mask
            weights[window[1:]] += mask
    return out.div_(weights)


def _starts(size: int, tile: int, step: int) -> list[int]:
    return [*range(0, max(size - tile, 0), step), max(size - tile, 0)]


def _ramp(y: Tensor, axis: int, overlap: int) -> Tensor:
    """Weights along an axis: rising over the first `overlap` samples, falling over the last."""
    position = torch.arange(y.shape[axis], device=y.device, dtype=torch.float32) + 1
    return torch.minimum(position, position.flip(0)).clamp_(max=overlap + 1)
