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
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.errors import SwanError, UsageError, one_line
from wan.models.attention_names import AUTO, WITHOUT_BACK_END, split_names
from wan.models.attention_native import attend

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackEnd:
    """needs_cuda: it computes on a CUDA device, in 16 bits; package: what it needs beside torch; oldest: its first
    version that will do; function: what is called of it; proof: what else such a version has; majors: of CUDA's compute
    capability, (): any; widths: of heads, (largest, a multiple of), None: any; run_with_lse: None where the package
    does not give these."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    run_with_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    package: str | None = None
    oldest: int = 0
    function: str = "flash_attn_func"
    proof: str = ""
    majors: tuple[int, ...] = ()
    widths: tuple[int, int] | None = None
    needs_cuda: bool = True

    def __call__(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        """By sdpa where it cannot take these."""
        run = _sdpa if self.unfit(q_BLHD.dtype, q_BLHD.shape[-1]) else self.run
        return run(q_BLHD, k_BMHD, v_BMHD)

    def with_lse(self, q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
        """By sdpa where it cannot take these."""
        run = _sdpa_lse if self.unfit(q_BLHD.dtype, q_BLHD.shape[-1]) else self.run_with_lse
        return run(q_BLHD, k_BMHD, v_BMHD)

    @property
    def name(self) -> str:
        return next(name for name, one in BACK_ENDS.items() if one is self)

    @property
    def needs(self) -> str:
        return f"the package {self.package}" + (f" (version {self.oldest} or later)" if self.oldest else "")

    def unfit(self, dtype: torch.dtype, head_dim: int | None = None) -> str:
        """Why it cannot take that type, or heads of that width; "" where it can."""
        if self.needs_cuda and dtype not in HALF:
            return f"computes in bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
        if self.widths and head_dim is not None and (head_dim > self.widths[0] or head_dim % self.widths[1]):
            largest, multiple = self.widths
            return f"takes heads of at most {largest} numbers, a multiple of {multiple}, not {head_dim}"
        return ""

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


class _OfTorch(BackEnd):
    """cuDNN, as torch comes with it. `oldest`: as cuDNN counts, 9.15.1 is 91501."""

    @property
    def needs(self) -> str:
        return (
            f"cuDNN {self.oldest // 10_000}.{self.oldest // 100 % 100}.{self.oldest % 100} or later, as torch has it,"
        )

    def is_installed(self) -> bool:
        return (torch.backends.cudnn.version() or 0) >= self.oldest


def _function(package: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(package), name)
    except Exception as error:  # built for another torch, say: whatever a library that is loaded can raise
        raise SwanError(
            f"the package {package} cannot be used: {one_line(error)}; install it anew or take --attention sdpa"
        ) from error


def _sdpa(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    if (attended := attend(q_BLHD, k_BMHD, v_BMHD)) is not None:
        return attended.out
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernels behind `scaled_dot_product_attention`, which does not hand out what they know."""
    if (attended := attend(q_BLHD, k_BMHD, v_BMHD)) is not None:
        return attended
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    if q.device.type in ("cpu", "meta"):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.device.type == "cuda" and q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    elif q.device.type == "cuda" and q.shape[-1] % 8 == 0:  # pads its second result
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[2]]
    else:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def _cudnn(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BLHD, k_BMHD, v_BMHD)


def _cudnn_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), lse.reshape(q.shape[:3]).transpose(1, 2)  # it may have a last axis of one


def _flash_attn(package: str, switch: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """`run` and `run_with_lse` of FlashAttention. switch: asks for the log-sum-exp, but in releases that always give
    it."""

    def run(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        out = _function(package, "flash_attn_func")(q_BLHD, k_BMHD, v_BMHD)
        return out[0] if isinstance(out, tuple) else out

    def run_with_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
        flash_attn_func = _function(package, "flash_attn_func")
        asked = {switch: True} if switch in inspect.signature(flash_attn_func).parameters else {}
        out, lse = flash_attn_func(q_BLHD, k_BMHD, v_BMHD, **asked)[:2]
        return out, lse.transpose(1, 2)

    return run, run_with_lse


def _sage_attn2(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, **how: bool) -> Tensor:
    return _function("sageattention", "sageattn")(q_BLHD, k_BMHD, v_BMHD, tensor_layout="NHD", **how)


def _sage_attn2_lse(q_BLHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _sage_attn2(q_BLHD, k_BMHD, v_BMHD, return_lse=True)
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
_FLASH_ATTN2 = _flash_attn("flash_attn", "return_attn_probs")
_FLASH_ATTN3 = _flash_attn("flash_attn_interface", "return_attn_probs")
_FLASH_ATTN4 = _flash_attn("flash_attn.cute", "return_lse")
BACK_ENDS: dict[str, BackEnd] = {
    "sdpa": BackEnd(_sdpa, _sdpa_lse, needs_cuda=False),
    # Before 9.15.1 it fails for lengths that are no multiple of 128, as ours are (pytorch/pytorch#169849).
    "cudnn": _OfTorch(_cudnn, _cudnn_lse, None, 91501, majors=(8, 9, 10, 11, 12), widths=(128, 8)),
    "flash_attn2": BackEnd(*_FLASH_ATTN2, "flash_attn", 2, widths=(256, 8)),
    "flash_attn3": BackEnd(*_FLASH_ATTN3, "flash_attn_interface", majors=(8, 9), widths=(256, 8)),
    "flash_attn4": BackEnd(*_FLASH_ATTN4, "flash_attn.cute", majors=(9, 10, 11), widths=(128, 8)),
    "sage_attn2": BackEnd(_sage_attn2, _sage_attn2_lse, "sageattention", 2, "sageattn", _CUDA_SAGE2, widths=(128, 8)),
    "sage_attn3": BackEnd(_sage_attn3, None, "sageattn3", 0, "sageattn3_blackwell", majors=(10, 12), widths=(128, 64)),
    "sparge_attn": BackEnd(_sparge_attn, None, "spas_sage_attn", 0, "spas_sage2_attn_meansim_topk_cuda"),
}
# What `auto` takes, the first that is here, by the major compute capability: exact ones that are faster than sdpa,
# whose own kernel is FlashAttention 2 unless torch prefers cuDNN itself (from 2.11 on, by the same version of it).
# Published rates on an H100 are 632 TFLOP/s for FlashAttention 3, 631 for cuDNN, 329 for sdpa (pytorch/pytorch#142132);
# on a B200 cuDNN took 0.50 to 0.81 of FlashAttention 4's time at Wan's sizes (sgl-project/sglang#33655). Not ours.
_BEST = {9: ("flash_attn3", "cudnn"), 10: ("cudnn", "flash_attn4"), 11: ("flash_attn4",)}


def choose_attention(
    asked: str, dtype: torch.dtype, device: str, ring: int = 1, head_dim: int | None = None
) -> tuple[str, list[str]]:
    """The back end for what is asked, names or "auto" with commas between, and a line for each that cannot be used.

    ring: processes that keys go round; head_dim: numbers of a head. What cannot take these, or the type, gives way to
    sdpa. Raises UsageError or SwanError, one line, where none of them can be used.
    """
    names, lines, is_unfit = split_names(asked), [], False
    for name in names:
        if name == AUTO:
            name = _best(dtype, device, ring, head_dim)
        if name in BACK_ENDS and (reason := BACK_ENDS[name].unfit(dtype, head_dim)):
            lines.append(f"attention back end '{name}' {reason}")
            is_unfit = True
            continue
        try:
            check_attention(name, device, ring)
        except SwanError as error:
            if len(names) == 1:
                raise
            lines.append(one_line(error))
        else:
            return name, _gave_way(asked, lines, name)
    if is_unfit:
        return "sdpa", _gave_way(asked, lines, "sdpa")
    raise UsageError(f"--attention {asked}: none of these can be used: {'; '.join(lines)}")


def _gave_way(asked: str, lines: list[str], name: str) -> list[str]:
    return [f"warning: --attention {asked}: {line}; {name} is used" for line in lines]


def _best(dtype: torch.dtype, device: str, ring: int, head_dim: int | None) -> str:
    if not (_is_cuda(device) and torch.cuda.is_available()):
        return "sdpa"
    for name in _BEST.get(_major(device), ()):
        try:
            check_attention(name, device, ring)
        except SwanError:
            continue
        if not BACK_ENDS[name].unfit(dtype, head_dim):
            return name
    return "sdpa"


def _is_cuda(device: str) -> bool:
    return device.partition(":")[0] in ("cuda", AUTO)


def _major(device: str) -> int:
    return torch.cuda.get_device_capability(None if device == AUTO else device)[0]


def available() -> list[str]:
    """Back ends that can run on this machine (all but `sdpa` need a CUDA device)."""
    cuda = torch.cuda.is_available()
    return [name for name, one in BACK_ENDS.items() if not one.needs_cuda or (cuda and one.is_installed())]


def get_attention(name: str) -> BackEnd:
    """The back end of that name; UsageError if it is unknown or cannot run here."""
    if name in WITHOUT_BACK_END:
        raise UsageError(
            f"attention '{name}' {WITHOUT_BACK_END[name]}: give what else to take behind it, as {name},{AUTO}"
        )
    if name not in BACK_ENDS:
        raise UsageError(f"unknown attention back end '{name}'; known: {', '.join(BACK_ENDS)}")
    one = BACK_ENDS[name]
    if one.needs_cuda and not (torch.cuda.is_available() and one.is_installed()):
        raise UsageError(
            f"attention back end '{name}' needs {one.needs} and a CUDA device; available here: {', '.join(available())}"
        )
    return BACK_ENDS[name]


def check_attention(name: str, device: str, ring: int = 1) -> None:
    """Raises UsageError or SwanError, one line, where a model on `device` cannot use it. Before loading."""
    one = get_attention(name)
    if one.needs_cuda and not _is_cuda(device):
        raise UsageError(f"attention back end '{name}' needs a CUDA device, not {device}; sdpa runs everywhere")
    if one.run_with_lse is None and ring > 1:
        raise UsageError(f"attention back end '{name}' cannot merge the parts that --ring_size {ring} makes")
    if one.majors and (major := _major(device)) not in one.majors:
        able = " and ".join(f"{one}.x" for one in one.majors)
        raise UsageError(f"attention back end '{name}' needs compute capability {able}, this GPU has {major}.x")
    one.check_package()
