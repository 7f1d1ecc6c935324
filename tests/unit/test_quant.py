"""Block formats: bit for bit as the gguf package, by every way of computing them, and the layers over them."""

import ctypes
import shutil
import warnings

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wan.quant import native
from wan.quant.blocks import UNPACK, dequantize_blocks
from wan.quant.dequantize import dequantize
from wan.quant.ggml import BY_ID, BY_NAME, random_blocks
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.quant.packed import PackedTensor

pytestmark = pytest.mark.usefixtures("two_threads")

LIBRARY_TYPES = ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"]


def packed(name, rows, columns, seed=0):
    type = BY_NAME[name]
    blocks = random_blocks(type, rows * columns // type.block_weights, seed).view(rows, -1)
    return PackedTensor(type, (rows, columns), blocks)


def by_gguf(blocks, name):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def edge_blocks(name):
    """Random blocks, and such with zero, subnormal, negative and the largest finite scales, all codes equal."""
    type = BY_NAME[name]
    blocks = random_blocks(type, 240, seed=3)
    scales = torch.tensor([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00], dtype=torch.int32)
    for row, code in enumerate([0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F]):
        blocks[row * 8 : row * 8 + 8] = code
        for shift, offset in enumerate(type.scale_offsets):
            values = scales.roll(shift)
            blocks[row * 8 : row * 8 + 8, offset] = (values & 255).to(torch.uint8)
            blocks[row * 8 : row * 8 + 8, offset + 1] = (values >> 8).to(torch.uint8)
    return blocks


def test_type_table():
    sizes = {int(one): size for one, size in gguf.GGML_QUANT_SIZES.items()}
    for type in BY_ID.values():
        assert gguf.GGMLQuantizationType(type.id).name == type.name
        assert sizes[type.id] == (type.block_weights, type.block_bytes)


@pytest.mark.parametrize("name", UNPACK)
def test_torch_is_exact(name):
    blocks = edge_blocks(name)
    assert torch.equal(bits(dequantize_blocks(blocks, name)), bits(by_gguf(blocks, name)))


@pytest.mark.parametrize("name", UNPACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_exact(name, dtype):
    if native._library() is None:
        pytest.skip("no C compiler")
    blocks, type = edge_blocks(name), BY_NAME[name]
    out = torch.empty(len(blocks), type.block_weights, dtype=dtype)
    assert native.dequantize_native(blocks, type, out)
    expected = by_gguf(blocks, name).to(dtype)
    assert torch.equal(bits(out.float()), bits(expected.float()))


@pytest.mark.parametrize("name", [*UNPACK, *LIBRARY_TYPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_dequantize(name, dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "_library", lambda: None)
    one = packed(name, 700, 768)  # several slices
    weights = one.dequantize(dtype)
    assert weights.shape == (700, 768) and weights.dtype == dtype
    assert torch.equal(weights, by_gguf(one.blocks, name).to(dtype))


@pytest.mark.parametrize("name", UNPACK)
def test_large_tensors(name):
    """Of these the kernels write past the caches."""
    kind = BY_NAME[name]
    blocks = random_blocks(kind, (9 << 20) // 2 // kind.block_weights + 1)
    out = torch.empty(len(blocks), kind.block_weights, dtype=torch.bfloat16)
    assert torch.equal(dequantize(blocks, kind, torch.bfloat16, out), dequantize_blocks(blocks, name).bfloat16())


def test_a_wrong_kernel_is_not_used(monkeypatch, tmp_path):
    if native._library() is None:
        pytest.skip("no C compiler")
    wrong = tmp_path / "kernels.c"
    wrong.write_text(native.SOURCE.read_text().replace("float d = half(b)", "float d = 2 * half(b)"))
    monkeypatch.setattr(native, "SOURCE", wrong)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    with pytest.warns(UserWarning, match="wrong numbers"):
        one = packed("Q4_K", 4, 256)
        assert torch.equal(one.dequantize(), by_gguf(one.blocks, "Q4_K"))
    native._library.cache_clear()


@pytest.mark.parametrize("break_it", ["no compiler", "compiler fails", "switched off"])
def test_without_kernels(break_it, monkeypatch, tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, value = {
        "no compiler": ("CC", "no-such-compiler"),
        "compiler fails": ("CC", str(failing)),
        "switched off": ("SWAN_NATIVE", "0"),
    }[break_it]
    monkeypatch.setenv(name, value)
    native._library.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert native._library() is None
    assert len(seen) == (break_it != "switched off")
    one = packed("Q6_K", 4, 256)
    assert torch.equal(one.dequantize(), by_gguf(one.blocks, "Q6_K"))
    native._library.cache_clear()


@pytest.mark.parametrize("name", UNPACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_that_of_the_dequantised_weights(name, dtype):
    weight, bias = packed(name, 96, 512), nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False)
    dense = by_gguf(weight.blocks, name).to(dtype)
    x = torch.randn(2, 7, 512, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(QuantLinear(weight, bias)(x), F.linear(x, dense, bias))
        assert torch.equal(QuantLinear(weight)(x), F.linear(x, dense))


def test_linear_moves():
    layer = nn.Sequential(QuantLinear(packed("Q4_K", 8, 256), nn.Parameter(torch.zeros(8), requires_grad=False)))
    blocks = layer[0].blocks
    layer.to(torch.bfloat16)
    assert layer[0].bias.dtype == torch.bfloat16
    assert layer[0].blocks.dtype == torch.uint8 and torch.equal(layer[0].blocks, blocks)
    assert layer(torch.randn(3, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta")[0].blocks.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", UNPACK)
def test_gpu_is_exact(name):
    one = packed(name, 96, 512)
    there = PackedTensor(one.type, one.shape, one.blocks.cuda())
    assert torch.equal(there.dequantize().cpu(), by_gguf(one.blocks, name))
    assert torch.equal(there.dequantize(torch.bfloat16).cpu(), by_gguf(one.blocks, name).bfloat16())


def test_embedding_dequantises_the_rows_it_looks_up():
    table = packed("Q6_K", 50, 256)
    layer, ids = QuantEmbedding(table, torch.bfloat16), torch.tensor([[3, 49], [0, 3]])
    expected = F.embedding(ids, by_gguf(table.blocks, "Q6_K").bfloat16())
    assert torch.equal(layer(ids), expected)
    assert layer.to(torch.float32)(ids).dtype == torch.float32


def test_random_blocks_are_finite():
    for name in UNPACK:
        assert np.isfinite(by_gguf(random_blocks(BY_NAME[name], 500), name).numpy()).all()


@pytest.mark.parametrize("kernels", [True, False])
def test_linear_in_and_out_of_inference_mode(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "_library", lambda: None)
    layer, x = QuantLinear(packed("Q8_0", 96, 512)), torch.randn(3, 512)
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    x.requires_grad_()
    other = QuantLinear(packed("Q8_0", 96, 512, seed=1))
    (layer(x).sum() + other(x).sum()).backward()  # each keeps weights of its own for this
    assert torch.allclose(x.grad[0], layer.weight.dequantize().sum(0) + other.weight.dequantize().sum(0), rtol=1e-3)


def test_kernels_use_the_threads_of_torch():
    """A failure to compile them with OpenMP would fall back to one thread and go unseen."""
    compiler = shutil.which("cc")
    if compiler is None or native._openmp_runtime() is None:
        pytest.skip("no C compiler, or no OpenMP in torch")
    ctypes.CDLL(native._openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
    native._compiled(compiler, True, native.SOURCE, native._FUNCTIONS, native._is_exact)
