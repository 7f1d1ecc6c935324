"""Weights from blocks and codes, and codes from activations, by the kernels of a GPU: the same bits."""

import warnings

import pytest
import torch

from wan import kernels
from wan.quant import dequantize as ggml
from wan.quant import products, schemes
from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.dequantize import dequantize
from wan.quant.ggml import BY_NAME, random_blocks
from wan.quant.schemes import Scheme, pack_rows

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("name", UNPACK)
def test_blocks_give_the_bits_of_their_definition(name, device):
    kind = BY_NAME[name]
    blocks = random_blocks(kind, 77)  # more than one program, and not whole ones
    for offset in kind.scale_offsets:
        blocks[:3, offset : offset + 2] = torch.tensor([[0, 0], [1, 0], [0, 128]], dtype=torch.uint8)  # 0, tiny, -0
    blocks = blocks.to(device)
    for dtype in TYPES:
        wanted = dequantize_blocks(blocks, name).to(dtype)
        assert torch.equal(bits(ggml._by_kernel(blocks, name, torch.empty_like(wanted))), bits(wanted))


SCHEMES = [
    Scheme("fp8", torch.float8_e4m3fn, group=70),
    Scheme("fp8", torch.float8_e5m2, group=32, scale_dtype=torch.bfloat16),
    Scheme("int8", torch.int8, group=70),
    Scheme("int8", torch.int8, group=64, scale_dtype=torch.float16),  # the last group is cut short
    Scheme("affine4", torch.uint8, group=32, scale_dtype=torch.bfloat16, bits=4, has_offsets=True),
    Scheme("affine8", torch.uint8, group=64, scale_dtype=torch.float16, has_offsets=True),
]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities among the codes
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: f"{one.name}-{one.group}")
def test_rows_give_the_bits_of_their_definition(scheme, device):
    columns, rows = (96 if scheme.has_offsets else 70), 5
    codes = torch.arange(rows * scheme.code_bytes(columns)).to(torch.uint8).view(rows, -1)  # each of 256
    scales = torch.randn(rows, scheme.groups(columns))
    blocks = pack_rows(scheme, columns, codes, scales, torch.randn_like(scales) if scheme.has_offsets else None)
    blocks = blocks.to(device)
    for dtype in TYPES:
        wanted = schemes._weights(blocks, scheme, columns).to(dtype)
        made = schemes._by_kernel(blocks, scheme, columns, torch.empty_like(wanted))
        there = ~wanted.isnan()
        assert torch.equal(bits(made)[there], bits(wanted)[there]) and made.isnan()[~there].all()


def test_rows_wider_than_a_program(device):
    scheme = Scheme("int8", torch.int8, group=5000)
    blocks = pack_rows(scheme, 5000, torch.randint(0, 256, (2, 5000), dtype=torch.uint8), torch.rand(2, 1)).to(device)
    wanted = schemes._weights(blocks, scheme, 5000)
    assert torch.equal(schemes._by_kernel(blocks, scheme, 5000, torch.empty_like(wanted)), wanted)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
def test_activations_are_rounded_as_their_definition_does(kind, dtype, device):
    tokens = (torch.randn(7, 70) * 3).to(device, dtype)
    tokens[2] = 0
    for made, wanted in zip(products._by_kernel(tokens, kind), products._quantized(tokens, kind), strict=True):
        assert made.dtype == wanted.dtype and torch.equal(made.float(), wanted.float())


# Where they are used


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A device whose kernels are there, and where nothing is remembered of another."""
    monkeypatch.setattr(kernels, "are_there", lambda device: True)
    caches = (ggml._has_kernel, schemes._has_kernel, products._has_kernel)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_kernel_is_tried_before_it_is_trusted(as_on_a_gpu, monkeypatch, device):
    def ask():
        found = [ggml._has_kernel(name, torch.bfloat16, device) for name in ("Q4_K", "Q8_0")]
        found += [schemes._has_kernel(scheme, torch.bfloat16, device) for scheme in SCHEMES[::4]]
        return found + [products._has_kernel(kind, device) for kind in ("fp8", "int8")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(ask())
    for cache in (ggml._has_kernel, schemes._has_kernel, products._has_kernel):
        cache.cache_clear()
    monkeypatch.setattr(ggml, "_by_kernel", lambda blocks, name, out: out.zero_())
    monkeypatch.setattr(schemes, "_by_kernel", lambda blocks, scheme, columns, out: out.zero_())
    monkeypatch.setattr(products, "_by_kernel", lambda tokens, kind: 1 / 0)
    with pytest.warns(UserWarning, match="torch's formulas are used, slower") as seen:
        assert not any(ask())
    told = {str(one.message) for one in seen}
    assert "no kernel for Q4_K weights: its numbers are wrong; torch's formulas are used, slower" in told
    assert any("rounds activations to int8: division by zero" in line for line in told)


def test_what_has_no_kernel_stays_with_torch(as_on_a_gpu):
    for scheme in (
        Scheme("int8-rotated", torch.int8, group=64, rotation=64),
        Scheme("nvfp4", torch.uint8, group=16, bits=4, minifloat=(2, 1), has_row_scale=True),
    ):
        assert not schemes._has_kernel(scheme, torch.float32, CPU)


def test_a_cpu_takes_none(monkeypatch):
    monkeypatch.setattr(ggml, "_by_kernel", lambda *_: pytest.fail("a kernel of a GPU"))
    blocks = random_blocks(BY_NAME["Q4_K"], 6).view(2, -1)
    assert dequantize(blocks, BY_NAME["Q4_K"], torch.bfloat16).shape == (2, 768)
