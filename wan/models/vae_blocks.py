"""Building blocks of the Wan VAE.

Shape legend: B batch, T frames of this chunk, H rows, W columns, C channels. Activations are `[B, T, H, W, C]` in
memory, which a convolution sees as channels-last without a copy.

The network is streamed: a video goes through in chunks of frames, and each causal layer keeps the frames that its next
chunk will look back at in `state`, a dict from layer to tensor that belongs to one run. The first chunk is one frame.
Processes may share the rows of the picture. Then H are those of this one, and layers that look further ask `state.rows`
for the rows of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.distributed.halo import WHOLE, RowShards
from wan.models.layers import Conv2d, Conv3d
from wan.models.ops import choose_ops

ROWS = 2  # the axis of the rows
_LARGE_FRAME_BYTES, _FRAMES = 4 << 20, 2  # of activations; as many as a convolution looks back at


class State(dict[nn.Module, Tensor]):
    """What the layers keep from chunk to chunk of one run. rows: the latent's, and which of them this process has."""

    def __init__(self, rows: RowShards = WHOLE):
        super().__init__()
        self.rows = rows


class RMSNorm(nn.Module):
    """Scales each position to unit RMS over its channels, times `gamma`.

    Official behaviour: `x / max(|x|_2, 1e-12) * sqrt(C) * gamma`. `num_axes` is how many singleton axes `gamma` has in
    checkpoints after the channel axis (3 in video blocks, 2 in the attention block).
    """

    def __init__(self, channels: int, num_axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_axes))

    def forward(self, x: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        """`x` is `[B, T, H, W, C]`; the result goes to `out` where given."""
        return choose_ops(None, x.device).rms_norm(x, self.gamma.flatten(), out, silu)


class CausalConv3d(Conv3d):
    """Convolution over time, rows and columns whose window ends at the present frame (zeros before the first)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int] = 3):
        super().__init__(in_channels, out_channels, kernel)
        self.padding = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)

    def forward(self, x: Tensor, state: State, norm: RMSNorm | None = None) -> Tensor:
        """`[B, T, H, W, C_in] -> [B, T, H, W, C_out]`; with `norm`, the input is normalised and passed by SiLU."""
        if self.kernel_size == (1, 1, 1):
            return F.linear(x, self.weight.flatten(1), self.bias)
        return self.convolve(self.window(x, state, norm), state)

    def window(self, x: Tensor, state: State, norm: RMSNorm | None) -> Tensor:
        """The frames this convolution looks back at, then those of `x`, activated: all it needs, so `x` can go.

        With the halo of each frame, which the past keeps: only that of new frames is exchanged.
        """
        past = state.get(self)
        halo = (ROWS, self.padding[1], self.padding[1])  # axis, places before and after
        if past is None:
            x = state.rows.extend(x if norm is None else norm(x, silu=True), *halo)
            state[self] = torch.cat([torch.zeros_like(x), x], 1)
            return x
        keep = past.shape[1]
        if torch.is_grad_enabled():
            window = torch.cat([past, state.rows.extend(x if norm is None else norm(x, silu=True), *halo)], 1)
        else:  # written in place behind the past: no concatenation
            window = x.new_empty(x.shape[0], keep + x.shape[1], *past.shape[2:])
            window[:, :keep] = past
            new = state.rows.inner(window[:, keep:], *halo)
            new.copy_(x) if norm is None else norm(x, out=new, silu=True)
            state.rows.exchange(window[:, keep:], *halo)
        del past, state[self]  # before its successor is made
        state[self] = window[:, -keep:].clone()
        return window

    def convolve(self, x: Tensor, state: State, stride: int | tuple[int, int, int] = 1) -> Tensor:
        """Over the frames of a window. A first frame stands alone: the taps of its past would only see zeros."""
        weight, (_, rows, columns) = self.weight[:, :, -x.shape[1] :], self.padding
        padding = (0, state.rows.padding(rows), columns)
        y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, self.bias, stride, padding)
        return y.permute(0, 2, 3, 4, 1).contiguous()


def by_twos(layers: Iterable[Callable[[Tensor, State], Tensor]], x: Tensor, state: State, channels: int) -> Tensor:
    """One layer after another. Of large frames two go through all of them before the next two: half is held at once.

    channels: of what the layers make. (In the decoder it would save less, and take 5 % of the time.)
    """
    is_large = x[:, :1, ..., :1].nbytes * channels >= _LARGE_FRAME_BYTES
    made = []
    for part in x.split(_FRAMES if is_large else x.shape[1], 1):
        for layer in layers:
            part = layer(part, state)
        made.append(part)
    return made[0] if len(made) == 1 else torch.cat(made, 1)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        y = self.residual["2"](x, state, norm=self.residual["0"])
        y = self.residual["6"].window(y, state, self.residual["3"])  # lets go of the first convolution's output
        y = self.residual["6"].convolve(y, state)
        return y.add_(x if self.shortcut is None else self.shortcut(x, state))


class AttentionBlock(nn.Module):
    """Self-attention of one head over the positions of each frame, those of other processes included."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, num_axes=2)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: State) -> Tensor:
        B, T, H, W, C = x.shape
        qkv = F.linear(self.norm(x), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, kv = qkv.split([C, 2 * C], dim=-1)
        q, kv = (part.flatten(2, 3).flatten(0, 1).unsqueeze(1) for part in (q, state.rows.gather(kv, ROWS)))
        y = F.scaled_dot_product_attention(q, *kv.chunk(2, dim=-1)).view(B, T, H, W, C)
        return F.linear(y, self.proj.weight.flatten(1), self.proj.bias).add_(x)


class Downsample(nn.Module):
    """Halves rows and columns, and with `temporal` also the frames after the first."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = F.pad(x, (0, 0, 0, 1, 0, 1))
        state.rows.exchange(x, ROWS, 0, 1)
        conv = self.resample["1"]
        x = conv2d(x, conv.weight, conv.bias, stride=2)
        if self.time_conv is None:
            return x
        past, state[self] = state.get(self), x[:, -1:].clone()
        if past is None:
            return x
        return self.time_conv.convolve(torch.cat([past, x], 1), state, stride=(2, 1, 1))


class Upsample(nn.Module):
    """Doubles rows and columns (nearest, then a 3x3 convolution), and with `temporal` the frames after the first.

    In the enlarged picture two of three taps fall on the same pixel. So each of the four kinds of output pixel (even or
    odd row, even or odd column) is a 2x2 convolution of the small picture with summed taps: 4/9 of the products, and
    the enlarged picture is never made.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        if self.time_conv is not None:
            if self.time_conv in state:
                y = self.time_conv(x, state)  # channels: both new frames' channels, one after the other
                x = y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)
            else:  # the first frame stays one frame, and later windows see zeros in its place
                state[self.time_conv] = x.new_zeros(x.shape[0], 2, *x.shape[2:])
        conv = self.resample["1"]
        return upsampled_conv(x, conv.weight, conv.bias, state)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """A 3x3 convolution of the picture at twice its rows and columns (nearest), which is never made: see `Upsample`."""
    B, T, H, W, _ = x.shape
    x = state.rows.extend(x, ROWS, 1, 1)
    padding = (state.rows.padding(1), 1)
    out = x.new_empty(B, T, H, 2, W, 2, weight.shape[0])
    for row, rows in enumerate(_sum_taps(weight.float(), 2)):
        for column, taps in enumerate(_sum_taps(rows, 3)):
            y = conv2d(x, taps.to(x.dtype), bias, padding=padding)  # one row and column more than needed
            out[:, :, :, row, :, column] = y[:, :, row : row + H, column : column + W]
    return out.view(B, T, 2 * H, 2 * W, -1)


def _sum_taps(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps over a doubled axis -> two taps over the axis itself, for even and for odd outputs."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Of each frame alone: `[B, T, H, W, C_in] -> [B, T, H', W', C_out]`."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding)
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class DownStage(nn.Module):
    """Wan2.2 encoder stage: residual blocks and a downsample, beside a shortcut that averages."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, down: bool, temporal: bool):
        super().__init__()
        layers = [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)]
        self.downsamples = nn.ModuleList(layers + ([Downsample(out_channels, temporal)] if down else []))
        self.out_channels = out_channels
        self.factor_t, self.factor_s = 2 if temporal else 1, 2 if down else 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, state)
        return y.add_(self.average(x))

    def average(self, x: Tensor) -> Tensor:
        """Space (and time) to channels in the order (channel, frame, row, column), then the mean of each group."""
        ft, fs = self.factor_t, self.factor_s
        x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % ft, 0))  # zero frames at the front
        B, T, H, W, C = x.shape
        x = x.view(B, T // ft, ft, H // fs, fs, W // fs, fs, C).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return x.reshape(B, T // ft, H // fs, W // fs, self.out_channels, -1).mean(-1)


class UpStage(nn.Module):
    """Wan2.2 decoder stage: residual blocks and an upsample, beside a shortcut that repeats channels."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, up: bool, temporal: bool):
        super().__init__()
        layers = [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)]
        self.upsamples = nn.ModuleList(layers + ([Upsample(out_channels, out_channels, temporal)] if up else []))
        self.out_channels, self.up = out_channels, up
        self.factor_t = 2 if temporal else 1

    def forward(self, x: Tensor, state: State) -> Tensor:
        first = self.upsamples[0].residual["2"] not in state
        y = x
        for layer in self.upsamples:
            y = layer(y, state)
        return y.add_(self.repeat(x, first)) if self.up else y

    def repeat(self, x: Tensor, first: bool) -> Tensor:
        """Channels to space (and time) in the order (channel, frame, row, column), each channel repeated to fill."""
        B, T, H, W, C = x.shape
        ft = self.factor_t
        x = x.repeat_interleave(self.out_channels * ft * 4 // C, dim=-1)
        x = x.view(B, T, H, W, self.out_channels, ft, 2, 2).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(B, T * ft, 2 * H, 2 * W, self.out_channels)
        return x[:, ft - 1 :] if first else x
