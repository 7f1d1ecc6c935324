"""Attention back ends, in one registry.

Every back end is `f(q_BLHD, k_BMHD, v_BMHD) -> [B, L, H, D]`: softmax(q k^T / sqrt(D)) v, no mask.
Shape legend: B batch, L query tokens, M key tokens, H heads, D head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import UsageError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash_attn2(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BLHD, k_BMHD, v_BMHD)


def _flash_attn3(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q_BLHD, k_BMHD, v_BMHD)
    return out[0] if isinstance(out, tuple) else out  # early releases also return the log-sum-exp


def _sage_attn2(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(q_BLHD, k_BMHD, v_BMHD, tensor_layout="NHD")


# name -> (function, package that it needs beside torch)
BACK_ENDS: dict[str, tuple[Attention, str | None]] = {
    "sdpa": (_sdpa, None),
    "flash_attn2": (_flash_attn2, "flash_attn"),
    "flash_attn3": (_flash_attn3, "flash_attn_interface"),
    "sage_attn2": (_sage_attn2, "sageattention"),
}


def available() -> list[str]:
    """Back ends that can run on this machine (all but `sdpa` need their package and a CUDA device)."""
    cuda = torch.cuda.is_available()
    return [
        name
        for name, (_, package) in BACK_ENDS.items()
        if package is None or (cuda and importlib.util.find_spec(package) is not None)
    ]


def get_attention(name: str) -> Attention:
    """The back end of that name; UsageError if it is unknown or cannot run here."""
    if name not in BACK_ENDS:
        raise UsageError(f"unknown attention back end '{name}'; known: {', '.join(BACK_ENDS)}")
    if name not in available():
        package = BACK_ENDS[name][1]
        raise UsageError(
            f"attention back end '{name}' needs the package {package} and a CUDA device; "
            f"available here: {', '.join(available())}"
        )
    return BACK_ENDS[name][0]
