"""A face's expression as a vector: the motion encoder of LIA (arXiv 2203.09043), made of StyleGAN2's layers
(arXiv 1912.04958).

Source: behaviour of the official Wan2.2 `motion_encoder.Generator`; parameter names are its own.
Shape legend: N pictures, C channels, S sides in pixels, M directions of motion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS_AND_SIDE = 16_384  # channels times the picture's side, where that is below the most there are
_BLUR = (1, 3, 3, 1)
_SLOPE, _GAIN = 0.2, math.sqrt(2)  # of the leaky ReLU, and what keeps its output's variance
_SMALL = 1e-8  # added to the directions before they are made orthogonal


class Blur(nn.Module):
    """A low-pass filter, the same for all channels. Official files have it, others leave it to whoever reads them."""

    kernel: Tensor

    def __init__(self, padding: tuple[int, int], stride: int = 1):
        super().__init__()
        row = torch.tensor(_BLUR, dtype=torch.float32, device="cpu")
        self.register_buffer("kernel", torch.outer(row, row) / row.sum() ** 2)
        self.padding, self.stride = padding, stride

    def forward(self, x_NCSS: Tensor) -> Tensor:
        channels = x_NCSS.shape[1]
        kernel = self.kernel.flip(0, 1).to(x_NCSS).expand(channels, 1, -1, -1)
        return F.conv2d(F.pad(x_NCSS, self.padding * 2), kernel, stride=self.stride, groups=channels)


class EqualConv(nn.Module):
    """A convolution whose stored weights have unit variance: they are scaled where they are used."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim, kernel, kernel))
        self.scale, self.stride, self.padding = 1 / math.sqrt(in_dim * kernel**2), stride, padding

    def forward(self, x_NCSS: Tensor) -> Tensor:
        return F.conv2d(x_NCSS, self.weight * self.scale, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """The same for a linear layer."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out_dim, in_dim)), nn.Parameter(torch.zeros(out_dim))
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x_NC: Tensor) -> Tensor:
        return F.linear(x_NC, self.weight * self.scale, self.bias)


class BiasedLeakyReLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x_NCSS: Tensor) -> Tensor:
        return F.leaky_relu(x_NCSS + self.bias, _SLOPE, inplace=True) * _GAIN


class ResidualBlock(nn.Module):
    """Halves the sides."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv(in_dim, in_dim, 3, padding=1), BiasedLeakyReLU(in_dim))
        self.conv2 = nn.Sequential(Blur((2, 2)), EqualConv(in_dim, out_dim, 3, stride=2), BiasedLeakyReLU(out_dim))
        self.skip = nn.Sequential(Blur((1, 1), stride=2), EqualConv(in_dim, out_dim, 1))

    def forward(self, x_NCSS: Tensor) -> Tensor:
        return self.conv2(self.conv1(x_NCSS)).add_(self.skip(x_NCSS)).div_(_GAIN)


class Directions(nn.Module):
    """What the coefficients of motion are multiplied by: vectors made orthogonal."""

    def __init__(self, dim: int, motion_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, motion_dim))

    def basis(self) -> Tensor:
        """`[C, M]`, fp32: Q of the QR decomposition. Each column's sign is the one of Householder's reflections, as in
        LAPACK and in its likes for GPUs, and the weights were trained with it."""
        return torch.linalg.qr(self.weight.float() + _SMALL).Q

    def forward(self, motion_NM: Tensor) -> Tensor:
        return motion_NM.float() @ self.basis().T


class MotionEncoder(nn.Module):
    """size: side of the pictures; style_dim: of what is seen in one; motion_dim: directions in which it can move;
    channels: the most of a layer."""

    def __init__(self, size: int = 512, style_dim: int = 512, motion_dim: int = 20, channels: int = 512):
        super().__init__()
        self.size = size
        dim = min(channels, _CHANNELS_AND_SIDE // size)
        convs: list[nn.Module] = [nn.Sequential(EqualConv(3, dim, 1), BiasedLeakyReLU(dim))]
        while size > 4:
            size //= 2
            convs.append(ResidualBlock(dim, dim := min(channels, _CHANNELS_AND_SIDE // size)))
        convs.append(EqualConv(dim, style_dim, 4))
        fc = [EqualLinear(style_dim, style_dim) for _ in range(4)] + [EqualLinear(style_dim, motion_dim)]
        self.enc = nn.ModuleDict({"net_app": nn.ModuleDict({"convs": nn.Sequential(*convs)}), "fc": nn.Sequential(*fc)})
        self.dec = nn.ModuleDict({"direction": Directions(style_dim, motion_dim)})

    def appearance(self, pixels_NCSS: Tensor) -> Tensor:
        """`[N, 3, size, size]` in [-1, 1] -> `[N, style_dim]`."""
        pixels_NCSS = pixels_NCSS.contiguous(memory_format=torch.channels_last)  # takes 0.7 of the time on a CPU
        return self.enc["net_app"]["convs"](pixels_NCSS).flatten(1)

    def coefficients(self, pixels_NCSS: Tensor) -> Tensor:
        """How far it moves in each direction: `[N, M]`."""
        return self.enc["fc"](self.appearance(pixels_NCSS))

    def forward(self, pixels_NCSS: Tensor) -> Tensor:
        """`[N, style_dim]`, fp32."""
        return self.dec["direction"](self.coefficients(pixels_NCSS))
