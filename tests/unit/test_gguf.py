"""GGUF files: what the reader gives, beside the reader of the `gguf` package, and what it refuses."""

import os
import struct
import tracemalloc
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.gguf_helpers import (
    BLOCK_TYPES,
    array,
    key,
    random_rows,
    raw_gguf,
    string,
    tensor,
    text,
    tiny_dit,
    tiny_t5,
    u32,
    write_gguf,
)
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.quant.ggml import BY_ID, BY_NAME, has_bad_scales
from wan.quant.native import has_bad_scales_native
from wan.weights.assign import load_weights
from wan.weights.containers.gguf_header import GGUFArray
from wan.weights.source import open_source


def refused(path, match):
    """The one line that opening `path` ends in."""
    with pytest.raises(SwanError, match=match) as error:
        open_source(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def oracle(path):
    """Name -> the tensor of the `gguf` package's reader."""
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def mixed():
    """A tensor of every type."""
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": (name, random_rows(name, 5, 512)) for name in BLOCK_TYPES}
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        tensors[dtype.__name__] = (random.standard_normal((3, 5)) * 100).astype(dtype)
    tensors["bf16"] = ("BF16", random.integers(0, 256, (4, 6), dtype=np.uint8))
    tensors["line"] = np.arange(7, dtype=np.float32)
    tensors["conv"] = random.standard_normal((4, 3, 1, 2, 2)).astype(np.float32)
    tensors["batch"] = ("Q4_0", random_rows("Q4_0", 6, 64).reshape(2, 3, -1))
    return tensors


# Reading


@pytest.mark.parametrize("readers, piece_bytes", [(1, 8 << 20), (3, 400)])
def test_every_type_as_the_gguf_package_reads_it(tmp_path, monkeypatch, readers, piece_bytes):
    monkeypatch.setattr("wan.weights.containers.opened.READERS", readers)
    monkeypatch.setattr("wan.weights.containers.gguf.PIECE_BYTES", piece_bytes)
    path = write_gguf(tmp_path / "x.gguf", mixed())
    source, theirs = open_source(path), oracle(path)
    assert source.keys() == list(theirs)
    for name, their in theirs.items():
        info, stored, packed, read = source.info(name), source.type(name), source.packed(name), source.read(name)
        assert info.shape == tuple(int(size) for size in reversed(their.shape)) == tuple(read.shape)
        assert stored.id == their.tensor_type and read.dtype == info.dtype
        if stored.torch_dtype is None:
            assert packed.blocks.is_contiguous() and packed.shape == info.shape and info.dtype == torch.float32
            assert packed.blocks.shape[1] == stored.row_bytes(info.shape[-1])
            assert packed.blocks.numpy().tobytes() == their.data.tobytes()
            theirs_read = torch.from_numpy(gguf.quants.dequantize(their.data, their.tensor_type))
            assert torch.equal(read, theirs_read)
        else:
            assert packed is None and read.dtype == stored.torch_dtype
            assert read.view(torch.uint8).numpy().tobytes() == their.data.tobytes()


def test_block_sizes_are_those_of_the_gguf_package():
    sizes = gguf.constants.GGML_QUANT_SIZES
    for one in BY_ID.values():
        assert gguf.GGMLQuantizationType[one.name] == one.id
        assert sizes[gguf.GGMLQuantizationType(one.id)] == (one.block_weights, one.block_bytes)


@pytest.mark.parametrize("large_bytes", [1, 1 << 40])
def test_memory_of_both_kinds(tmp_path, monkeypatch, large_bytes):
    monkeypatch.setattr("wan.quant.scratch._MAPPED_BYTES", large_bytes)
    value = np.arange(1_000_000, dtype=np.float32)
    source = open_source(write_gguf(tmp_path / "x.gguf", {"a": value}))
    assert np.array_equal(source.read("a").numpy(), value)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_that_are_read(tmp_path, version):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw_gguf([tensor("a", [2, 1])], data=struct.pack("<2f", 1, 2), version=version))
    assert torch.equal(open_source(path).read("a"), torch.tensor([[1.0, 2.0]]))


def test_the_end_of_the_file_may_be_padded_or_not(tmp_path):
    path = tmp_path / "x.gguf"
    for rest in (b"", b"\0" * 24, b"more bytes than an alignment would ask for"):
        path.write_bytes(raw_gguf([tensor("a", [2])], data=struct.pack("<2f", 1, 2) + rest))
        assert torch.equal(open_source(path).read("a"), torch.tensor([1.0, 2.0]))


def test_alignment_of_the_file(tmp_path):
    path = tmp_path / "x.gguf"
    tensors, data = [tensor("a", [1]), tensor("b", [1], offset=256)], struct.pack("<f252xf", 1, 2)
    path.write_bytes(raw_gguf(tensors, [u32("general.alignment", 256)], data, alignment=256))
    source = open_source(path)
    assert source.read("a").item() == 1 and source.read("b").item() == 2


def test_a_transformer_loads(tmp_path):
    path, config = tiny_dit(tmp_path / "x.gguf")
    with torch.device("meta"):
        model = WanModel(**config)
    source = open_source(path)
    load_weights(model, source, "dit", dtype=torch.float32)
    assert source.type("blocks.0.self_attn.q.weight").name == "Q8_0"
    for name, their in oracle(path).items():
        values = gguf.quants.dequantize(their.data, their.tensor_type)
        loaded = model.state_dict()[name]
        assert np.array_equal(loaded.numpy(), values.reshape(loaded.shape)), name


def test_a_text_encoder_is_read(tmp_path):
    source = open_source(tiny_t5(tmp_path / "x.gguf"))
    assert source.metadata["tokenizer.ggml.model"] == "t5"
    assert source.array("tokenizer.ggml.tokens")[23] == "▁token23"
    assert source.info("enc.blk.0.attn_q.weight").shape == (32, 32)


def test_what_was_read_survives_its_file(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", mixed())
    source = open_source(path)
    names = ["Q4_K.weight", "float32"]
    before = [source.read(name) for name in names]
    copies = [one.clone() for one in before]
    packed = source.packed("Q4_K.weight").blocks
    os.truncate(path, 10)
    assert all(torch.equal(one, copy) for one, copy in zip(before, copies))
    assert packed.numpy().tobytes() == mixed()["Q4_K.weight"][1].tobytes()


def damage_in_place(path):
    path.write_bytes(path.read_bytes().replace(b"wan", b"was"))
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "changed after it was opened"),
        (lambda path: path.unlink(), "cannot be read"),
        (damage_in_place, "changed after it was opened"),
    ],
)
def test_a_file_that_changes_while_it_is_open(tmp_path, change, match):
    path = write_gguf(tmp_path / "x.gguf", mixed(), add=lambda writer: writer.add_array("list", [1, 2]))
    source = open_source(path)
    change(path)
    for use in (lambda: source.read("float32"), lambda: source.packed("Q8_0.weight"), lambda: source.array("list")):
        with pytest.raises(SwanError, match=match):
            use()


def test_a_file_cut_during_a_read(tmp_path, monkeypatch):
    """The cut comes after the check."""
    path = write_gguf(tmp_path / "x.gguf", {"a": np.zeros(1000, dtype=np.float32)})
    monkeypatch.setattr("wan.weights.containers.opened.state", lambda file: (size, 0, 0, 0))
    size = path.stat().st_size
    source = open_source(path)
    os.truncate(path, size - 100)
    with pytest.raises(SwanError, match="the file ended inside tensor a"):
        source.read("a")
    os.truncate(path, 40)
    refused(path, "the file ended inside its header")


def test_packed_blocks_of_other_sources(tmp_path):
    save_file({"b": torch.ones(2)}, tmp_path / "x.safetensors")
    path = write_gguf(tmp_path / "x.gguf", {"a": ("Q8_0", random_rows("Q8_0", 2, 32))})
    source = open_source([path, tmp_path / "x.safetensors"])
    assert source.packed("b") is None and source.packed("a").type.name == "Q8_0"
    assert torch.equal(source.packed("a").dequantize(), source.read("a"))


# Shapes


def shaped(path, dims, add=lambda writer, key, dims: writer.add_array(key, dims)):
    """A tensor of blocks, [6, 64], with a true shape."""
    tensors = {"a": ("Q8_0", random_rows("Q8_0", 6, 64))}
    return write_gguf(path, tensors, add=lambda writer: add(writer, "comfy.gguf.orig_shape.a", dims))


@pytest.mark.parametrize("dims", [[2, 3, 64], [384], [12, 32], [2, 3, 4, 16]])
def test_a_true_shape(tmp_path, dims):
    path = shaped(tmp_path / "x.gguf", dims)
    source = open_source(path)
    packed, read = source.packed("a"), source.read("a")
    assert source.info("a").shape == packed.shape == tuple(read.shape) == tuple(dims)
    assert packed.blocks.shape == (6, 68)
    assert torch.equal(read.flatten(), torch.from_numpy(gguf.quants.dequantize(*oracle_block(path))).flatten())


def oracle_block(path):
    (one,) = gguf.GGUFReader(path).tensors
    return one.data, one.tensor_type


@pytest.mark.parametrize(
    "dims, match",
    [
        ([6, 65], r"is \[6, 65\], but the tensor has the shape \[6, 64\]"),
        ([0, 64], "but the tensor"),
        ([-6, -64], "but the tensor"),
        ([1.5, 2.5], "is no shape"),
        ([1] * 9, "is no shape"),
    ],
)
def test_a_true_shape_that_cannot_be(tmp_path, dims, match):
    refused(shaped(tmp_path / "x.gguf", dims), match)


def test_a_true_shape_that_is_no_array(tmp_path):
    path = shaped(tmp_path / "x.gguf", 5, lambda writer, key, dims: writer.add_uint32(key, dims))
    refused(path, "comfy.gguf.orig_shape.a is no shape")


# Keys and values


def test_values_of_every_type(tmp_path):
    scalars = {"uint8": 255, "int8": -1, "uint16": 65535, "int16": -2, "uint32": 2**32 - 1, "int32": -3}
    scalars |= {"uint64": 2**64 - 1, "int64": -4, "float32": 0.5, "float64": 0.1, "bool": True, "string": "naïve"}

    def add(writer):
        for name, value in scalars.items():
            getattr(writer, f"add_{name}")(f"the.{name}", value)
        for name, value in scalars.items():
            kind, sub = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[name.upper()]
            writer.add_key_value(f"list.{name}", [value] * 3, kind, sub)

    source = open_source(write_gguf(tmp_path / "x.gguf", {"a": np.zeros(1, np.float32)}, add=add))
    for name, value in scalars.items():
        read, listed = source.metadata[f"the.{name}"], source.metadata[f"list.{name}"]
        assert read == value and type(read) is type(value)
        assert isinstance(listed, GGUFArray) and listed.count == 3
        assert source.array(f"list.{name}") == [value] * 3


def test_a_large_tokenizer_is_passed_over(tmp_path):
    count = 256_384
    tokens = [f"token {index}" for index in range(count)]
    listed = array("tokens", 8, count, b"".join(map(text, tokens)))
    scores = array("scores", 6, count, np.arange(count, dtype=np.float32).tobytes())
    path = tmp_path / "x.gguf"
    path.write_bytes(raw_gguf([tensor("a", [1])], [listed, scores, string("last", "key")], data=b"\0" * 4))
    tracemalloc.start()
    source = open_source(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20, "no string is made"
    assert source.metadata["last"] == "key" and source.metadata["tokens"].count == count
    assert source.array("tokens") == tokens and source.array("scores")[-1] == count - 1


def test_arrays_that_cannot_be_read(tmp_path):
    keys = [array("broken", 8, 1, text(b"\xff")), array("bools", 7, 2, b"\1\2"), u32("number", 1)]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw_gguf([tensor("a", [1])], keys, data=b"\0" * 4))
    source = open_source(path)
    cases = {"broken": "not UTF-8", "bools": "neither 0 nor 1", "number": "has no array", "absent": "has no array"}
    for name, match in cases.items():
        with pytest.raises(SwanError, match=match):
            source.array(name)


# Scales


SCALES = [(name, offset) for name in BLOCK_TYPES for offset in BY_NAME[name].scale_offsets]


@pytest.mark.parametrize("name, offset", SCALES + [("MXFP4", None), ("IQ1_M", None)])
def test_infinite_and_nan_scales(tmp_path, name, offset):
    for value in (np.inf, -np.inf, np.nan):
        rows = random_rows(name, 40, 512).copy()
        blocks = rows.reshape(-1, BY_NAME[name].block_bytes)
        assert not has_bad_scales(torch.from_numpy(blocks), BY_NAME[name])
        bits = int(np.float16(value).view(np.uint16))
        if name == "MXFP4":
            blocks[-1, 0] = 0xFF
        elif name == "IQ1_M":
            for index in range(4):
                blocks[-1, 49 + 2 * index] = blocks[-1, 49 + 2 * index] & 0x0F | (bits >> 4 * index & 0xF) << 4
        else:
            blocks[-1, offset : offset + 2] = bits & 0xFF, bits >> 8
        source = open_source(write_gguf(tmp_path / "x.gguf", {"good": np.zeros(1, np.float32), "bad": (name, rows)}))
        for use in (source.read, source.packed, partial(source.packed, mapped=True)):
            with pytest.raises(SwanError, match="tensor bad has blocks with infinite or NaN scales: .* damaged"):
                use("bad")
        assert source.read("good").item() == 0


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_scales_are_where_dequantisation_finds_them(name):
    """Random bytes: a block is bad exactly if it has weights that are no numbers."""
    one = BY_NAME[name]
    blocks = np.random.default_rng(0).integers(0, 256, (500, one.block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[blocks[:, 0] == 252] = 0  # the one scale that is refused and does not overflow
    with np.errstate(invalid="ignore", over="ignore"):
        weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    bad = [has_bad_scales(torch.from_numpy(block), one) for block in blocks]
    assert bad == [not np.isfinite(row).all() for row in weights] and 0 < sum(bad) < 500
    assert bad == [has_bad_scales_native(torch.from_numpy(block), one) for block in blocks]


# Refusing


A, DATA = tensor("a", [2]), b"\0" * 8
HUGE = 2**64 - 32


@pytest.mark.parametrize(
    "content, match",
    [
        (raw_gguf([A], data=DATA, version=1), "GGUF version 1, only 2 and 3"),
        (raw_gguf([A], data=DATA, version=4), "GGUF version 4, only 2 and 3"),
        (raw_gguf([A], data=DATA, version=0), "GGUF version 0, only 2 and 3"),
        (raw_gguf([A], data=DATA, version=3 << 24), "big-endian"),
        (raw_gguf([], [u32("x", 1)], b"\0" * 64), "holds no tensors"),
        (raw_gguf([A], data=DATA, counts=(2**63, 0)), "do not fit in"),
        (raw_gguf([A], data=DATA, counts=(1, 2**63)), "do not fit in"),
        (raw_gguf([A], data=DATA, counts=(3, 0)), "do not fit in|truncated"),
        (raw_gguf([A], data=b"\0" * (5 << 20), counts=(1 << 17 | 1, 0)), "at most 131,072 are allowed"),
        (raw_gguf([A], [u32("x", 1)] * 2, DATA), "the key x is there twice"),
        (raw_gguf([A, A], data=DATA), "the tensor a is there twice"),
        (raw_gguf([A], [key("x", 13, b"\0" * 8)], DATA), "the key x has the unknown value type 13"),
        (raw_gguf([A], [key("x", 7, b"\2")], DATA), "bool of value 2"),
        (raw_gguf([A], [string(b"\xff", "y")], DATA), "the name of key 0 is not UTF-8"),
        (raw_gguf([A], [string("x", b"\xff")], DATA), "the value of x is not UTF-8"),
        (raw_gguf([A], [string("two\nlines", "y")], DATA), "control characters"),
        (raw_gguf([A], [key("x", 8, text("y", 2**63))], DATA), "the value of x ends at byte .*, past the end"),
        (raw_gguf([A], [key("x", 8, text("y", 2**64 - 1))], DATA), "the value of x ends at byte .*, past the end"),
        (raw_gguf([A], [text("key", 1000)], DATA), "the name of key 0 ends at byte .*, past the end"),
        (raw_gguf([A], [text("k" * 70_000)], DATA), "at most 65,535 are allowed"),
        (raw_gguf([A], [array("x", 9, 1, b"\0" * 16)], DATA), "an array of arrays"),
        (raw_gguf([A], [array("x", 13, 1, b"\0" * 16)], DATA), "array of the unknown value type 13"),
        (raw_gguf([A], [array("x", 0, 2**64 - 1, b"")], DATA), "the array x of .* past the end"),
        (raw_gguf([A], [array("x", 10, 2**61, b"")], DATA), "the array x of .* past the end"),
        (raw_gguf([A], [array("x", 8, 2**61, b"")], DATA), "the array x of .* past the end"),
        (raw_gguf([A], [array("x", 8, 2, text("y") + text("z", 500))], DATA), "the array x of 2 .* past the end"),
        (raw_gguf([A], [array("x", 8, 2, text("y", 2**64 - 1))], DATA), "the array x of 2 .* past the end"),
        (raw_gguf([A], [array("x", 8, 4, text("y" * 80, 80))], DATA), "truncated, expected at least|past the end"),
        (raw_gguf([A], [u32("general.alignment", 0)], DATA), "general.alignment is 0 .*a power of two"),
        (raw_gguf([A], [u32("general.alignment", 48)], DATA), "general.alignment is 48"),
        (raw_gguf([A], [u32("general.alignment", 2**31)], DATA), "general.alignment is 2147483648"),
        (raw_gguf([A], [string("general.alignment", "32")], DATA), "general.alignment is str"),
        (raw_gguf([A], [key("general.alignment", 10, struct.pack("<Q", 32))], DATA), r"32 \(type 10\)"),
        (raw_gguf([A], [u32("general.architecture", 1)], DATA), "general.architecture is no string"),
        (raw_gguf([A], [string("general.file_type", "x")], DATA), "general.file_type is no integer"),
        (raw_gguf([A], [string("split.count", "x")], DATA), "split.count is no integer"),
        (raw_gguf([A], [key("split.count", 2, b"\3\0")], DATA), "one of 3 parts .* llama-gguf-split --merge"),
        (raw_gguf([tensor("", [2])], data=DATA), "tensor 0 has no name"),
        (raw_gguf([tensor(b"\xc3", [2])], data=DATA), "the name of tensor 0 is not UTF-8"),
        (raw_gguf([text("a", 2**62) + A], data=DATA), "the name of tensor 0 ends at byte .* past the end"),
        (raw_gguf([tensor("a", [])], data=DATA), "tensor a has 0 dimensions"),
        (raw_gguf([tensor("a", [2, 1, 1, 1, 1, 1])], data=DATA), "tensor a has 6 dimensions"),
        (raw_gguf([tensor("a", [0, 2])], data=DATA), r"the impossible shape \[2, 0\]"),
        (raw_gguf([tensor("a", [2**64 - 2, 1])], data=DATA), "the impossible shape"),
        (raw_gguf([tensor("a", [2**63])], data=DATA), "the impossible shape"),
        (raw_gguf([tensor("a", [2**32, 2**32, 1])], data=DATA), "the impossible shape"),
        (raw_gguf([tensor("a", [2**62 + 1])], data=DATA), "the header is damaged"),
        (raw_gguf([tensor("a", [2], 4)], data=DATA), "tensor a has the ggml type 4,"),
        (raw_gguf([tensor("a", [2], 2**32 - 1)], data=DATA), "tensor a has the ggml type 4294967295,"),
        (raw_gguf([tensor("a", [33, 2], 8)], data=DATA), "tensor a of shape .*33 weights .* Q8_0 blocks"),
        (raw_gguf([tensor("a", [32, 8], 14)], data=DATA), "tensor a of shape .*32 weights .* Q6_K blocks"),
        (raw_gguf([tensor("a", [2], offset=16)], data=DATA * 8), "offset 16, no multiple of the alignment 32"),
        (raw_gguf([tensor("a", [2], offset=HUGE)], data=DATA), "at offset 18,446,744,073,709,551,584"),
        (raw_gguf([A, tensor("b", [2])], data=DATA * 8), "the tensors a and b overlap"),
        (raw_gguf([tensor("a", [9], offset=32), tensor("b", [9])], data=b"\0" * 99), "the tensors b and a overlap"),
        (raw_gguf([A, tensor("b", [2], offset=2**40)], data=DATA), "truncated, expected 1,099,511,"),
        (raw_gguf([tensor("a", [3])], data=DATA), "truncated, expected 76 bytes, has 72; download it again"),
    ],
)
def test_damaged_files(tmp_path, content, match):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(path, match)


def test_a_download_that_stopped_anywhere(tmp_path):
    path = tmp_path / "x.gguf"
    keys = [string("general.architecture", "wan"), array("list", 8, 2, text("one") + text("two")), u32("x", 1)]
    whole = raw_gguf([A, tensor("b", [3], offset=32)], keys, DATA + b"\0" * 36)
    data_start = len(whole) - 44
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        message = refused(path, "truncated|not a safetensors, PyTorch or GGUF file")
        if size > data_start:
            assert f"truncated, expected {len(whole):,} bytes, has {size:,}; download it again" in message
    path.write_bytes(whole)
    assert open_source(path).keys() == ["a", "b"]


def test_a_header_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("wan.weights.containers.gguf_header._MAX_HEADER_BYTES", 100)
    path = tmp_path / "x.gguf"
    path.write_bytes(raw_gguf([A], [string("x", "y" * 200)], DATA))
    refused(path, "a header has at most 100")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\nsize 5\n"])
def test_what_a_failed_download_leaves(tmp_path, page):
    (tmp_path / "x.gguf").write_bytes(page)
    refused(tmp_path / "x.gguf", "web page|Git-LFS pointer")


# Which model


def named(path, architecture, *names):
    keys = [] if architecture is None else [string("general.architecture", architecture)]
    tensors = [tensor(name, [1], offset=32 * index) for index, name in enumerate(names)]
    path.write_bytes(raw_gguf(tensors, keys, b"\0" * 32 * len(names)))
    return path


WAN = ("blocks.0.self_attn.norm_q.weight", "head.modulation")


@pytest.mark.parametrize(
    "architecture, names",
    [
        *[(one, ["anything"]) for one in ("wan", "t5encoder", "t5", "pig", "cow", None)],
        ("llama", WAN),
        ("sd3", [f"model.diffusion_model.{name}" for name in WAN]),
        ("", [f"diffusion_model.{name}" for name in WAN]),
        ("umt5", ["enc.blk.0.attn_q.weight"]),
    ],
)
def test_models_of_wan(tmp_path, architecture, names):
    assert open_source(named(tmp_path / "x.gguf", architecture, *names)).keys() == list(names)


@pytest.mark.parametrize("architecture", ["llama", "flux", "sd3", "hyvid", "ltxv", "qwen_image", ""])
@pytest.mark.parametrize("names", [["blk.0.attn_q.weight"], WAN[:1], [f"other.{name}" for name in WAN]])
def test_models_of_other_kinds(tmp_path, architecture, names):
    path = named(tmp_path / "x.gguf", architecture, *names)
    refused(path, f"general.architecture is '{architecture}', neither a Wan")
