"""Attention back ends, in one registry.

Every back end is `f(q_BLHD, k_BMHD, v_BMHD) -> [B, L, H, D]`: softmax(q k^T / sqrt(D)) v, no mask. `f.with_lse` also
gives the log of the sum of the exponentials, fp32 `[B, L, H]`, by which ring attention merges parts.
Shape legend: B batch, L query tokens, M key tokens, H heads, D head width.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import SwanError, UsageError, one_line

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackEnd:
    """package: what it needs beside torch; oldest: its first version that will do; function: what is called of it."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    run_with_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    package: str | None = None
    oldest: int = 0
    function: str = "flash_attn_func"

    def __call__(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        self.check_dtype(q_BLHD.dtype)
        return self.run(q_BLHD, k_BMHD, v_BMHD)

    def with_lse(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
        self.check_dtype(q_BLHD.dtype)
        return self.run_with_lse(q_BLHD, k_BMHD, v_BMHD)

    @property
    def name(self) -> str:
        return next(name for name, one in BACK_ENDS.items() if one is self)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises UsageError for a type that it does not compute in."""
        if self.package is not None and dtype not in HALF:
            kind = str(dtype).removeprefix("torch.")
            raise UsageError(f"attention back end '{self.name}' computes in bf16 and fp16, not {kind}; sdpa does")

    def check_package(self) -> None:
        """Raises SwanError where the package is there, but does not work."""
        if self.package is not None:
            _function(self.package, self.function)

    def is_installed(self) -> bool:
        """Whether there is the package, in a version that will do; nothing is imported."""
        if self.package is None:
            return True
        if importlib.util.find_spec(self.package) is None:
            return False
        try:
            version = re.match(r"\d+", importlib.metadata.version(self.package) or "")
        except importlib.metadata.PackageNotFoundError:  # a folder of sources: nothing tells
            return True
        return version is None or int(version[0]) >= self.oldest


def _function(package: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(package), name)
    except Exception as error:  # built for another torch, say: whatever a library that is loaded can raise
        raise SwanError(
            f"the package {package} cannot be used: {one_line(error)}; install it anew or take --attention sdpa"
        ) from error


def _sdpa(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernels behind `scaled_dot_product_attention`, which does not hand out what they know."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    if q.device.type in ("cpu", "meta"):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.device.type == "cuda" and q.dtype != torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.device.type == "cuda":  # pads its second result
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[2]]
    else:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_attn2(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    flash_attn_func = _function("flash_attn", "flash_attn_func")
    return flash_attn_func(q_BLHD, k_BMHD, v_BMHD)


def _flash_attn2_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    flash_attn_func = _function("flash_attn", "flash_attn_func")
    out, lse, _ = flash_attn_func(q_BLHD, k_BMHD, v_BMHD, return_attn_probs=True)
    return out, lse.transpose(1, 2)


def _flash_attn3(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    flash_attn_func = _function("flash_attn_interface", "flash_attn_func")
    out = flash_attn_func(q_BLHD, k_BMHD, v_BMHD)
    return out[0] if isinstance(out, tuple) else out  # early releases also return the log-sum-exp


def _flash_attn3_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    flash_attn_func = _function("flash_attn_interface", "flash_attn_func")
    asked = "return_attn_probs" in inspect.signature(flash_attn_func).parameters
    out, lse = flash_attn_func(q_BLHD, k_BMHD, v_BMHD, **({"return_attn_probs": True} if asked else {}))[:2]
    return out, lse.transpose(1, 2)


def _sage_attn2(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    sageattn = _function("sageattention", "sageattn")
    return sageattn(q_BLHD, k_BMHD, v_BMHD, tensor_layout="NHD")


def _sage_attn2_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    sageattn = _function("sageattention", "sageattn")
    out, lse = sageattn(q_BLHD, k_BMHD, v_BMHD, tensor_layout="NHD", return_lse=True)
    return out, lse.transpose(1, 2)


BACK_ENDS: dict[str, BackEnd] = {
    "sdpa": BackEnd(_sdpa, _sdpa_lse),
    "flash_attn2": BackEnd(_flash_attn2, _flash_attn2_lse, "flash_attn", 2),
    "flash_attn3": BackEnd(_flash_attn3, _flash_attn3_lse, "flash_attn_interface"),
    "sage_attn2": BackEnd(_sage_attn2, _sage_attn2_lse, "sageattention", 2, "sageattn"),
}


def available() -> list[str]:
    """Back ends that can run on this machine (all but `sdpa` need their package and a CUDA device)."""
    cuda = torch.cuda.is_available()
    return [name for name, one in BACK_ENDS.items() if one.package is None or (cuda and one.is_installed())]


def get_attention(name: str) -> BackEnd:
    """The back end of that name; UsageError if it is unknown or cannot run here."""
    if name not in BACK_ENDS:
        raise UsageError(f"unknown attention back end '{name}'; known: {', '.join(BACK_ENDS)}")
    if name not in available():
        one = BACK_ENDS[name]
        package = f"{one.package} (version {one.oldest} or later)" if one.oldest else one.package
        raise UsageError(
            f"attention back end '{name}' needs the package {package} and a CUDA device; "
            f"available here: {', '.join(available())}"
        )
    return BACK_ENDS[name]


def check_attention(name: str, dtype: torch.dtype, device: str) -> None:
    """Raises UsageError or SwanError, one line, where a model of `dtype` on `device` cannot use it. Before loading."""
    one = get_attention(name)
    one.check_dtype(dtype)
    if one.package is not None and device.partition(":")[0] not in ("cuda", "auto"):
        raise UsageError(f"attention back end '{name}' needs a CUDA device, not {device}; sdpa runs everywhere")
    one.check_package()
