"""Products of activations and 8-bit weights by the matrix units of a GPU, without dequantising the weights.

The activations are rounded to 8 bits as well, each token by its own scale, which dequantisation does not do: results
differ from those of dequantised weights by that rounding, and so between weights that stay packed and weights that do
not. Off until it is measured that this is worth it: SWAN_SCALED_MM=1 turns it on.

NOT RUN BY US: no GPU was at hand. The first product on a device is compared with the dequantised one, and where it
fails or differs too much, weights are dequantised there, with a warning. On a CPU nothing of this applies.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from wan import kernels
from wan.quant.packed import PackedTensor
from wan.quant.rounding import LARGEST, quantize_channels
from wan.quant.schemes import Scheme, pack_rows, split_rows

_CAPABILITY = {"fp8": (9, 0), "int8": (8, 0)}  # of the device: scales by row; integer products
_DTYPES = (torch.bfloat16,)  # scales by row give bf16 only
_MULTIPLE = 16  # rows and columns have to be multiples
_MIN_TOKENS = 17  # integer products need more than 16
_TOLERANCE = 0.05  # relative error of the whole result; rounding to 8 bits gives about 0.03


def scaled_product(x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear(x, weight, bias)` for `x` [..., in] -> [..., out], or None where it has to be dequantised.

    Where SWAN_SCALED_MM=1 asks for it, for fp8 and int8 weights with a scale per row (or one for all), and bf16
    activations, on a CUDA device that has the units for it. Not run on a device by us, see above.
    """
    if os.environ.get("SWAN_SCALED_MM") != "1":
        return None
    scheme = weight.type
    if x.device.type != "cuda" or not isinstance(scheme, Scheme) or scheme.name not in _CAPABILITY:
        return None
    rows, columns = weight.shape
    fits = scheme.groups(columns) == 1 and rows % _MULTIPLE == 0 and columns % _MULTIPLE == 0
    fits = fits and scheme.code_dtype in (torch.int8, torch.float8_e4m3fn)
    if not fits or x.dtype not in _DTYPES or torch.is_grad_enabled():
        return None
    tokens = x.reshape(-1, columns)
    if len(tokens) < _MIN_TOKENS or not _works(scheme.name, x.device):
        return None
    return _product(tokens, weight.blocks, scheme, bias).view(*x.shape[:-1], rows)


def quantize_tokens(tokens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[n, in] -> codes [n, in] and fp32 scales [n, 1]; kind: "fp8" or "int8". Several products may share them."""
    if tokens.device.type == "cuda" and tokens.stride(-1) == 1 and _has_kernel(kind, tokens.device):
        return _by_kernel(tokens, kind)
    return _quantized(tokens, kind)


def _quantized(tokens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    tokens, largest = tokens.float(), LARGEST[kind]
    scales = (tokens.abs().amax(1, keepdim=True) / largest).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = tokens / scales
    if kind == "int8":
        codes = codes.round_()
    return codes.clamp_(-largest, largest).to(torch.int8 if kind == "int8" else torch.float8_e4m3fn), scales


@functools.cache
def _has_kernel(kind: str, device: torch.device) -> bool:
    def agree() -> bool:
        tokens = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).to(device, _DTYPES[0])
        pairs = zip(_by_kernel(tokens, kind), _quantized(tokens, kind), strict=True)
        return all(torch.equal(made.float(), wanted.float()) for made, wanted in pairs)

    return kernels.are_there(device) and kernels.is_right(f"kernel that rounds activations to {kind}", agree)


def _by_kernel(tokens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from wan.quant.triton import quantize_tokens

    return quantize_tokens(tokens, kind)


def _product(tokens: Tensor, blocks: Tensor, scheme: Scheme, bias: Tensor | None) -> Tensor:
    stored, scales, *_ = split_rows(blocks, scheme, tokens.shape[1])
    codes, token_scales = quantize_tokens(tokens, scheme.name)
    matrix = stored.view(scheme.code_dtype).t()  # columns lie `row bytes` apart, a multiple of 16
    if scheme.name == "fp8":
        row_scales = scales.float().t().contiguous()
        out = torch._scaled_mm(codes, matrix, token_scales, row_scales, out_dtype=tokens.dtype)
        return out if bias is None else out + bias
    sums = torch._int_mm(codes, matrix).float() * token_scales * scales.float().t()
    return (sums if bias is None else sums + bias).to(tokens.dtype)


@functools.cache
def _works(name: str, device: torch.device) -> bool:
    """Whether `device` has the units, and they give what dequantised weights give."""
    if torch.cuda.get_device_capability(device) < _CAPABILITY[name]:
        return False
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantize_channels(torch.randn(64, 128, generator=generator), name)
    scheme = Scheme(name, codes.dtype, group=128)
    blocks = pack_rows(scheme, 128, codes, scales).to(device)
    tokens = torch.randn(32, 128, generator=generator).to(device, _DTYPES[0])
    try:
        wanted = tokens.float() @ PackedTensor(scheme, (64, 128), blocks).dequantize().t()
        error = (_product(tokens, blocks, scheme, None).float() - wanted).norm() / wanted.norm()
        if error < _TOLERANCE:
            return True
        reason = f"its numbers are off by {float(error):.0%}"
    except Exception as failure:  # whatever a driver or this build of torch can say
        reason = f"{type(failure).__name__}"
    warnings.warn(f"{name} weights are dequantised on {device}: the scaled product fails ({reason})", stacklevel=2)
    return False
