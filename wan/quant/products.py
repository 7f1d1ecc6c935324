"""Products of activations and 8-bit weights by the matrix units of a GPU, without dequantising the weights: --matmul.

The activations are rounded to 8 bits as well, each token by its own scale, which dequantisation does not do: results
differ from those of dequantised weights by that rounding. So they are asked for, and only weights that are stored in 8
bits with a scale a row are multiplied so; `wan.convert` makes such files of others.

fp8: scales, bias and the rounding to bf16 are part of the product, whose sums are those of the units (fast
accumulation). int8: sums are exact, in int32, and are scaled afterwards, some tokens at a time.

NOT RUN BY US: no GPU was at hand. The first product on a device is compared with the dequantised one, and where it
fails (row-wise scales need compute capability 9.0, or a recent torch) or differs too much, weights are dequantised
there, with a warning. What runs on a CPU, in tests, is the same arithmetic.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from wan import kernels
from wan.errors import UsageError
from wan.quant.ggml import GGMLType
from wan.quant.packed import PackedTensor
from wan.quant.rounding import LARGEST, quantize_channels
from wan.quant.schemes import Scheme, pack_rows, split_rows

# Of a GPU's name -> scheme -> "rows x columns" of a matrix -> time beside dequantised bf16 weights, as benchmarks.gpu
# measures it at 32,760 tokens. Nobody has yet.
MEASURED = Path(__file__).parent / "products.json"
_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}  # of devices that have such units
_CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_DTYPE = torch.bfloat16  # of activations: row-wise scales give no other
_MULTIPLE = 16  # rows and columns have to be multiples
_MIN_TOKENS = 17  # integer products need more than 16
_SLICE_SUMS = 1 << 26  # int32 sums that are scaled at a time
_TOLERANCE = 0.05  # relative error of the whole result; rounding to 8 bits gives about 0.03


class Rounded:
    """What several layers multiply: rounded once for all of them."""

    def __init__(self, x: Tensor):
        self.x = x
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        """Of tokens."""
        return self.x.numel() // self.x.shape[-1]

    def codes(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """As `quantize_tokens`, of all tokens."""
        if scheme.name not in self._made:
            self._made[scheme.name] = quantize_tokens(self.x.reshape(-1, self.x.shape[-1]), scheme.name)
        return self._made[scheme.name]


def is_product(kind: GGMLType | Scheme | None, shape: tuple[int, ...], name: str) -> bool:
    """Whether weights of `shape` that are stored so can be multiplied in 8 bits as `name`, "fp8" or "int8"."""
    if not isinstance(kind, Scheme) or kind.name != name or kind.code_dtype != _CODES[name]:
        return False
    is_plain = kind.bits == 8 and not (kind.rotation or kind.has_offsets or kind.has_row_scale)
    fits = len(shape) == 2 and kind.groups(shape[1]) == 1 and not any(size % _MULTIPLE for size in shape)
    return is_plain and fits


def scaled_product(rounded: Rounded, weight: PackedTensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear(x, weight, bias)`, x [..., in] -> [..., out], of weights that `is_product` allows; None where it has to
    be dequantised: for other types than bf16, few tokens, autograd, or a device whose product does not work."""
    x, name = rounded.x, weight.type.name
    if x.dtype != _DTYPE or torch.is_grad_enabled() or rounded.count < _MIN_TOKENS or not works(name, x.device):
        return None
    return _product(rounded, weight.blocks, weight.type, bias).view(*x.shape[:-1], weight.shape[0])


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
        tokens = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).to(device, _DTYPE)
        pairs = zip(_by_kernel(tokens, kind), _quantized(tokens, kind), strict=True)
        return all(torch.equal(made.float(), wanted.float()) for made, wanted in pairs)

    return kernels.are_there(device) and kernels.is_right(f"kernel that rounds activations to {kind}", agree)


def _by_kernel(tokens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from wan.quant.triton import quantize_tokens

    return quantize_tokens(tokens, kind)


def _product(rounded: Rounded, blocks: Tensor, scheme: Scheme, bias: Tensor | None) -> Tensor:
    """[tokens, out]."""
    stored, scales, *_ = split_rows(blocks, scheme, rounded.x.shape[-1])
    codes, token_scales = rounded.codes(scheme)
    matrix = stored.view(scheme.code_dtype).t()  # columns lie `row bytes` apart, a multiple of 16
    row_scales = scales.float().t().contiguous()
    if scheme.name == "fp8":
        how = {"bias": bias, "out_dtype": _DTYPE, "use_fast_accum": True}
        return torch._scaled_mm(codes, matrix, token_scales, row_scales, **how)
    out = torch.empty(len(codes), matrix.shape[1], dtype=_DTYPE, device=codes.device)
    step = max(_MIN_TOKENS, _SLICE_SUMS // matrix.shape[1])
    starts = range(0, max(1, len(codes) - _MIN_TOKENS + 1), step)
    for start, end in zip(starts, [*starts[1:], len(codes)]):  # the last one has never too few
        sums = torch._int_mm(codes[start:end], matrix).float().mul_(token_scales[start:end]).mul_(row_scales)
        out[start:end] = sums if bias is None else sums.add_(bias)
    return out


def working_bytes(tokens: int, columns: int, name: str) -> int:
    """What a product takes beside its operands: codes and scales of its tokens, and int8 its sums."""
    return tokens * (columns + 4) + (2 * 4 * _SLICE_SUMS if name == "int8" else 0)


# Which


Stored = Collection[tuple[GGMLType | Scheme, tuple[int, ...]]]  # types and shapes of matrices


def choose_products(asked: str, device: str, stored: Stored | None) -> tuple[str, list[str]]:
    """What --matmul comes to on a device, "bf16", "fp8" or "int8", and lines to show.

    stored: quantised matrices of the transformers; None: their files are not here. Raises UsageError, one line, where
    what is asked for cannot be.
    """
    if asked == "auto":
        return _measured(device, stored or ())
    if asked == "bf16":
        return asked, []
    if not device.startswith("cuda"):
        raise UsageError(f"--matmul {asked} is for CUDA devices, not {device}: leave it out, weights are dequantised")
    if stored is not None and not any(is_product(kind, shape, asked) for kind, shape in stored):
        made = f"python -m wan.convert --to {asked} makes such a file"
        raise UsageError(f"--matmul {asked}: no weights are stored in {asked} with a scale for each row; {made}")
    return asked, []


def _measured(device: str, stored: Stored) -> tuple[str, list[str]]:
    """Of --matmul auto: the scheme of the weights, where it was measured to win for each of their shapes."""
    shapes = {name: [shape for kind, shape in stored if is_product(kind, shape, name)] for name in _CODES}
    there = {name: found for name, found in shapes.items() if found}
    if not there or not device.startswith("cuda"):
        return "bf16", []
    gpu = torch.cuda.get_device_name(device)
    table = json.loads(MEASURED.read_text(encoding="utf-8")).get(gpu, {})
    for name, found in there.items():
        ratios = [table.get(name, {}).get(f"{rows} x {columns}") for rows, columns in found]
        if None not in ratios:
            return (name if max(ratios) < 1 else "bf16"), []
    return "bf16", [f"--matmul auto: 8-bit products were not measured on {gpu}, so weights are dequantised"]


@functools.cache
def works(name: str, device: torch.device) -> bool:
    """Whether `device` has the units, and they give what dequantised weights give."""
    if device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) < _CAPABILITY[name]:
        return _failed(name, device, "it has no units for them")
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantize_channels(torch.randn(64, 128, generator=generator), name)
    scheme = Scheme(name, codes.dtype, group=128)
    blocks = pack_rows(scheme, 128, codes, scales).to(device)
    tokens = torch.randn(32, 128, generator=generator).to(device, _DTYPE)
    bias = torch.randn(64, generator=generator).to(device, _DTYPE)
    try:
        wanted = tokens.float() @ PackedTensor(scheme, (64, 128), blocks).dequantize().t() + bias.float()
        error = (_product(Rounded(tokens), blocks, scheme, bias).float() - wanted).norm() / wanted.norm()
        return bool(error < _TOLERANCE) or _failed(name, device, f"its numbers are off by {float(error):.0%}")
    except Exception as failure:  # whatever a driver or this build of torch can say
        return _failed(name, device, type(failure).__name__)


def _failed(name: str, device: torch.device, reason: str) -> bool:
    warnings.warn(f"{name} weights are dequantised on {device}: 8-bit products fail ({reason})", stacklevel=3)
    return False
