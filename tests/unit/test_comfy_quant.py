"""What a file says about how its weights are stored: taken, or refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state, write_tokenizer
from wan.convert import main as convert
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.models.encoders import load_text_encoder
from wan.quant.schemes import unrotate
from wan.weights.assign import load_weights
from wan.weights.source import open_source

SPEC = shrunk("t2v-1.3B")
SPEC.dit.update(dim=64, num_heads=2, ffn_dim=256, num_layers=2)
SPEC.text.update(vocab=256, dim=64, dim_attn=64, dim_ffn=256)
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}


def hadamard(size):
    """As the article defines it: the Kronecker power of the regular matrix of 4."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float() / 2
    return four if size == 4 else torch.kron(hadamard(size // 4), four)


def note(said):
    return torch.tensor(list(said if isinstance(said, bytes) else json.dumps(said).encode()), dtype=torch.uint8)


def quantised(weight, group=0):
    """(int8 codes, a scale for each row) of a matrix, rotated in groups of columns."""
    weight = weight.float()
    if group:
        weight = (weight.view(len(weight), -1, group) @ hadamard(group).T).view(weight.shape)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def quantised_state(state, said, in_header, prefix=""):
    """Tensors and metadata of a file whose blocks' matrices are stored as `said`."""
    tensors, layers = {}, {}
    for name, weight in state.items():
        path = name.removesuffix(".weight")
        if weight.ndim != 2 or "blocks." not in name or "norm" in name or "pos_embedding" in name or path == name:
            tensors[prefix + name] = weight
            continue
        codes, scale = quantised(weight, said.get("convrot_groupsize", 0))
        tensors |= {prefix + name: codes, f"{prefix}{path}.weight_scale": scale}
        layers[path] = said
        if not in_header:
            tensors[f"{prefix}{path}.comfy_quant"] = note(said)
    told = json.dumps({"format_version": "1.0", "layers": layers})
    return tensors, {"_quantization_metadata": told} if in_header else None


def small(folder, said, weight=None, header=None, **tensors):
    """A file of one matrix, 64 x 256, rotated or not."""
    codes, scale = quantised(torch.randn(64, 256) if weight is None else weight, 0)
    held = {"x.weight": codes, "x.weight_scale": scale} | ({} if said is None else {"x.comfy_quant": note(said)})
    metadata = None if header is None else {"_quantization_metadata": header}
    path = folder / "model.safetensors"
    save_file({name: one for name, one in (held | tensors).items() if one is not None}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("size", (4, 16, 64, 256))
def test_a_rotation_is_undone_as_by_the_inverse_matrix(size):
    weights = torch.randn(7, 512)
    rotated = (weights.view(7, -1, size) @ hadamard(size).T).view(7, 512)
    torch.testing.assert_close(unrotate(rotated, size), weights, atol=1e-5, rtol=1e-5)
    assert torch.equal(unrotate(rotated, size)[2:3], unrotate(rotated[2:3], size))  # whatever rows are read together


@pytest.mark.parametrize("group", (4, 64, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_rotated_matrix_is_the_one_that_was_quantised(tmp_path, group, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    codes, scale = quantised(weight, group)
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    path = small(tmp_path, said, **{"x.weight": codes, "x.weight_scale": scale})
    source = open_source(path)
    assert source.keys() == ["x.weight"] and source.info("x.weight").shape == (64, 256)
    assert (source.read("x.weight") - weight).abs().max() < 0.05  # noise would be of the size of the weights
    packed = source.packed("x.weight")
    assert torch.equal(packed.dequantize(dtype), source.read("x.weight").to(dtype))
    assert torch.equal(source.packed("x.weight", rows=(5, 9)).dequantize(dtype), packed.dequantize(dtype)[5:9])


@pytest.mark.parametrize("in_header", (False, True), ids=("tensor", "header"))
@pytest.mark.parametrize("prefix", ("", "model.diffusion_model."))
def test_a_rotated_transformer_computes_alike_packed_and_dequantised(tmp_path, in_header, prefix):
    torch.manual_seed(0)
    state = dit_state(SPEC)
    tensors, metadata = quantised_state(state, ROTATED, in_header, prefix)
    save_file(tensors, tmp_path / "dit.safetensors", metadata=metadata)

    def output(path, stream):
        with torch.device("meta"):
            model = WanModel(**SPEC.dit)
        load_weights(model, open_source(path), "dit", dtype=torch.float32, stream=stream)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, SPEC.dit.in_dim, 2, 4, 4, generator=generator)
        with torch.no_grad():
            return model(x, torch.tensor([500.0]), [torch.randn(5, SPEC.dit.text_dim, generator=generator)])

    save_file(state, tmp_path / "dense.safetensors")
    dense, resident, packed = (
        output(tmp_path / name, stream)
        for name, stream in (("dense.safetensors", False), ("dit.safetensors", False), ("dit.safetensors", True))
    )
    assert torch.equal(resident, packed)
    assert (resident - dense).norm() / dense.norm() < 0.02


def test_a_rotated_text_encoder_is_read_and_converted(tmp_path, capsys):
    torch.manual_seed(0)
    state = t5_state(SPEC)
    tensors, _ = quantised_state(state, ROTATED, False)
    table, scale = quantised(state["token_embedding.weight"], 64)
    tensors |= {"token_embedding.weight": table, "token_embedding.weight_scale": scale}
    save_file(tensors | {"token_embedding.comfy_quant": note(ROTATED)}, tmp_path / "t5.safetensors")
    save_file(state, tmp_path / "dense.safetensors")
    write_tokenizer(tmp_path / "tokenizer")

    def embedding(path, stream=False):
        return load_text_encoder(open_source(path), tmp_path / "tokenizer", dtype=torch.float32, stream=stream)(["ab"])[
            0
        ]

    dense, resident = embedding(tmp_path / "dense.safetensors"), embedding(tmp_path / "t5.safetensors")
    assert torch.equal(resident, embedding(tmp_path / "t5.safetensors", stream=True))
    assert (resident - dense).norm() / dense.norm() < 0.05
    written = tmp_path / "t5.gguf"
    args = ["--checkpoint-dir", tmp_path / "t5.safetensors", "--output", written, "--type", "F32", "--quiet"]
    assert convert(list(map(str, args))) == 0
    capsys.readouterr()
    assert torch.equal(embedding(written), resident)


@pytest.mark.parametrize("to", ("fp8", "F32"))
def test_what_is_converted_is_not_rotated_any_more(tmp_path, capsys, to):
    torch.manual_seed(0)
    state = dit_state(SPEC)
    tensors, metadata = quantised_state(state, ROTATED, True)
    save_file(tensors, tmp_path / "dit.safetensors", metadata=metadata)
    where = (
        ["--output", tmp_path / "out.gguf", "--type", to]
        if to == "F32"
        else ["--to", to, "--output-dir", tmp_path / "out"]
    )
    assert convert([str(one) for one in ("--checkpoint-dir", tmp_path / "dit.safetensors", *where, "--quiet")]) == 0
    capsys.readouterr()
    name = "blocks.1.ffn.2.weight"
    written = tmp_path / "out.gguf" if to == "F32" else tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert (open_source(written).read(name) - state[name]).norm() / state[name].norm() < 0.05


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, torch.float8_e4m3fn),
        ({"format": "float8_e5m2"}, torch.float8_e5m2),
        ({"format": "float8_e4m3fn"}, torch.uint8),
        ({"format": "float8_e5m2", "orig_dtype": "torch.bfloat16"}, torch.uint8),
    ],
)
def test_fp8_is_taken_also_where_its_codes_are_stored_as_bytes(tmp_path, said, dtype):
    kind = torch.float8_e5m2 if said["format"].endswith("e5m2") else torch.float8_e4m3fn
    codes, scale = (torch.randn(64, 256) * 20).to(kind), torch.tensor(0.01)
    tensors = {"x.weight": codes.view(dtype), "x.weight_scale": scale, "x.input_scale": torch.tensor(1.0)}
    source = open_source(small(tmp_path, said, **tensors))
    assert torch.equal(source.read("x.weight"), codes.float() * scale)


def test_blocks_are_of_the_size_that_is_said(tmp_path):
    codes, scale = torch.randint(-9, 9, (64, 256)).to(torch.int8), torch.rand(2, 8) + 0.1
    said = {"format": "int8_blockwise", "group_size": 32}
    source = open_source(small(tmp_path, said, **{"x.weight": codes, "x.weight_scale": scale}))
    whole = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(source.read("x.weight"), codes.float() * whole)
    assert torch.equal(source.packed("x.weight", rows=(30, 35)).dequantize(), (codes.float() * whole)[30:35])


def test_older_notes_are_understood(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    codes, scale = quantised(weight, 256)
    for said in (
        {"convrot": True, "convrot_groupsize": 256, "per_row": True},
        {"format": "int8_tensorwise", "params": {"convrot": True}, "weight_rotated": True},
    ):
        source = open_source(small(tmp_path, said, **{"x.weight": codes, "x.weight_scale": scale}))
        assert (source.read("x.weight") - weight).abs().max() < 0.05


LAYER = json.dumps({"layers": {"x": {"format": "int8_tensorwise"}}})


@pytest.mark.parametrize(
    ("said", "header", "match"),
    [
        (
            {"format": "svdquant_w4a4"},
            None,
            r"x.comfy_quant says of x.weight: format 'svdquant_w4a4', which is not read",
        ),
        ({"format": "nvfp4"}, None, r"format nvfp4, and it is int8 \[64, 256\]"),
        ({"format": "convrot_w4a4"}, None, "convrot_w4a4"),
        ({"format": "a\nb"}, None, r"a\\nb"),
        ({"format": ["int8_tensorwise"]}, None, "not read"),
        ({}, None, "format None"),
        (None, json.dumps({"layers": {"x": {"format": "mxfp9"}}}), r"_quantization_metadata.*mxfp9"),
        (None, json.dumps({"layers": {"x": "awq_w4a16"}}), "awq_w4a16"),
        ({"format": "float8_e4m3fn"}, None, r"format float8_e4m3fn, and it is int8 \[64, 256\]"),
        ({"format": "int8_tensorwise", "hadamard_quip": True}, None, "'hadamard_quip': True, which is not known"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 128}, None, "no power of 4"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024}, None, "256 columns"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 10**30}, None, "no size"),
        ({"format": "int8_tensorwise", "convrot": "yes"}, None, "neither true nor false"),
        ({"format": "int8_tensorwise", "convrot": True, "weight_rotated": False}, None, "weight_rotated"),
        ({"format": "int8_tensorwise", "per_row": False}, None, r"\[64, 1\], which does not fit .* the tensor"),
        ({"format": "int8_blockwise"}, None, r"\[64, 1\], which does not fit int8_blockwise"),
        (b"{", None, "x.comfy_quant is not JSON"),
        (b"[1]", None, "nothing that can be understood"),
        (b"[" * 9000, None, "not JSON"),
        (None, "{", "not JSON"),
        (None, "[]", "no layers"),
        (None, json.dumps({"layers": [1]}), "no layers"),
        (None, json.dumps({"format_version": "2.0", "layers": {}}), "version 2.0"),
        (None, json.dumps({"layers": {"y": {"format": "int8_tensorwise"}}}), "speaks of y, which has no weight"),
        ({"format": "int8_tensorwise", "convrot": True}, LAYER, "x.comfy_quant and .* differ about x.weight"),
    ],
)
def test_what_is_not_known_or_contradicts_itself_is_refused_by_name(tmp_path, said, header, match):
    path = small(tmp_path, said, header=header)
    with pytest.raises(SwanError, match=match) as raised:
        open_source(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_both_sources_may_say_the_same(tmp_path):
    said = {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    assert open_source(small(tmp_path, said, header=LAYER)).keys() == ["x.weight"]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"x.weight_scale": None}, "int8_tensorwise, by x.comfy_quant, and has no weight_scale"),
        ({"x.weight": None, "x.weight_scale": None}, "x.comfy_quant belongs to x.weight, which is not there"),
        ({"x.weight": torch.zeros(64, 256)}, r"it is float32 \[64, 256\]"),
        ({"x.weight": torch.zeros(64, 4, 4, 16, dtype=torch.int8)}, "it is int8"),
        ({"x.comfy_quant": torch.zeros(3)}, "no text"),
        ({"x.comfy_quant": torch.zeros(1 << 17, dtype=torch.uint8)}, "no text"),
        ({"x.comfy_quant": torch.full((8,), 255, dtype=torch.uint8)}, "not JSON"),
    ],
)
def test_a_note_has_to_agree_with_its_tensors(tmp_path, tensors, match):
    with pytest.raises(SwanError, match=match):
        open_source(small(tmp_path, {"format": "int8_tensorwise"}, **tensors))


def test_one_block_without_a_note_is_not_guessed(tmp_path):
    torch.manual_seed(0)
    tensors, _ = quantised_state(dit_state(SPEC), ROTATED, False)
    del tensors["blocks.1.ffn.0.comfy_quant"]
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(SwanError, match="nothing says how blocks.1.ffn.0.weight is stored"):
        open_source(tmp_path / "dit.safetensors")


def test_each_of_several_files_may_speak_for_itself(tmp_path):
    torch.manual_seed(0)
    weights = [torch.randn(64, 256) for _ in range(2)]
    for index, (weight, said) in enumerate(zip(weights, (ROTATED, {"format": "int8_tensorwise"}))):
        codes, scale = quantised(weight, said.get("convrot_groupsize", 0))
        tensors = {f"layer{index}.weight": codes, f"layer{index}.weight_scale": scale}
        told = json.dumps({"layers": {f"layer{index}": said}})
        save_file(tensors, tmp_path / f"{index}.safetensors", metadata={"_quantization_metadata": told})
    source = open_source(sorted(tmp_path.iterdir()))
    for index, weight in enumerate(weights):
        assert (source.read(f"layer{index}.weight") - weight).abs().max() < 0.05
    assert load_file(tmp_path / "0.safetensors").keys() == {"layer0.weight", "layer0.weight_scale"}
