"""Weights in codes with scales beside them: fp8 and int8 of LightX2V, scaled fp8 of ComfyUI, affine codes of MLX."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from tests.dist.processes import run
from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state, write_checkpoint
from tests.unit.weight_helpers import DictSource
from wan.errors import SwanError, UsageError
from wan.models.dit import WanModel
from wan.models.encoders import load_text_encoder
from wan.models.vae import WanVAE
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.quant.rounding import quantize_affine, quantize_channels, quantize_nvfp4
from wan.weights.assign import check_weights, load_weights
from wan.weights.block_floats import tiled
from wan.weights.infer import check_dit, check_encoder
from wan.weights.locate import locate
from wan.weights.names import official_names
from wan.weights.scaled import check_scales, join_scales
from wan.weights.source import MergedSource, open_source
from wan.weights.write.folder import Form, export_folder

SPEC = shrunk("t2v-1.3B")
SPEC.dit.update(dim=64, num_heads=2, ffn_dim=128, num_layers=2)
SPEC.text.update(dim_ffn=64)
CODES = {"fp8": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


# Files


def random_codes(kind, *shape):
    values = torch.randint(-100, 100, shape) if kind == "int8" else torch.randn(shape) * 50
    return values.to(CODES[kind])


def random_scales(*shape):
    return torch.rand(shape) / 100 + 1e-3


def scaled_file(kind, layout, height=200, width=304):
    """(tensors, the fp32 weights they stand for); scales are laid out element by element."""
    codes = random_codes(kind, height, width)
    shape = {"tensor": (), "tensor1": (1,), "rows": (height, 1), "rows1": (height,)}
    shape = (shape | {"rows2": (1, height), "blocks": (2, 3)})[layout]
    scales = random_scales(*shape)
    numbers, spread = scales.numpy(), np.empty((height, width), np.float32)
    for row, column in np.ndindex(height, width):
        if layout == "blocks":
            spread[row, column] = numbers[row // 128, column // 128]
        else:
            spread[row, column] = numbers.flat[row if layout.startswith("rows") else 0]
    return {"x.weight": codes, "x.weight_scale": scales}, codes.float() * torch.from_numpy(spread)


def mlx_file(bits, group, dtype=torch.float32, height=24, width=256):
    """The same for MLX: codes are put into words by Python's integers."""
    values = np.random.default_rng(0).integers(0, 1 << bits, (height, width))
    per_word = 32 // bits
    words = np.zeros((height, width // per_word), np.uint32)
    for row, column in np.ndindex(height, width):
        words[row, column // per_word] |= np.uint32(int(values[row, column]) << bits * (column % per_word))
    scales, biases = (torch.randn(height, width // group).to(dtype) / 50 for _ in range(2))
    tensors = {"x.weight": torch.from_numpy(words), "x.scales": scales, "x.biases": biases}
    every = [torch.from_numpy(np.repeat(one.float().numpy(), group, axis=1)) for one in (scales, biases)]
    return tensors, torch.from_numpy(values).float() * every[0] + every[1]


def mlx_config(folder, bits, group):
    (folder / "config.json").write_text(json.dumps({"quantization": {"bits": bits, "group_size": group}}))


SCALED = [
    (kind, layout) for kind in ("fp8", "int8") for layout in ("tensor", "tensor1", "rows", "rows1", "rows2", "blocks")
]
AFFINE = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
CASES = [*SCALED, ("e5m2", "tensor"), *AFFINE]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def stored(request, tmp_path):
    """(an opened file with one matrix x.weight, its weights)."""
    torch.manual_seed(0)
    first, second = request.param
    if isinstance(first, str):
        tensors, weights = scaled_file(first, second)
    else:
        dtype = torch.bfloat16 if second == 64 else torch.float32
        tensors, weights = mlx_file(first, second, dtype)
        mlx_config(tmp_path, first, second)
    save_file(tensors | {"x.bias": torch.ones(3)}, tmp_path / "a.safetensors")
    return open_source(tmp_path / "a.safetensors"), weights


def test_formula(stored):
    source, weights = stored
    assert sorted(source.keys()) == ["x.bias", "x.weight"] and source.is_quantized()
    assert (source.info("x.weight").shape, source.info("x.weight").dtype) == (tuple(weights.shape), torch.float32)
    assert torch.equal(source.read("x.weight"), weights)
    packed = source.packed("x.weight")
    assert packed.shape == tuple(weights.shape) and packed.blocks.shape[1] % 16 == 0
    assert packed.blocks.shape[1] == source.block_type("x.weight").row_bytes(weights.shape[1])
    assert torch.equal(packed.dequantize(torch.bfloat16), weights.bfloat16())  # rounded once
    assert torch.equal(packed.dequantize(torch.float16, reuse=True), weights.half())
    assert source.packed("x.bias") is None and source.block_type("x.bias") is None


def test_rows(stored):
    source, weights = stored
    for rows in ((0, 1), (3, 17), (5, 5), (len(weights) - 7, len(weights))):
        wanted, packed = weights[slice(*rows)], source.packed("x.weight", rows=rows)
        assert torch.equal(source.read("x.weight", rows), wanted)
        assert torch.equal(packed.dequantize(torch.bfloat16), wanted.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(stored, dtype):
    source, weights = stored
    packed, x = source.packed("x.weight"), torch.randn(5, weights.shape[1], dtype=dtype)
    layer = QuantLinear(packed, torch.nn.Parameter(torch.randn(len(weights), dtype=dtype), requires_grad=False))
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(layer(x), F.linear(x, weights.to(dtype), layer.bias))
    ids = torch.tensor([[3, 0], [3, 11]])
    assert torch.equal(QuantEmbedding(packed, dtype)(ids), F.embedding(ids, weights.to(dtype)))
    blocks = layer.blocks.clone()
    assert torch.equal(layer.to(torch.float16).blocks, blocks) and source.block_type("x.weight").name in repr(layer)


def test_comfy(tmp_path):
    """A scale under ComfyUI's name, its marker, a scale of activations; plain fp8 tensors are cast."""
    codes = random_codes("fp8", 8, 16)
    tensors = {"x.weight": codes, "x.scale_weight": torch.tensor(0.5), "x.scale_input": torch.tensor(2.0)}
    tensors |= {"y.weight": codes.clone(), "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    check_scales(source)
    assert set(official_names(source.keys(), "dit")) == {"x.weight", "y.weight"}
    assert torch.equal(source.read("x.weight"), codes.float() / 2)
    assert source.packed("y.weight") is None and torch.equal(source.read("y.weight").float(), codes.float())


def test_plain_fp8_is_cast():
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in dit_state(SPEC).items()}
    model = load(DictSource(state), stream=True, dtype=torch.float32)
    name = "blocks.1.ffn.0.weight"
    assert torch.equal(model.state_dict()[name], state[name].float())


def test_scales_in_another_file(tmp_path):
    """Shards of an index are opened one by one, and a matrix need not lie beside its scale."""
    tensors, weights = scaled_file("int8", "rows")
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "m.safetensors.index.json", sorted(tmp_path.glob("x*.safetensors"))):
        source = open_source(path)
        check_scales(source)
        assert source.keys() == ["x.weight"] and torch.equal(source.read("x.weight", (7, 9)), weights[7:9])


def test_pth(tmp_path):
    tensors, weights = scaled_file("fp8", "rows")
    torch.save(tensors, tmp_path / "a.pth")
    assert torch.equal(open_source(tmp_path / "a.pth").read("x.weight"), weights)


def test_mlx_width_without_config(tmp_path):
    """Told by the shapes where only one way fits them."""
    both = "4 bits in groups of 64 or 8 bits in groups of 32"
    for bits, group, match in ((4, 32, None), (8, 128, None), (4, 64, both), (8, 32, both)):
        tensors, weights = mlx_file(bits, group)
        source = DictSource(tensors, str(tmp_path / "a.safetensors"))
        if match is None:
            assert torch.equal(join_scales(source).read("x.weight"), weights)
        else:
            with pytest.raises(SwanError, match=match):
                join_scales(source)


# Bad files


def fp8(**more):
    return {"x.weight": random_codes("fp8", 200, 304), "x.weight_scale": random_scales(200, 1), **more}


def mlx(**more):
    return mlx_file(4, 32)[0] | more


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"x.weight": random_codes("int8", 4, 8)}, "x.weight holds int8 codes, and there is no x.weight_scale"),
        ({"x.weight": mlx()["x.weight"]}, "x.weight holds uint32 codes, and there is no x.scales and x.biases"),
        ({"x.weight_scale": random_scales(4, 1)}, "x.weight_scale belongs to x.weight, which is not there"),
        (fp8(**{"x.scale_weight": random_scales(1)}), "x.weight has two scales, x.weight_scale and x.scale_weight"),
        (fp8(**{"x.weight_scale": random_scales(3, 3)}), r"x.weight_scale has the shape \[3, 3\], and x.weight needs"),
        (fp8(**{"x.weight_scale": torch.ones(200, 1, dtype=torch.int32)}), "x.weight_scale holds int32 scales"),
        (fp8(**{"x.weight": torch.zeros(200, 152, dtype=torch.uint8)}), r"x.weight \(uint8, with x.weight_scale\) is"),
        (fp8(**{"x.weight_global_scale": torch.ones(1)}), "x.weight_global_scale is part of an unknown way"),
        ({"x.qweight": torch.zeros(4, 8, dtype=torch.int32)}, "x.qweight is part of an unknown way of quantising; fp8"),
        ({"x.weight.quant_map": torch.ones(16)}, "x.weight.quant_map is part of an unknown way of quantising"),
        (mlx(**{"x.biases": random_scales(24, 4)}), "x.scales .* and x.biases differ in shape or type"),
        (mlx(**{"x.scales": random_scales(9, 8), "x.biases": random_scales(9, 8)}), "x.weight has 24 rows"),
        (mlx(**{"x.scales": random_scales(24, 7), "x.biases": random_scales(24, 7)}), "x.scales .* does not fit x.w"),
        (fp8(**{"x.weight_scale": torch.zeros(200, 1)}), "x.weight_scale holds a scale of zero"),
        (fp8(**{"x.weight_scale": torch.full((200, 1), float("nan"))}), "x.weight_scale holds infinite or NaN"),
        (mlx(**{"x.biases": torch.full((24, 8), float("inf"))}), "x.biases holds infinite or NaN numbers"),
        (
            {"blocks.0.x.weight": fp8()["x.weight"], "blocks.0.x.weight_scale": random_scales(200, 1)}
            | {"blocks.1.x.weight": fp8()["x.weight"]},
            "blocks.1.x.weight is fp8 without a scale, and blocks.0.x.weight has one",
        ),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, tensors, match):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SwanError, match=match) as error:
        source = open_source(tmp_path / "a.safetensors")
        check_scales(source)
        source.read("x.weight")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bits, group, match", [(6, 64, "MLX's 6 bits in groups of 64, by config"), (8, 64, "does not fit")]
)
def test_mlx_config_that_does_not_fit(tmp_path, bits, group, match):
    save_file(mlx(), tmp_path / "a.safetensors")
    mlx_config(tmp_path, bits, group)
    with pytest.raises(SwanError, match=match):
        open_source(tmp_path / "a.safetensors")


def test_checked_before_work():
    """By the checks of a pipeline, which read nothing, and by those of loading."""
    name, twin = "blocks.0.ffn.0.weight", "blocks.1.ffn.0.weight"
    lost = dit_state(SPEC) | {name: random_codes("int8", 128, 64)}
    with pytest.raises(SwanError, match=f"{name} holds int8 codes"):
        check_dit(DictSource(lost), SPEC)
    with pytest.raises(SwanError, match="blocks.0.attn.q.weight holds int8"):
        check_encoder(DictSource(t5_state(SPEC) | {"blocks.0.attn.q.weight": random_codes("int8", 32, 32)}), "t5", SPEC)
    with torch.device("meta"):
        model = WanModel(**SPEC.dit)
    codes = {name: random_codes("fp8", 128, 64), twin: random_codes("fp8", 128, 64)}
    with pytest.raises(SwanError, match=f"{twin} is fp8 without a scale"):
        scales = {f"{name}_scale": random_scales(128, 1)}
        check_weights(model, join_scales(DictSource(dit_state(SPEC) | codes | scales)), "dit")


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels(dtype):
    weights = torch.randn(33, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights[5], weights[6] = 0, weights[6] * 1e-30
    wanted = weights.float()
    for name, largest in (("int8", 127), ("fp8", 448)):
        codes, scales = quantize_channels(weights, name)
        amax = wanted.abs().amax(1, keepdim=True)
        assert torch.equal(scales, torch.where(amax > 0, amax / largest, 1.0)) and scales.dtype == torch.float32
        error = (codes.float() * scales - wanted).abs()
        step = scales / 2 if name == "int8" else torch.maximum(wanted.abs() / 16, scales / 1024)
        assert (error <= step * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits, group", AFFINE)
def test_affine(bits, group, dtype):
    weights = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    weights[0], weights[1], weights[2], weights[3] = 0, 0.3, weights[2].abs() + 5, -weights[3].abs()
    codes, scales, biases = quantize_affine(weights, bits, group, dtype)
    assert codes.dtype == torch.uint32 and codes.shape == (16, 256 * bits // 32)
    assert scales.dtype == biases.dtype == dtype and scales.all()
    numbers = codes.view(torch.uint8)
    if bits == 4:
        numbers = torch.stack((numbers % 16, numbers // 16), -1).flatten(1)
    steps, offsets = (one.float().repeat_interleave(group, 1) for one in (scales, biases))
    error = (numbers.float() * steps + offsets - weights).abs()
    assert (error <= steps / 2 * (1 + 1e-3) + 1e-6).all()  # half a step, whatever the scales were rounded to
    spread = weights.unflatten(1, (-1, group))
    exact = (spread.amax(-1) - spread.amin(-1)) / ((1 << bits) - 1)
    assert (scales.float()[4:] <= exact[4:] * 1.05).all()


def test_no_infinities():
    weights = torch.ones(4, 64)
    weights[1, 3] = float("inf")
    for quantise in (lambda: quantize_channels(weights, "fp8"), lambda: quantize_affine(weights, 4, 32, torch.float32)):
        with pytest.raises(ValueError, match="not finite"):
            quantise()
    with pytest.raises(ValueError, match="float16 cannot hold its scales"):
        quantize_affine(torch.randn(4, 64) * 1e6, 4, 32, torch.float16)


# Folders


FORMS = {
    "fp8": Form("fp8", torch.float32),
    "int8": Form("int8", torch.float32),
    "mlx4": Form("mlx", torch.float32, 4, 32),
    "mlx8": Form("mlx", torch.float32, 8, 64),
    "mlx": Form("mlx", torch.float32),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SPEC)


@pytest.fixture(scope="module", params=FORMS)
def folder(request, checkpoint, tmp_path_factory):
    """(what it was written as, the folder written from `checkpoint`)."""
    form, output = FORMS[request.param], tmp_path_factory.mktemp("out") / request.param
    files = locate(checkpoint, SPEC)
    parts = {"dit": open_source(files.dit["model"]), "t5": open_source(files.t5), "vae": open_source(files.vae)}
    quantization = {"quantization": {"bits": form.bits, "group_size": form.group}} if form.bits else {"dim": 64}
    report = export_folder(parts, output, form, copies={SPEC.files.tokenizer: files.tokenizer}, config=quantization)
    assert report["quantized"] == {"mlx4": 20, "mlx8": 20, "mlx": 0}.get(request.param, 27)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return form, output


def load(source, stream, **options):
    with torch.device("meta"):
        model = WanModel(**SPEC.dit)
    return load_weights(model, source, "dit", stream=stream, **options)


def predict(model):
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, 7, 32)))
    with torch.inference_mode():
        return model(x, torch.tensor([500]), text)


def test_written_and_read(folder, checkpoint):
    """Every tensor is the original's, to within the rounding of its form."""
    form, output = folder
    found, was = locate(output, SPEC), locate(checkpoint, SPEC)
    for component, paths, old in (
        ("dit", found.dit["model"], was.dit["model"]),
        ("t5", found.t5, was.t5),
        ("vae", found.vae, was.vae),
    ):
        made, original = open_source(paths), open_source(old)
        check_scales(made)
        names, old_names = (official_names(one.keys(), component) for one in (made, original))
        assert names.keys() == old_names.keys()
        for ours, name in names.items():
            weights, wanted = made.read(name), original.read(old_names[ours]).float()
            scheme, weights = made.block_type(name), weights.reshape(wanted.shape)
            if scheme is None:
                assert torch.equal(weights, wanted), ours
                continue
            amax = wanted.abs().amax(1, keepdim=True)
            step = {"fp8": wanted.abs() / 16 + amax / 448 / 1024, "int8": amax / 254}.get(form.format)
            if form.format == "mlx":
                groups = wanted.unflatten(1, (-1, form.group))
                step = (groups.amax(-1) - groups.amin(-1)).repeat_interleave(form.group, 1) / ((1 << form.bits) - 1) / 2
            assert ((weights - wanted).abs() <= step * (1 + 1e-4) + 1e-7).all(), ours


def test_conventions(folder):
    """Names, types and shapes as other programs expect them, by the safetensors package."""
    form, output = folder
    is_mlx = form.format == "mlx"
    path = output / ("model.safetensors" if is_mlx else "diffusion_pytorch_model.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if is_mlx:
        assert tensors["patch_embedding_proj.weight"].shape == (64, 64) and "time_embedding_1.bias" in tensors
        kernel = safe_open(output / "vae.safetensors", "pt").get_tensor("decoder.conv1.weight")
        assert kernel.shape[1:] == (3, 3, 3, 16)
        text = safe_open(output / "t5_encoder.safetensors", "pt").keys()
        assert "blocks.0.ffn.gate_proj.weight" in text and "token_embedding.weight" in text
        if form.bits:
            assert tensors["blocks.1.ffn.fc2.weight"].shape == (64, 128 * form.bits // 32)
            assert tensors["blocks.1.ffn.fc2.weight"].dtype == torch.uint32
            assert tensors["blocks.1.ffn.fc2.scales"].shape == tensors["blocks.1.ffn.fc2.biases"].shape
            assert tensors["blocks.1.ffn.fc2.scales"].shape == (64, 128 // form.group)
            quantised = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
            wanted = {f"{one}_attn.{part}" for one in ("self", "cross") for part in "qkvo"} | {"ffn.fc1", "ffn.fc2"}
            assert {re.sub(r"^blocks\.\d\.", "", name) for name in quantised} == wanted
        return
    dtype = CODES[form.format]
    coded = {name for name, tensor in tensors.items() if tensor.dtype == dtype}
    assert len(coded) == 20 and all(re.search(r"(self_attn|cross_attn)\.[qkvo]\.|ffn\.[02]\.", name) for name in coded)
    for name in coded:
        scale = tensors[f"{name}_scale"]
        assert scale.dtype == torch.float32 and scale.shape == (len(tensors[name]), 1)
    text = safe_open(output / f"models_t5_umt5-xxl-enc-{form.format}.safetensors", "pt")
    assert "blocks.0.ffn.gate.0.weight_scale" in text.keys() and "token_embedding.weight_scale" not in text.keys()


def test_packed_computes_what_dequantised_does(folder):
    form, output = folder
    files = locate(output, SPEC)
    for dtype in (torch.float32, torch.bfloat16):
        models = [load(open_source(files.dit["model"]), stream, dtype=dtype) for stream in (True, False)]
        packed = sum(isinstance(layer, QuantLinear) for layer in models[0].modules())
        assert packed == (20 if form.bits or form.format != "mlx" else 0)
        assert torch.equal(*map(predict, models))
    encoders = [
        load_text_encoder(open_source(files.t5), files.tokenizer, text_len=32, dtype=torch.float32, stream=stream)
        for stream in (True, False)
    ]
    assert any(isinstance(layer, QuantLinear) for layer in encoders[0].modules()) == (form.format != "mlx")
    assert torch.equal(*(encoder(["a cat"])[0] for encoder in encoders))


def nvfp4(weight, path):
    """As LightX2V stores it: the scales of all rows lie in tiles."""
    codes, scales, whole = quantize_nvfp4(weight)
    stored = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": tiled(scales),
        "weight_global_scale": 1 / whole,
    }
    return {f"{path}.{leaf}": tensor for leaf, tensor in stored.items()}


def predict_shared(path):
    from wan.distributed.fsdp import shard_model, weight_mesh

    mesh = weight_mesh("cpu", 2)
    model = load(open_source(path), True, shard=lambda model: shard_model(model, list(model.units().values()), mesh))
    kept = sum(one.to_local().nbytes for one in model.parameters())
    return {"made": predict(model), "kept": kept}


@pytest.mark.dist
def test_shared_out_among_ranks(checkpoint, tmp_path):
    """Each rank reads its own rows of codes and scales."""
    from wan.weights.scaled import ScaledSource

    source = open_source(locate(checkpoint, SPEC).dit["model"])
    tensors = {name: source.read(name) for name in source.keys()}
    for index in range(2):
        for name in (f"blocks.{index}.ffn.0.weight", f"blocks.{index}.ffn.2.weight"):
            tensors[name], tensors[f"{name}_scale"] = quantize_channels(tensors[name], "int8" if index else "fp8")
        for path in (f"blocks.{index}.{kind}_attn.{one}" for kind in ("self", "cross") for one in "qkvo"):
            if path.endswith("o"):
                tensors |= nvfp4(tensors[f"{path}.weight"], path)
                continue
            parts = quantize_affine(tensors[f"{path}.weight"], 4, 32, torch.float32)
            tensors |= dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts))
    save_file(tensors, tmp_path / "dit.safetensors")
    assert isinstance(open_source(tmp_path / "dit.safetensors"), ScaledSource)
    whole = load(open_source(tmp_path / "dit.safetensors"), True)
    wanted, total = predict(whole), sum(one.nbytes for one in whole.parameters())
    for one in run(2, predict_shared, tmp_path, tmp_path / "dit.safetensors"):
        assert torch.allclose(one["made"], wanted, atol=1e-5) and one["kept"] < 0.55 * total


# Writing


def parts_of(state):
    return {"dit": DictSource(state)}


def test_whole_or_not_at_all(tmp_path):
    state = dit_state(SPEC)
    state["blocks.1.ffn.2.weight"][3, 4] = float("nan")
    with pytest.raises(SwanError, match="tensor blocks.1.ffn.2.weight: it holds values that are not finite"):
        export_folder(parts_of(state), tmp_path / "out", FORMS["fp8"])
    assert not list(tmp_path.iterdir())

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(parts_of(dit_state(SPEC)), tmp_path / "out", FORMS["int8"], on_progress=interrupt)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SwanError, match="blocks.1.norm3.bias: float16 cannot hold its largest value"):
        state = dit_state(SPEC) | {"blocks.1.norm3.bias": torch.full((64,), 1e6)}
        export_folder(parts_of(state), tmp_path / "out", Form("int8", torch.float16))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    state = dit_state(SPEC)
    with pytest.raises(SwanError, match="rows of 64 weights are no whole number of groups of 128; take a smaller"):
        export_folder(parts_of(state), tmp_path / "out", Form("mlx", torch.float32, 4, 128))
    with pytest.raises(SwanError, match="incomplete, block 1 has no ffn.2.weight"):
        del state["blocks.1.ffn.2.weight"]
        export_folder(parts_of(state), tmp_path / "out", FORMS["int8"])
    with pytest.raises(SwanError, match="does not hold the t5"):
        export_folder({"t5": DictSource(dit_state(SPEC))}, tmp_path / "out", FORMS["int8"])
    assert not list(tmp_path.iterdir())


def test_only_such_a_folder_is_replaced(tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty one is taken
    export_folder(parts_of(dit_state(SPEC)), output, FORMS["int8"])
    with pytest.raises(UsageError, match="is not empty; --overwrite"):
        export_folder(parts_of(dit_state(SPEC)), output, FORMS["int8"])
    before = (output / "diffusion_pytorch_model.safetensors").read_bytes()
    export_folder(parts_of(dit_state(SPEC)), output, FORMS["int8"], replace=True)
    assert (output / "diffusion_pytorch_model.safetensors").read_bytes() != before  # other random weights
    (output / "thesis.doc").touch()
    with pytest.raises(UsageError, match=r"holds other things as well \(thesis.doc\)"):
        export_folder(parts_of(dit_state(SPEC)), output, FORMS["int8"], replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_written_in_pieces():
    """Only one tensor of the source is asked for at a time, and each once."""
    from wan.weights.write.folder import plan_part

    plan = plan_part(DictSource(dit_state(SPEC)), "dit", FORMS["fp8"])
    assert len({entry.stored for entry in plan}) == len(plan) == len(dit_state(SPEC))


# Names and places


def test_saved_tables_of_mlx_are_left_out(tmp_path, folder):
    form, output = folder
    if form.format != "mlx":
        pytest.skip("not of mlx-video")
    with safe_open(output / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors | {"freqs": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    if form.bits:
        mlx_config(tmp_path, form.bits, form.group)
    check_dit(open_source(tmp_path / "model.safetensors"), SPEC)
    assert torch.equal(*(predict(load(open_source(one / "model.safetensors"), True)) for one in (tmp_path, output)))


def test_layouts_of_lightx2v(tmp_path, checkpoint):
    """A file for each block; the text encoder in fp8; an index under another name."""
    root = tmp_path / "model"
    root.mkdir()
    for name in ("block_0", "block_1", "non_block", "models_t5_umt5-xxl-enc-fp8"):
        save_file({f"{name}.bias": torch.ones(1)}, root / f"{name}.safetensors")
    overrides = {"vae": checkpoint / SPEC.files.vae, "tokenizer": checkpoint / SPEC.files.tokenizer}
    files = locate(root, SPEC, overrides)
    assert [path.stem for path in files.dit["model"]] == ["block_0", "block_1", "non_block"]
    assert isinstance(open_source(files.dit["model"]), MergedSource)
    assert [path.stem for path in files.t5] == ["models_t5_umt5-xxl-enc-fp8"]
    (root / "models_t5_umt5-xxl-enc-int8.pth").touch()
    with pytest.raises(SwanError, match="cannot tell which of .*fp8.safetensors, .*int8.pth"):
        locate(root, SPEC, overrides)
    (root / "wan_fp8.safetensors.index.json").touch()
    files = locate(root, SPEC, overrides | {"t5": root / "models_t5_umt5-xxl-enc-int8.pth"})
    assert [path.name for path in files.dit["model"]] == ["wan_fp8.safetensors.index.json"]


def test_a_folder_of_mlx_video_with_the_vae_of_wan22(tmp_path):
    """By the names of its own code, and read back, by the folder's whole task."""
    spec = shrunk("ti2v-5B")
    found = locate(write_checkpoint(tmp_path / "in", spec), spec)
    parts = {"dit": open_source(found.dit["model"]), "t5": open_source(found.t5), "vae": open_source(found.vae)}
    export_folder(parts, tmp_path / "mlx", Form("mlx", torch.float32), copies={spec.files.tokenizer: found.tokenizer})
    with safe_open(tmp_path / "mlx/vae.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    was = parts["vae"]

    def theirs(name):  # their rules, in their order
        for index in "0236":
            name = name.replace(f".residual.{index}.", f".residual.layer_{index}.")
        for index in "02":
            name = name.replace(f".head.{index}.", f".head.layer_{index}.")
        for old, new in ((".resample.1.", ".resample_"), (".to_qkv.", ".to_qkv_"), (".proj.", ".proj_")):
            name = name.replace(old, new)
        return name

    assert shapes.keys() == {theirs(name) for name in was.keys()}
    for name in was.keys():
        shape, held = list(was.info(name).shape), shapes[theirs(name)]
        if name.endswith("gamma"):
            assert held == [shape[0]]
        else:
            assert held == ([shape[0], *shape[2:], shape[1]] if name.endswith("weight") else shape)
    made = locate(tmp_path / "mlx", spec)
    for component, paths in (("dit", made.dit["model"]), ("vae", made.vae)):
        source, old = open_source(paths), parts[component]
        for ours, name in official_names(source.keys(), component).items():
            wanted = old.read(ours)
            assert torch.equal(source.read(name).reshape(wanted.shape), wanted)
    videos = []
    for source in (was, open_source(made.vae)):
        with torch.device("meta"):
            vae = WanVAE(**spec.vae)
        load_weights(vae, source, "vae", dtype=torch.float32)
        with torch.no_grad():
            videos.append(vae.decode(torch.ones(1, 48, 2, 2, 2)))
    assert torch.equal(*videos)
