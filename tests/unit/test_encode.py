"""Quantising by compiled code: the bytes are libgguf's, and nothing is larger in memory than a slice of a tensor."""

import warnings

import libgguf
import numpy as np
import pytest
import torch

from tests.unit.test_export import small_dit
from tests.unit.weight_helpers import DictSource
from wan.quant import encode as encode_module
from wan.quant.encode import TYPES, encode
from wan.quant.ggml import BY_NAME
from wan.weights.write import stream
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

SLICE = 5_000  # weights
FOLDERS = [Form(name) for name in ("fp8", "int8", "nvfp4", "mxfp8")]
FOLDERS += [Form("mlx"), Form("mlx", bits=4, group=32), Form("mlx", bits=8)]


def weights(kind):
    """[33, 768], of one kind; 33 blocks of 256 in a row fill no number of vectors."""
    normal = torch.randn(33, 768, generator=torch.Generator().manual_seed(0))
    if kind == "odd":
        normal[0], normal[1, :256], normal[2], normal[3, ::2] = 0, 0.5, normal[2].abs(), 0
        normal[4], normal[5], normal[6, :16], normal[7] = -0.25, 1e-16, 0, normal[7].round()
        normal[8] *= 1e-20
        normal[9], normal[10] = 1e-38, normal[10] * 10_000
        normal[11] = torch.tensor([1.0, -1.0]).repeat(384)
        return normal
    return normal**3 if kind == "heavy" else (normal * 1e-6).half() if kind == "fp16" else (normal / 50).bfloat16()


@pytest.mark.parametrize("kind", ["odd", "heavy", "fp16", "bf16"])
@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_of_libgguf(name, kind):
    if encode_module._library() is None:
        pytest.skip("no C compiler")
    values, type = weights(kind), BY_NAME[name]
    found, wanted = (np.zeros((33, type.row_bytes(768)), np.uint8) for _ in range(2))
    libgguf.quantize_rows_into_raw(type.id, values.float().numpy(), wanted, 33, 768)
    assert encode(values, type, found) == values.abs().max().item()
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_seen(bad, dtype):
    values = torch.zeros(2, 256, dtype=dtype)
    values[1, 77] = bad
    largest = encode(values, BY_NAME["Q6_K"], np.empty((2, 210), np.uint8))
    assert largest is None or not largest < float("inf")


def test_a_compiler_that_calculates_otherwise(tmp_path, monkeypatch):
    wrong = tmp_path / "encode.c"
    wrong.write_text(encode_module.SOURCE.read_text().replace("v[i] + minimum", "v[i] - minimum"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(encode_module, "SOURCE", wrong)
    encode_module._library.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert encode(torch.ones(1, 256), BY_NAME["Q4_K"], np.empty((1, 144), np.uint8)) is None
    assert "quantised by libgguf, slower" in str(told[0].message)
    encode_module._library.cache_clear()


class Counting(DictSource):
    """Remembers how many weights are read at once."""

    most = 0

    def read(self, name, rows=None):
        tensor = super().read(name, rows)
        if name.startswith("blocks."):
            self.most = max(self.most, tensor.numel())
        return tensor


@pytest.mark.parametrize("form", ["Q4_K_M", "Q8_0", "F16", *FOLDERS], ids=str)
def test_slices_do_not_change_the_bytes(form, tmp_path, monkeypatch):
    """Whole tensors by one thread, and slices by three."""
    made, most = [], []
    for name, size, threads in (("whole", 1 << 30, 1), ("slices", SLICE, 3)):
        monkeypatch.setattr(stream, "_SLICE_WEIGHTS", size)
        monkeypatch.setattr(stream, "cores", lambda threads=threads: threads)
        source, output = Counting(small_dit()), tmp_path / name
        if isinstance(form, str):
            export_gguf(source, output, form)
        else:
            export_folder({"dit": source}, output, form, config={})
            output = output / ("model.safetensors" if form.format == "mlx" else "diffusion_pytorch_model.safetensors")
        made.append(output.read_bytes())
        most.append(source.most)
    assert made[0] == made[1]
    is_whole = getattr(form, "format", "") == "nvfp4"
    step = 128 * 512 if getattr(form, "format", "") == "mxfp8" else SLICE  # its scales lie in tiles of 128 rows
    assert (most[0] == most[1]) if is_whole else most[1] <= step < most[0]


def test_what_is_in_memory_at_once(tmp_path, monkeypatch):
    """However slow the disk is: slices wait for it, and no more are made."""
    monkeypatch.setattr(stream, "_SLICE_WEIGHTS", SLICE)
    source, made, written = Counting(small_dit()), [], []
    read = source.read
    monkeypatch.setattr(source, "read", lambda name, rows=None: made.append(1) or read(name, rows))

    def advance(done, total):
        written.append(1)
        ahead.append(len(made) - len(written))

    ahead = []
    export_gguf(source, tmp_path / "a.gguf", "F16", threads=2, on_progress=advance)
    assert len(written) > 100 and max(ahead) * SLICE <= 16 * 2 * SLICE
