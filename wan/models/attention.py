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
from wan.models.attention_names import AUTO, WITHOUT_BACK_END, split_names

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackEnd:
    """package: what it needs beside torch; oldest: its first version that will do; function: what is called of it;
    proof: what else such a version has; majors: of CUDA's compute capability, (): any; run_with_lse: None where the
    package does not give these."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    run_with_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    package: str | None = None
    oldest: int = 0
    function: str = "flash_attn_func"
    proof: str = ""
    majors: tuple[int, ...] = ()

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
        if self.proof:
            _function(self.package, self.proof)

    def is_installed(self) -> bool:
        """Whether there is the package, in a version that will do; nothing is imported."""
        if self.package is None:
            return True
        try:
            spec = importlib.util.find_spec(self.package)
        except Exception:  # of a package around it, which is imported
            return False
        if spec is None or getattr(spec, "origin", "") is None:  # none, or what lies around others
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


def _flash_attn4(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    out = _function("flash_attn.cute", "flash_attn_func")(q_BLHD, k_BMHD, v_BMHD)
    return out[0] if isinstance(out, tuple) else out


def _flash_attn4_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    flash_attn_func = _function("flash_attn.cute", "flash_attn_func")
    asked = "return_lse" in inspect.signature(flash_attn_func).parameters
    out, lse = flash_attn_func(q_BLHD, k_BMHD, v_BMHD, **({"return_lse": True} if asked else {}))[:2]
    return out, lse.transpose(1, 2)


def _sage_attn3(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    """By 4-bit floats (arXiv 2505.11594)."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BLHD, k_BMHD, v_BMHD))
    return _function("sageattn3", "sageattn3_blackwell")(q, k, v).transpose(1, 2)


def _sparge_attn(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    """SpargeAttn (arXiv 2502.18137): of tokens that attend to each other, half of the blocks, the package's default.
    Attention to other tokens, or to few, or by heads of a width that it does not know, is whole."""
    tokens, width = q_BLHD.shape[1], q_BLHD.shape[3]
    if tokens != k_BMHD.shape[1] or tokens < _SPARGE_TOKENS or width not in (64, 128):
        return _sdpa(q_BLHD, k_BMHD, v_BMHD)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    attend = _function("spas_sage_attn", "spas_sage2_attn_meansim_topk_cuda")
    return attend(q, k, v, topk=0.5, is_causal=False, output_dtype=q.dtype).transpose(1, 2)


_SPARGE_TOKENS = 128
_CUDA_SAGE2 = "sageattn_qk_int8_pv_fp16_cuda"  # which version 1 has not
BACK_ENDS: dict[str, BackEnd] = {
    "sdpa": BackEnd(_sdpa, _sdpa_lse),
    "flash_attn2": BackEnd(_flash_attn2, _flash_attn2_lse, "flash_attn", 2),
    "flash_attn3": BackEnd(_flash_attn3, _flash_attn3_lse, "flash_attn_interface", majors=(8, 9)),
    "flash_attn4": BackEnd(_flash_attn4, _flash_attn4_lse, "flash_attn.cute", majors=(9, 10, 11)),
    "sage_attn2": BackEnd(_sage_attn2, _sage_attn2_lse, "sageattention", 2, "sageattn", _CUDA_SAGE2),
    "sage_attn3": BackEnd(_sage_attn3, None, "sageattn3", 0, "sageattn3_blackwell", majors=(10, 12)),
    "sparge_attn": BackEnd(_sparge_attn, None, "spas_sage_attn", 0, "spas_sage2_attn_meansim_topk_cuda"),
}
# What `auto` takes where it is installed, by the major compute capability: exact ones that are faster than sdpa, whose
# own kernel is FlashAttention 2. All others round or leave out more, which is for the user to say.
_BEST = {9: "flash_attn3", 10: "flash_attn4", 11: "flash_attn4"}


def choose_attention(asked: str, dtype: torch.dtype, device: str, ring: int = 1) -> tuple[str, list[str]]:
    """The back end for what is asked, names or "auto" with commas between, and a line for each that cannot be used.

    ring: processes that keys go round. Raises UsageError or SwanError, one line, where none of them can be used.
    """
    names, lines = split_names(asked), []
    for name in names:
        if name == AUTO:
            name = _best(dtype, device, ring)
        try:
            check_attention(name, dtype, device, ring)
        except SwanError as error:
            if len(names) == 1:
                raise
            lines.append(one_line(error))
        else:
            return name, [f"warning: --attention {asked}: {line}; {name} is used" for line in lines]
    raise UsageError(f"--attention {asked}: none of these can be used: {'; '.join(lines)}")


def _best(dtype: torch.dtype, device: str, ring: int) -> str:
    name = _BEST.get(_major(device)) if dtype in HALF and _is_cuda(device) and torch.cuda.is_available() else None
    try:
        check_attention(name or "sdpa", dtype, device, ring)
    except SwanError:
        return "sdpa"
    return name or "sdpa"


def _is_cuda(device: str) -> bool:
    return device.partition(":")[0] in ("cuda", AUTO)


def _major(device: str) -> int:
    return torch.cuda.get_device_capability(None if device == AUTO else device)[0]


def available() -> list[str]:
    """Back ends that can run on this machine (all but `sdpa` need their package and a CUDA device)."""
    cuda = torch.cuda.is_available()
    return [name for name, one in BACK_ENDS.items() if one.package is None or (cuda and one.is_installed())]


def get_attention(name: str) -> BackEnd:
    """The back end of that name; UsageError if it is unknown or cannot run here."""
    if name in WITHOUT_BACK_END:
        raise UsageError(
            f"attention '{name}' {WITHOUT_BACK_END[name]}: give what else to take behind it, as {name},{AUTO}"
        )
    if name not in BACK_ENDS:
        raise UsageError(f"unknown attention back end '{name}'; known: {', '.join(BACK_ENDS)}")
    one = BACK_ENDS[name]
    if one.package is not None and not (torch.cuda.is_available() and one.is_installed()):
        package = f"{one.package} (version {one.oldest} or later)" if one.oldest else one.package
        raise UsageError(
            f"attention back end '{name}' needs the package {package} and a CUDA device; "
            f"available here: {', '.join(available())}"
        )
    return BACK_ENDS[name]


def check_attention(name: str, dtype: torch.dtype, device: str, ring: int = 1) -> None:
    """Raises UsageError or SwanError, one line, where a model of `dtype` on `device` cannot use it. Before loading."""
    one = get_attention(name)
    one.check_dtype(dtype)
    if one.package is not None and not _is_cuda(device):
        raise UsageError(f"attention back end '{name}' needs a CUDA device, not {device}; sdpa runs everywhere")
    if one.run_with_lse is None and ring > 1:
        raise UsageError(f"attention back end '{name}' cannot merge the parts that --ring_size {ring} makes")
    if one.majors and (major := _major(device)) not in one.majors:
        able = " and ".join(f"{one}.x" for one in one.majors)
        raise UsageError(f"attention back end '{name}' needs compute capability {able}, this GPU has {major}.x")
    one.check_package()
