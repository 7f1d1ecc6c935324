"""A tiny VAE (TAE): convolutions of single frames, a few of which also see the frame before.

Source: behaviour of TAEHV (taew2_1, taew2_2), whose layout LightTAE (lighttaew2_1, lighttaew2_2) shares; parameter
names are theirs. Encoding takes four frames a latent frame, the last one repeated where there are fewer; decoding
makes four of each, and drops the first three of the video.
Shape legend as in `vae_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.models.layers import Conv2d
from wan.models.vae_base import LATENT_STATS, VideoVAE
from wan.models.vae_blocks import ROWS, State, conv2d, upsampled_conv

_FRAMES = 4  # of pixels, a latent frame
_STAGES = 3  # each has twice the rows and columns of the one before
_BLOCKS = 3  # of a stage
_BOUND = 3.0  # that latents are softly held within
GROWS = (1, 2, 2)  # how many frames a stage of the decoder makes of one


class Conv3x3(Conv2d):
    """Of each frame, zeros around it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=bias)

    def forward(self, x: Tensor, state: State) -> Tensor:
        after = 1 if self.stride == (1, 1) else 0  # of an even number of rows no window reaches beyond the last
        x = state.rows.extend(x, ROWS, 1, after)
        return conv2d(x, self.weight, self.bias, stride=self.stride[0], padding=(state.rows.padding(1), 1))


class MemBlock(nn.Module):
    """A residual block of three convolutions, of which the first sees the frame before as well (zeros at first)."""

    def __init__(self, channels: int):
        super().__init__()
        layers = {"0": Conv3x3(2 * channels, channels)}
        self.conv = nn.ModuleDict(layers | {name: Conv3x3(channels, channels) for name in ("2", "4")})

    def forward(self, x: Tensor, state: State) -> Tensor:
        past = state[self] if self in state else torch.zeros_like(x[:, :1])
        state[self] = x[:, -1:].clone()
        y = self.conv["0"](torch.cat([x, torch.cat([past, x[:, :-1]], 1)], -1), state)
        y = self.conv["2"](F.relu(y, inplace=True), state)
        y = self.conv["4"](F.relu(y, inplace=True), state)
        return F.relu(y.add_(x), inplace=True)


class TPool(nn.Module):
    """`stride` frames to one, by a product of all their channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.stride)).movedim(2, -2).flatten(-2)  # channels of the earliest frame first
        return F.linear(x, self.conv.weight.flatten(1))


class TGrow(nn.Module):
    """One frame to `stride`."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Tensor, grows: bool = True) -> Tensor:
        """Of all the frames; grows: else of the last one alone."""
        weight = self.conv.weight.flatten(1)
        if not grows:
            return F.linear(x, weight[-weight.shape[1] :])
        return F.linear(x, weight).unflatten(-1, (self.stride, -1)).movedim(-2, 2).flatten(1, 2)


class Encoder(nn.ModuleDict):
    """Layers by their number in the file, of which those without weights are left out."""

    def __init__(self, in_channels: int, width: int, z_dim: int):
        super().__init__({"0": Conv3x3(in_channels, width)})
        for stage in range(_STAGES):
            first = 2 + (2 + _BLOCKS) * stage
            self[str(first)] = TPool(width, tuple(reversed(GROWS))[stage])
            self[str(first + 1)] = Conv3x3(width, width, stride=2, bias=False)
            self.update({str(first + 2 + block): MemBlock(width) for block in range(_BLOCKS)})
        self[str(first + 2 + _BLOCKS)] = Conv3x3(width, z_dim)

    def forward(self, x: Tensor, state: State) -> Tensor:
        first, *layers = self.values()
        x = F.relu(first(x, state), inplace=True)
        for layer in layers:
            x = layer(x) if isinstance(layer, TPool) else layer(x, state)
        return x


class Decoder(nn.ModuleDict):
    """Layers by their number in the file, of which those without weights are left out."""

    def __init__(self, z_dim: int, widths: Sequence[int], out_channels: int):
        super().__init__({"1": Conv3x3(z_dim, widths[0])})
        for stage, grow in enumerate(GROWS):
            first, width = 3 + (3 + _BLOCKS) * stage, widths[stage]
            self.update({str(first + block): MemBlock(width) for block in range(_BLOCKS)})
            self[str(first + _BLOCKS + 1)] = TGrow(width, grow)
            self[str(first + _BLOCKS + 2)] = Conv3x3(width, widths[stage + 1], bias=False)
        self[str(first + _BLOCKS + 4)] = Conv3x3(widths[-1], out_channels)

    def forward(self, x: Tensor, state: State, grows: bool = True) -> Tensor:
        """grows: else one frame is made of each latent frame, as the last of its four would be."""
        first, *layers, last = self.values()
        unseen = _FRAMES - 1 if grows and not state else 0
        x = F.relu(first(torch.tanh(x / _BOUND) * _BOUND, state), inplace=True)
        for layer in layers:
            if isinstance(layer, MemBlock):
                x = layer(x, state)
            elif isinstance(layer, TGrow):
                x = layer(x, grows)  # before the picture is enlarged, which is the same, pixel by pixel
            else:
                if layer is layers[-1]:  # from here on no frame is looked back at
                    x = x[:, unseen:]
                x = upsampled_conv(x, layer.weight, None, state)
        return last(F.relu(x, inplace=True), state)


class TAE(VideoVAE):
    """`widths`: of the decoder's three stages and of what follows; `encoder_width`: 0 for a file without an encoder.

    `patch_size`: pixels that lie in one place of the network, a side; `unscaled`: latents are those of the Wan VAE
    itself (LightTAE), not those that the diffusion model sees (TAEHV).
    """

    def __init__(
        self,
        z_dim: int = 16,
        patch_size: int = 1,
        widths: Sequence[int] = (256, 128, 64, 64),
        encoder_width: int = 64,
        unscaled: bool = False,
    ):
        mean, std = LATENT_STATS[z_dim] if unscaled else ([0.0] * z_dim, [1.0] * z_dim)
        super().__init__(z_dim, patch_size * 2**_STAGES, mean, std)
        self.patch_size, channels = patch_size, 3 * patch_size**2
        self.encoder = Encoder(channels, encoder_width, z_dim) if encoder_width else None
        self.decoder = Decoder(z_dim, widths, channels)

    def frames(self, video: Tensor) -> Iterator[Tensor]:
        for chunk in video.movedim(1, 2).split(_FRAMES, 1):
            missing = _FRAMES - chunk.shape[1]
            chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else chunk
            chunk = F.pixel_unshuffle(chunk.float().add(1).div_(2), self.patch_size)
            yield chunk.to(self.dtype).permute(0, 1, 3, 4, 2)

    def posterior_mean(self, encoded: Tensor, state: State) -> Tensor:
        return encoded

    def latents(self, z: Tensor, state: State) -> Tensor:
        return z.to(self.dtype).permute(0, 2, 3, 4, 1)

    def sketch(self, z: Tensor) -> Tensor:
        """`decode` of one frame for each latent frame, `[B, 3, T', sh, sw]`: two thirds of the work, for previews.

        Source: behaviour of TAEHV where its growth of frames is switched off."""
        mean, std = self._stats(z)
        state, frames = State(), []
        for frame in self.latents(z.float() / (1 / std) + mean, state).split(1, dim=1):
            self.between_chunks()
            frames.append(self.pixels(self.decoder(frame, state, grows=False)))
        return torch.cat(frames, 2).clamp_(-1, 1)

    def pixels(self, decoded: Tensor) -> Tensor:
        x = F.pixel_shuffle(decoded.float().permute(0, 1, 4, 2, 3), self.patch_size)
        return x.mul_(2).sub_(1).movedim(2, 1)
