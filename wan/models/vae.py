"""The Wan VAE: 2.1 (16 channels, 8x8 pixels a latent) and 2.2 (48 channels, 16x16), 4 frames a latent frame.

Source: behaviour of the official Wan2.1 and Wan2.2 autoencoders (parameter names are theirs). Encoding takes frames
1, 4, 4, ..., decoding one latent frame at a time. A LightVAE is one of these with narrower layers.
Shape legend as in `vae_blocks`; public methods take and return channels first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wan.models.tae import TAE
from wan.models.vae_base import LATENT_STATS, VideoVAE
from wan.models.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    DownStage,
    ResidualBlock,
    RMSNorm,
    State,
    Upsample,
    UpStage,
    by_twos,
)


class Encoder(nn.Module):
    def __init__(self, version: str, dim: int, z_dim: int, dim_mult, num_res_blocks: int, temporal_downsample):
        super().__init__()
        widths = [dim * m for m in (1, *dim_mult)]
        self.conv1 = CausalConv3d(12 if version == "2.2" else 3, widths[0])
        layers: list[nn.Module] = []
        for i, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            down = i < len(dim_mult) - 1
            temporal = down and temporal_downsample[i]
            if version == "2.2":
                layers.append(DownStage(width_in, width, num_res_blocks, down, temporal))
                continue
            layers += [ResidualBlock(width_in if j == 0 else width, width) for j in range(num_res_blocks)]
            layers += [Downsample(width, temporal)] if down else []
        self.downsamples = nn.ModuleList(layers)
        self.middle = nn.ModuleList([ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)])
        self.head = nn.ModuleDict({"0": RMSNorm(width), "2": CausalConv3d(width, 2 * z_dim)})

    def forward(self, x: Tensor, state: State) -> Tensor:
        layers = [self.conv1, *self.downsamples, *self.middle]
        # At the size of the video, to where it is halved.
        first = 1 + next((at for at, layer in enumerate(layers) if isinstance(layer, (Downsample, DownStage))), 0)
        x = by_twos(layers[:first], x, state, self.conv1.out_channels)
        for layer in layers[first:]:
            x = layer(x, state)
        return self.head["2"](x, state, norm=self.head["0"])


class Decoder(nn.Module):
    def __init__(self, version: str, dim: int, z_dim: int, dim_mult, num_res_blocks: int, temporal_downsample):
        super().__init__()
        widths = [dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        temporal_upsample = list(reversed(temporal_downsample))
        self.conv1 = CausalConv3d(z_dim, widths[0])
        self.middle = nn.ModuleList(
            [ResidualBlock(widths[0], widths[0]), AttentionBlock(widths[0]), ResidualBlock(widths[0], widths[0])]
        )
        layers: list[nn.Module] = []
        for i, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            up = i < len(dim_mult) - 1
            temporal = up and temporal_upsample[i]
            if version == "2.2":
                layers.append(UpStage(width_in, width, num_res_blocks + 1, up, temporal))
                continue
            width_in = width_in // 2 if i > 0 else width_in  # 2.1: the upsample before has halved the width
            layers += [ResidualBlock(width_in if j == 0 else width, width) for j in range(num_res_blocks + 1)]
            layers += [Upsample(width, width // 2, temporal)] if up else []
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": RMSNorm(width), "2": CausalConv3d(width, 12 if version == "2.2" else 3)})

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = self.conv1(x, state)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, state)
        return self.head["2"](x, state, norm=self.head["0"])


class WanVAE(VideoVAE):
    """`version` "2.1" or "2.2"; `dim` encoder width, `dec_dim` decoder width (default `dim`).

    `latent_mean` and `latent_std` (`z_dim` numbers each) default to the released statistics of that `z_dim`.
    """

    def __init__(
        self,
        version: str = "2.1",
        dim: int = 96,
        z_dim: int = 16,
        dec_dim: int | None = None,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks: int = 2,
        temporal_downsample=(False, True, True),
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
    ):
        mean, std = LATENT_STATS.get(z_dim, ([0.0] * z_dim, [1.0] * z_dim))
        shuffle = 2 if version == "2.2" else 1
        super().__init__(z_dim, shuffle * 2 ** (len(dim_mult) - 1), latent_mean or mean, latent_std or std)
        self.version, self.pixel_shuffle = version, shuffle
        shape = (tuple(dim_mult), num_res_blocks, tuple(temporal_downsample))
        self.encoder = Encoder(version, dim, z_dim, *shape)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(version, dec_dim or dim, z_dim, *shape)

    def frames(self, video: Tensor) -> Iterator[Tensor]:
        x = _to_channels_last(video, self.pixel_shuffle, self.dtype)
        yield x[:, :1]
        for start in range(1, x.shape[1] - 3, 4):
            yield x[:, start : start + 4]

    def posterior_mean(self, encoded: Tensor, state: State) -> Tensor:
        return self.conv1(encoded, state)[..., : self.z_dim]

    def latents(self, z: Tensor, state: State) -> Tensor:
        return self.conv2(_to_channels_last(z, 1, self.dtype), state)

    def pixels(self, decoded: Tensor) -> Tensor:
        return _to_channels_first(decoded, self.pixel_shuffle)


def empty_vae(config: Mapping[str, Any]) -> VideoVAE:
    """On the meta device: a WanVAE, or the TAE that a configuration with `widths` is of, see `infer_vae_config`."""
    with torch.device("meta"):
        return (TAE if "widths" in config else WanVAE)(**config)


def _to_channels_last(x: Tensor, shuffle: int, dtype: torch.dtype) -> Tensor:
    """`[B, C, T, H, W] -> [B, T, H/q, W/q, C*q*q]`, new channels in the order (channel, column, row)."""
    B, C, T, H, W = x.shape
    q = shuffle
    x = x.to(dtype).view(B, C, T, H // q, q, W // q, q).permute(0, 2, 3, 5, 1, 6, 4)
    return x.reshape(B, T, H // q, W // q, C * q * q)


def _to_channels_first(x: Tensor, shuffle: int) -> Tensor:
    """The inverse of `_to_channels_last`."""
    B, T, H, W, C = x.shape
    q = shuffle
    x = x.view(B, T, H, W, C // (q * q), q, q).permute(0, 4, 1, 2, 6, 3, 5)
    return x.reshape(B, C // (q * q), T, H * q, W * q)
