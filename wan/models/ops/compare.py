"""Ops beside others on the same numbers: what a first call on a device, tests and benchmarks look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wan.models.ops.reference import Modulated, Reference

_EPS, _HEADS = 1e-6, 4


def compared(
    ops: Reference, dtype: torch.dtype, device: torch.device, width: int = 96, tokens: int = 37, batch: int = 2
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each op its name, its result and that of `Reference`. Tokens have one time, or several; width: of 4 heads."""
    generator, like = torch.Generator().manual_seed(0), {"device": device, "dtype": dtype}

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, y = (noise(batch, tokens, width).to(**like) for _ in range(2))
    gate, shift, scale = (noise(3, 6, width).to(device) * 0.5).unbind(1)[:3]  # rows that do not lie together
    affine = nn.LayerNorm(width, _EPS, **like)
    affine.weight.data, affine.bias.data = noise(width).to(**like), noise(width).to(**like)
    linear = nn.Linear(width, 2 * width, **like)
    angles = noise(tokens, width // _HEADS // 2).to(device)
    rope, weight = torch.polar(torch.ones_like(angles), angles), noise(width).to(**like)
    few = tokens // 3
    several = [(2, few), (0, batch * tokens - few - 1), (1, 1)]
    modulated, reference = Modulated(shift, scale, _EPS), Reference()

    def calls(one: Reference) -> Iterator[tuple[str, Tensor]]:
        for times, segments in (("one time", [(1, batch * tokens)]), ("several times", several)):
            yield f"norm, {times}", one.norm(x, modulated, segments)
            yield f"gated_add, {times}", one.gated_add(x, y, gate, segments)
            for name, gate_RC, norm in (("gated, own", gate, affine), ("plain, modulated", None, modulated)):
                for part, made in zip(("sum", "norm"), one.gated_add_norm(x, y, gate_RC, norm, segments), strict=True):
                    yield f"gated_add_norm ({name}), {part}, {times}", made
        yield "norm of its own", one.norm(x, affine, several)
        yield "norm_rope", one.norm_rope(x.clone(), weight, _EPS, width // _HEADS, rope)
        yield "norm_rope without a table", one.norm_rope(x.clone(), weight, _EPS, width // _HEADS, None)
        yield "linear_gelu", one.linear_gelu(linear, x)
        picture = x.view(batch, 1, 1, tokens, width).expand(-1, 3, 2, -1, -1)
        yield "rms_norm", one.rms_norm(picture, weight)
        window = torch.zeros(batch, 5, 2, tokens, width, **like)
        one.rms_norm(picture, weight, window[:, 2:], silu=True)
        yield "rms_norm and SiLU, into a window", window

    for (name, made), (_, wanted) in zip(calls(ops), calls(reference), strict=True):
        yield name, made, wanted


def is_close(made: Tensor, wanted: Tensor) -> bool:
    """As near as sums in another order are, each rounded once to its type."""
    step = max(torch.finfo(wanted.dtype).eps, 4e-6)
    return made.shape == wanted.shape and torch.allclose(made.float(), wanted.float(), rtol=3 * step, atol=2 * step)
