"""The formulas of LoRA, LoHa, LoKr and DoRA: stored parts -> what is added to a weight, and the same as a side branch.

Shape legend: O outputs, I inputs, R rank. Kernel axes of a convolution follow I. All in fp32 until a branch is made.
Sources: kohya (lora_mid, alpha), LyCORIS (LoHa, LoKr and their Tucker forms), PEFT (DoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = Mapping[str, Tensor]  # by the names that lora_file gives them
Product = Callable[[Tensor], Tensor]  # [..., I] -> [..., O]: with the packed weight


def rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What alpha is divided by; None for LoKr of two whole factors, whose alpha means nothing, and for bad shapes."""
    for part in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if part in shapes:
            return shapes[part][0] if shapes[part] else None
    return None


def product(parts: Parts) -> Tensor:
    """[O, I, ...] or [O, I * kernel], unscaled. Raises KeyError for a part that lacks, RuntimeError for shapes that do
    not go together. On the meta device it tells the shape."""
    if "hada_w1_b" in parts:
        return _hada(parts, 1) * _hada(parts, 2)
    if _is_kron(parts):
        w1, w2 = _kron_factors(parts)
        return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim())), w2)
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        return _tucker(parts["mid"], up.T, down.flatten(1))
    return (up @ down.flatten(1)).unflatten(1, down.shape[1:])


def dora_gain(weight: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude / norm of the changed weight: a number for each row ([O, 1, ...]) or column ([1, I, ...])."""
    if magnitude.dim() == 1:
        magnitude = magnitude.reshape(-1, *[1] * (weight.dim() - 1))
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    norm = weight.square().sum(axes, keepdim=True).sqrt()
    return magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)


def fits_dora(magnitude: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a magnitude of that shape has one number a row or a column."""
    rest = (1,) * (len(weight) - 1)
    return magnitude in ((weight[0],), (weight[0], *rest), (1, weight[1], *rest[1:]))


def product_branch(parts: Parts, scale: float) -> Branch:
    """What a layer adds to its output for `scale` times the product of `parts`, a matrix: exact, and in the smallest
    form that is."""
    if "down" in parts and "mid" not in parts:
        return LowRank(down=parts["down"].flatten(1), up=parts["up"].flatten(1) * scale)
    if "hada_w1_b" in parts and "hada_t1" not in parts:
        a1, b1, a2, b2 = (parts[f"hada_{one}"] for one in ("w1_a", "w1_b", "w2_a", "w2_b"))
        pairs = len(b1) * len(b2)
        if pairs * (a1.shape[0] + b1.shape[1]) < a1.shape[0] * b1.shape[1]:
            # An elementwise product of low ranks has the rank of all pairs of their columns.
            up = torch.einsum("or,os->ors", a1, a2).flatten(1)
            down = torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)
            return LowRank(down=down, up=up * scale)
    if _is_kron(parts) and "lokr_t2" not in parts:
        w1, w2 = _kron_factors(parts)
        return Kron(w1=w1 * scale, w2=w2)
    return Dense(matrix=product(parts) * scale)


class Branch(nn.Module):
    """Beside a packed layer: (input [..., I], the layer's own product) -> what is added to its output.

    Tensors are buffers, so that they move with the layer and stay whole on ranks that share weights out.
    """

    def __init__(self, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)

    def bound(self) -> float:
        """No number of the matrix that it stands for, nor of its tensors, is larger than this; NaN if one is not
        finite."""
        raise NotImplementedError


class LowRank(Branch):
    """Factors down [R, I] and up [O, R]."""

    def bound(self) -> float:
        down, up = _largest(self.down), _largest(self.up)
        return down + up + down * up * len(self.down)

    def forward(self, x: Tensor, product: Product) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Kron(Branch):
    """The Kronecker product of w1 [O1, I1] and w2 [O2, I2], which is never made."""

    def bound(self) -> float:
        w1, w2 = _largest(self.w1), _largest(self.w2)
        return w1 + w2 + w1 * w2

    def forward(self, x: Tensor, product: Product) -> Tensor:
        y = F.linear(x.unflatten(-1, (-1, self.w2.shape[1])), self.w2.to(x.dtype))  # [..., I1, O2]
        return (self.w1.to(x.dtype) @ y).flatten(-2)


class Dense(Branch):
    """A whole matrix [O, I], where nothing smaller is exact."""

    def bound(self) -> float:
        return _largest(self.matrix)

    def forward(self, x: Tensor, product: Product) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


class Dora(Branch):
    """strength * (gain * (W + inner) - W), by rows (gain [O, 1]) or by columns ([1, I]): a second product with W."""

    def __init__(self, inner: Branch, gain: Tensor, strength: float):
        self_gain, inner_gain = strength * (gain - 1), strength * gain
        super().__init__(self_gain=self_gain.flatten(), inner_gain=inner_gain.flatten())
        self.inner, self.by_row = inner, gain.shape[1] == 1

    def bound(self) -> float:
        return _largest(self.self_gain) + _largest(self.inner_gain) * (1 + self.inner.bound())

    def forward(self, x: Tensor, product: Product) -> Tensor:
        own, added = self.self_gain.to(x.dtype), self.inner_gain.to(x.dtype)
        if self.by_row:
            return product(x) * own + self.inner(x, product) * added
        return product(x * own) + self.inner(x * added, product)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().amax()) if tensor.numel() else 0.0


def _is_kron(parts: Parts) -> bool:
    return any(part.startswith("lokr_") for part in parts)


def _kron_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        return w1, parts["lokr_w2"]
    if "lokr_t2" in parts:
        return w1, _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return w1, parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)


def _hada(parts: Parts, index: int) -> Tensor:
    a, b = parts[f"hada_w{index}_a"], parts[f"hada_w{index}_b"]
    return _tucker(parts[f"hada_t{index}"], a, b) if f"hada_t{index}" in parts else a @ b


def _tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """core [P, Q, ...], rows [P, O], columns [Q, I] -> [O, I, ...]."""
    return torch.einsum("pq...,po,qi->oi...", core, rows, columns)
