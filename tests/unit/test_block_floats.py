"""NVFP4 and MX formats as LightX2V and ComfyUI store them: small floats whose scales are small floats, in tiles."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.unit.tiny_checkpoint import dit_state, shrunk, write_checkpoint
from wan.convert import main as convert
from wan.engine import Engine
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.quant.rounding import quantize_mxfp8, quantize_nvfp4
from wan.quant.schemes import E8M0
from wan.tasks import load_task
from wan.weights.assign import load_weights
from wan.weights.locate import locate
from wan.weights.scaled import check_scales, join_scales
from wan.weights.source import open_source
from wan.weights.write.folder import Form, export_folder

# Exponent and mantissa bits of codes, bits of a code, columns that share a scale.
CODES = {"nvfp4": (2, 1, 4, 16), "mxfp4": (2, 1, 4, 32), "mxfp6": (3, 2, 6, 32), "mxfp8": (4, 3, 8, 32)}
MADE = [("nvfp4", "alpha"), ("nvfp4", "global"), ("nvfp4", "comfy"), ("mxfp4", "lightx2v"), ("mxfp6", "lightx2v")]
MADE += [("mxfp8", "lightx2v"), ("mxfp8", "comfy")]


# The formulas once more, in fp64 and Python's integers


def value(code, exponent_bits, mantissa_bits):
    """Of a float without infinities; of E4M3 the codes that are NaN are not asked for."""
    sign, rest = divmod(code, 1 << exponent_bits + mantissa_bits)
    exponent, mantissa = divmod(rest, 1 << mantissa_bits)
    bias, fraction = 2 ** (exponent_bits - 1) - 1, mantissa / 2**mantissa_bits
    size = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return -size if sign else size


def packed_bytes(codes, bits, high_first=False):
    """Codes, one a number, -> bytes: the bits of a row follow each other, the lowest first."""
    each = codes[..., None] >> np.arange(bits) & 1
    packed = np.packbits(each.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed % 16 * 16 + packed // 16 if high_first else packed)


def tiled(scales):
    """Bytes [rows, groups] -> as they lie in the file."""
    rows, groups = scales.shape
    height, width = -(-rows // 128) * 128, -(-groups // 4) * 4
    flat, (row, group) = np.zeros(height * width, np.uint8), np.indices((rows, groups))
    tile = row // 128 * (width // 4) + group // 4
    flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scales
    return torch.from_numpy(flat).view(height, width)


def note(said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def stored(kind, maker, codes, scales, whole=1.0, name="x"):
    """Tensors of a matrix; codes and scales: as numbers from 0 on, [rows, columns] and [rows, groups]."""
    _, _, bits, _ = CODES[kind]
    packed = packed_bytes(codes, bits, high_first=kind == "nvfp4" and maker == "comfy")
    tensors = {f"{name}.weight": packed}
    tensors[f"{name}.weight_scale"] = tiled(scales).view(torch.float8_e4m3fn if kind == "nvfp4" else E8M0)
    if maker == "comfy":
        tensors[f"{name}.comfy_quant"] = note({"format": kind})
    if kind == "mxfp8" and maker == "comfy":
        tensors[f"{name}.weight"] = packed.view(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].view(torch.uint8)
    if kind == "nvfp4":
        one = torch.tensor(whole, dtype=torch.float32)
        beside = {"comfy": {"weight_scale_2": one, "input_scale": torch.tensor(3.0)}}
        beside["alpha"] = {"alpha": one / 4, "input_global_scale": torch.tensor([4.0])}
        beside["global"] = {"weight_global_scale": 1 / one, "input_absmax": torch.tensor(9.0)}
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in beside[maker].items()}
    return tensors


def weights_of(kind, codes, scales, whole=1.0):
    exponent_bits, mantissa_bits, bits, group = CODES[kind]
    of_code = np.array([value(code, exponent_bits, mantissa_bits) for code in range(1 << bits)])
    of_scale = np.array([value(code, 4, 3) if kind == "nvfp4" else 2.0 ** (code - 127) for code in range(256)])
    with np.errstate(over="ignore"):
        exact = of_code[codes] * np.repeat(of_scale[scales], group, 1) * whole
        return torch.from_numpy(exact.astype(np.float32))


def every_code(kind):
    """Codes and scales such that each scale there is meets each code there is: [rows, columns], [rows, groups]."""
    _, _, bits, group = CODES[kind]
    if kind == "nvfp4":
        allowed = [code for code in range(256) if code not in (0x7F, 0xFF, 0, 0x80)]  # NaN; zeros have their own test
    else:
        allowed = list(range(255))
    numbers = [code for code in range(1 << bits) if kind != "mxfp8" or code not in (0x7F, 0xFF)]
    numbers = np.resize(np.array(numbers), -(-len(numbers) // group) * group).reshape(-1, group)
    pairs = [(scale, one) for scale in allowed for one in numbers]
    groups = 6 if kind == "nvfp4" else 16
    pairs = [pairs[at % len(pairs)] for at in range(-(-max(len(pairs), 140 * groups) // groups) * groups)]
    scales = np.array([scale for scale, _ in pairs]).reshape(-1, groups)
    return np.array([one for _, one in pairs]).reshape(len(scales), -1), scales


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def file(request, tmp_path_factory):
    """(what it is, an opened file with one matrix x.weight, its weights)."""
    kind, maker = request.param
    codes, scales = every_code(kind)
    whole = 2.0**-9 * 1.25 if maker == "global" else float(np.float32(0.0123)) if kind == "nvfp4" else 1.0
    path = tmp_path_factory.mktemp("floats") / "a.safetensors"
    tensors = stored(kind, maker, codes, scales, whole)
    if maker == "global":
        whole = 1 / float(tensors["x.weight_global_scale"])
        whole = float(np.float32(whole))
    save_file(tensors | {"x.bias": torch.ones(3)}, path)
    source = open_source(path)
    check_scales(source)
    return kind, source, weights_of(kind, codes, scales, whole)


def test_each_code_with_each_scale(file):
    kind, source, weights = file
    assert sorted(source.keys()) == ["x.bias", "x.weight"] and source.info("x.weight").shape == tuple(weights.shape)
    assert source.block_type("x.weight").name == kind
    made = source.read("x.weight")
    assert torch.equal(made, weights) and torch.equal(made.signbit(), weights.signbit())
    packed = source.packed("x.weight")
    assert torch.equal(packed.dequantize(torch.bfloat16), weights.bfloat16())  # rounded once
    size = packed.blocks.shape[1] / weights.shape[1]
    assert size < {"nvfp4": 0.75, "mxfp4": 0.6, "mxfp6": 0.85, "mxfp8": 1.1}[kind]  # bytes a weight


def test_rows(file):
    _, source, weights = file
    for rows in ((0, 1), (3, 17), (5, 5), (120, 139), (128, len(weights))):
        assert torch.equal(source.read("x.weight", rows), weights[slice(*rows)])
    ids = torch.tensor([[3, 130], [3, 7]])
    layer = QuantEmbedding(source.packed("x.weight"), torch.bfloat16)
    assert torch.equal(layer(ids), F.embedding(ids, weights.bfloat16()))


def test_pth_and_zeros(tmp_path):
    """A scale of zero is one of zeros, of either sign."""
    codes, scales = np.zeros((3, 32), np.int64), np.zeros((3, 2), np.int64)
    codes[0, 16:], scales[0, 1], codes[1, 3] = 5, 0x38, 8
    torch.save(stored("nvfp4", "alpha", codes, scales, 0.5), tmp_path / "a.pth")
    made = open_source(tmp_path / "a.pth").read("x.weight")
    assert torch.equal(made, weights_of("nvfp4", codes, scales, 0.5)) and made[0, 20] == 1.5 and made[1, 3] == 0


# Bad files


def nvfp4(maker="alpha", **more):
    """160 x 96: scales [256, 8]."""
    generator = np.random.default_rng(0)
    codes, scales = generator.integers(1, 8, (160, 96)), generator.integers(8, 120, (160, 6))
    return {name: one for name, one in (stored("nvfp4", maker, codes, scales) | more).items() if one is not None}


def mx(size_bytes, width, dtype=torch.uint8):
    return {"x.weight": torch.zeros(160, size_bytes, dtype=dtype), "x.weight_scale": torch.zeros(256, width).to(E8M0)}


SCALES, ONE = torch.ones(256, 8).to(torch.float8_e4m3fn), torch.ones(())
ZERO, NAN = ((SCALES.float() * factor).to(SCALES.dtype) for factor in (0, float("nan")))
TURNED, WIDER = (note({"format": "nvfp4"} | more) for more in ({"convrot": True}, {"group_size": 32}))
BAD = torch.full((256, 12), 255, dtype=torch.uint8).view(E8M0)
BAD_FILES = [
    (
        nvfp4(**{"x.weight_scale": SCALES[:160, :6].clone()}),
        r"scale has the shape \[160, 6\], and x.weight .* \[256, 8\]",
    ),
    (
        nvfp4(**{"x.weight_scale": SCALES[:128].clone()}),
        r"\[128, 8\], and x.weight \(nvfp4\) needs \[256, 8\], in tiles",
    ),
    (nvfp4(**{"x.weight_scale": SCALES[0].clone()}), r"has the shape \[8\]"),
    (nvfp4(**{"x.weight": torch.zeros(160, 42, dtype=torch.uint8)}), "rows of 84 are no whole number of groups of 16"),
    (
        nvfp4(**{"x.alpha": None}),
        "x.weight is NVFP4, and there is no x.weight_global_scale, nor both of x.alpha and x.in",
    ),
    (nvfp4(**{"x.alpha": torch.ones(2)}), r"x.alpha is float32 \[2\], and x.weight needs one number"),
    (nvfp4(**{"x.alpha": torch.ones(1, dtype=torch.int32)}), "x.alpha is int32"),
    (nvfp4(**{"x.alpha": ONE * 0}), r"x.alpha \* x.input_global_scale makes no scale"),
    (nvfp4(**{"x.alpha": ONE * float("inf")}), "makes no scale: the file is damaged"),
    (nvfp4("global", **{"x.weight_global_scale": ONE * 0}), "x.weight_global_scale makes no scale"),
    (nvfp4(**{"x.weight_scale": ZERO}), "x.weight_scale holds a scale of zero for codes"),
    (nvfp4(**{"x.weight_scale": NAN}), "x.weight_scale holds infinite or NaN"),
    (nvfp4("comfy", **{"x.weight_scale_2": None}), "x.weight is nvfp4, by x.comfy_quant, and has no x.weight_scale_2"),
    (nvfp4("comfy", **{"x.weight_scale": None}), "and has no x.weight_scale"),
    (nvfp4("comfy", **{"x.comfy_quant": None}), r"x.weight \(uint8, with x.\w+\) is quantised in an unknown way; fp8"),
    (nvfp4("comfy", **{"x.weight_scale": torch.ones(256, 8)}), "float32 scales, and nvfp4 has float8_e4m3fn"),
    (nvfp4("comfy", **{"x.comfy_quant": TURNED}), "nvfp4 with 'convrot': True, which is not known"),
    (nvfp4("comfy", **{"x.comfy_quant": WIDER}), "'group_size': 32, which is not known"),
    (nvfp4("comfy", **{"x.pre_quant_scale": torch.ones(96)}), "x.pre_quant_scale is part of an unknown way"),
    (mx(96, 4), "x.weight may be mxfp8 or mxfp6"),
    (mx(192, 4), r"shape \[256, 4\], which fits x.weight in no MX format: mxfp8 needs \[256, 8\], mxfp6"),
    (mx(384, 12) | {"x.weight_scale": BAD}, "infinite or NaN"),
]


@pytest.mark.parametrize("tensors, match", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(tmp_path, tensors, match):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SwanError, match=match) as error:
        source = open_source(tmp_path / "a.safetensors")
        check_scales(source)
        source.read("x.weight")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


# Models


def quantised(weight, kind, maker, name):
    """A matrix in a format: rounded to the nearest code, by a table."""
    exponent_bits, mantissa_bits, bits, group = CODES[kind]
    numbers = torch.tensor([value(code, exponent_bits, mantissa_bits) for code in range(1 << bits - 1)])
    numbers = numbers[: 0x7F if bits == 8 else None]
    grouped = weight.float().unflatten(1, (-1, group))
    largest = grouped.abs().amax(-1)
    whole = float(largest.amax() / (448 * 6))
    if kind == "nvfp4":
        scales = (largest / 6 / whole).to(torch.float8_e4m3fn)
        codes_of_scales, steps = scales.view(torch.uint8), scales.float() * whole
    else:
        exponents = torch.where(largest > 0, torch.log2(largest / numbers[-1]).ceil(), 0)
        codes_of_scales = (exponents + 127).to(torch.uint8)
        steps = 2.0 ** (codes_of_scales.float() - 127)
    sizes = (grouped / steps.unsqueeze(-1)).abs().nan_to_num(0)  # of a block of zeros
    middles = (numbers[1:] + numbers[:-1]) / 2
    lower, upper = torch.bucketize(sizes, middles), torch.bucketize(sizes, middles, right=True)
    nearest = torch.where(lower % 2 == 0, lower, upper)  # of two that are as near, the even one
    codes = nearest + (grouped < 0) * (1 << bits - 1)
    return stored(kind, maker, codes.flatten(1).numpy(), codes_of_scales.numpy(), whole, name)


def quantised_file(state, kind, maker, path):
    """A transformer's file with its blocks' matrices so stored."""
    tensors = {}
    for name, weight in state.items():
        is_matrix = weight.ndim == 2 and "blocks." in name and name.endswith(".weight")
        tensors |= quantised(weight, kind, maker, name.removesuffix(".weight")) if is_matrix else {name: weight}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind, maker", [("nvfp4", "alpha"), ("mxfp6", "lightx2v")])
def test_a_video_of_packed_weights_is_that_of_the_same_weights_dequantised(kind, maker, tmp_path):
    official = open_source(f"{load_task('t2v-tiny').checkpoint}/diffusion_pytorch_model.safetensors")
    state = {name: official.read(name) for name in official.keys()}
    packed = quantised_file(state, kind, maker, tmp_path / "dit.safetensors")
    source = open_source(packed)
    dense = {name: source.read(name) for name in source.keys()}
    save_file(dense, tmp_path / "dense.safetensors")
    name, latents = "blocks.3.ffn.2.weight", []
    assert 0 < (dense[name] - state[name]).norm() < 0.13 * state[name].norm()
    request = {"prompt": "a red circle moving right", "seed": 5, "sample_steps": 2, "frame_num": 5, "size": "32*32"}
    for path, mode in ((packed, "stream"), (tmp_path / "dense.safetensors", "auto")):
        with Engine(task="t2v-tiny", dit=str(path), gguf_mode=mode) as engine:
            latents.append(engine.generate(**request).latents)
    assert torch.equal(*latents)


@pytest.mark.parametrize("kind, maker", [("nvfp4", "comfy"), ("mxfp4", "lightx2v"), ("mxfp8", "comfy")])
def test_a_transformer_computes_alike_packed_and_dequantised(kind, maker, tmp_path):
    torch.manual_seed(0)
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=192, num_heads=2, ffn_dim=384)
    path = quantised_file(dit_state(spec), kind, maker, tmp_path / "dit.safetensors")
    x, text = torch.randn(1, 16, 2, 4, 4), [torch.randn(5, spec.dit.text_dim)]
    made = []
    for stream in (True, False):
        with torch.device("meta"):
            model = WanModel(**spec.dit)
        load_weights(model, open_source(path), "dit", dtype=torch.bfloat16, stream=stream)
        assert any(isinstance(layer, QuantLinear) for layer in model.modules()) == stream
        with torch.no_grad():
            made.append(model(x, torch.tensor([500.0]), text))
    assert torch.equal(*made) and made[0].isfinite().all()


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_what_is_written_is_comfyuis(kind, tmp_path, capsys):
    """Each tensor as the formulas above have it, rounded to the nearest code; the folder is taken as any other."""
    torch.manual_seed(0)
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=192, num_heads=2, ffn_dim=160)
    spec.text.update(dim_ffn=64)
    checkpoint, output = write_checkpoint(tmp_path / "in", spec), tmp_path / "out"
    official = load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    official["blocks.0.ffn.0.weight"][5, 16:80] = 0
    save_file(official, checkpoint / "diffusion_pytorch_model.safetensors")
    arguments = ["--to", kind, "--checkpoint-dir", checkpoint, "--output-dir", output, "--dtype", "float32", "--quiet"]
    assert convert(list(map(str, arguments))) == 0
    made = load_file(output / "diffusion_pytorch_model.safetensors")
    told = [name for name in made if name.endswith(".comfy_quant")]
    assert len(told) == 20 and json.loads(capsys.readouterr().out)["quantized"] == 27
    for name in (name.removesuffix(".comfy_quant") for name in told):
        wanted = quantised(official[f"{name}.weight"], kind, "comfy", name)
        wanted.pop(f"{name}.input_scale", None)
        for one, tensor in wanted.items():
            assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (made[one], tensor))), one
    files = locate(output, spec)
    source = open_source(files.dit["model"])
    error = source.read("blocks.0.ffn.0.weight") - official["blocks.0.ffn.0.weight"]
    assert (error[5, 16:80] == 0).all() and 0 < error.norm() < 0.13 * official["blocks.0.ffn.0.weight"].norm()
    assert open_source(files.t5).block_type("blocks.0.ffn.fc1.weight").name == kind
    with torch.device("meta"):
        model = WanModel(**spec.dit)
    load_weights(model, source, "dit", stream=True)


def test_rounding_of_ties_and_of_what_has_no_groups(tmp_path):
    row = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 0]) * 448
    codes, scales, whole = quantize_nvfp4(row.unsqueeze(0))
    assert (scales.float(), whole) == (448, 1)
    assert codes.tolist() == [[7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0]]
    codes, scales = quantize_mxfp8(torch.tensor([[448.0, *[1.0] * 31], [449.0, *[1.0] * 31], [0.0] * 32]))
    assert scales.tolist() == [[127], [128], [127]] and codes.float()[:2, 0].tolist() == [448, 224]
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=56, num_heads=2)
    save_file(dit_state(spec), tmp_path / "dit.safetensors")
    for kind, group in (("nvfp4", 16), ("mxfp8", 32)):
        with pytest.raises(SwanError, match=f"rows of 56 weights are no whole number of groups of {group}"):
            export_folder({"dit": open_source(tmp_path / "dit.safetensors")}, tmp_path / "out", Form(kind))


def test_companions_in_another_file(tmp_path):
    """Shards need not keep a matrix and its scales together."""
    tensors = nvfp4("global")
    for index, name in enumerate(tensors):
        save_file({name: tensors[name]}, tmp_path / f"{index}.safetensors")
    merged, alone = open_source(tmp_path), join_scales(open_source(sorted(tmp_path.iterdir())))
    assert merged.keys() == ["x.weight"] and torch.equal(merged.read("x.weight"), alone.read("x.weight"))
