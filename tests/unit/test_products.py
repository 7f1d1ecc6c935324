"""Products in 8 bits, --matmul: their arithmetic on the CPU, where tests say that its units work, and what is asked for
and refused. No GPU runs here."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.unit.test_schemes import SPEC
from tests.unit.tiny_checkpoint import dit_state
from tests.unit.weight_helpers import DictSource
from wan import Engine
from wan.cli import main
from wan.compat.lightx2v.translate import translate
from wan.convert import main as convert
from wan.errors import UsageError
from wan.models.dit import WanModel
from wan.quant import products
from wan.quant.linear import QuantLinear, multiply_in_8_bits, project
from wan.quant.products import Rounded, choose_products, is_product, quantize_tokens, scaled_product
from wan.quant.rounding import quantize_channels
from wan.quant.schemes import Scheme
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.assign import load_weights
from wan.weights.scaled import join_scales

BF16 = torch.bfloat16
NAMES = ("fp8", "int8")


@pytest.fixture
def units(monkeypatch):
    """This CPU passes for a device with the units. Gives the inputs that were rounded."""
    seen = []
    monkeypatch.setattr(products, "works", lambda name, device: True)
    monkeypatch.setattr(
        products, "quantize_tokens", lambda tokens, kind: seen.append(tokens) or quantize_tokens(tokens, kind)
    )
    return seen


def packed(name, rows=48, columns=64, seed=0):
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_channels(weights, name)
    source = join_scales(DictSource({"x.weight": codes, "x.weight_scale": scales}))
    return weights, source.packed("x.weight")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_product(units, monkeypatch, name, has_bias):
    """Of tokens by slices, the last of which is never too short."""
    monkeypatch.setattr(products, "_SLICE_SUMS", 20 * 48)
    weights, weight = packed(name)
    x = torch.randn(2, 19, 64, dtype=BF16, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(48, dtype=BF16) if has_bias else None
    with torch.inference_mode():
        made = scaled_product(Rounded(x), weight, bias)
    codes, scales = quantize_tokens(x.flatten(0, 1), name)
    exact = ((codes.float() * scales) @ weight.dequantize().t()).view(2, 19, 48) + (bias.float() if has_bias else 0)
    assert made.dtype == BF16 and (made.float() - exact).abs().max() < 0.02 * exact.abs().max()
    plain = F.linear(x.float(), weights, bias.float() if has_bias else None)
    assert (made.float() - plain).norm() < 0.06 * plain.norm()


def test_a_cpu_dequantises():
    layer = QuantLinear(packed("int8")[1])
    x = torch.randn(32, 64, dtype=BF16)
    with torch.inference_mode():
        plain = layer(x)
        layer.in_8_bits = True
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("what", ["fp16", "few tokens", "autograd"])
def test_what_is_dequantised_where_the_units_work(units, what):
    _, weight = packed("int8")
    x = torch.randn(16 if what == "few tokens" else 32, 64, dtype=torch.float16 if what == "fp16" else BF16)
    with torch.inference_mode(what != "autograd"):
        assert scaled_product(Rounded(x), weight, None) is None and not units


@pytest.mark.parametrize(
    "kind, shape",
    [
        (Scheme("int8", torch.int8, 64, rotation=64), (48, 64)),  # its rows have been turned
        (Scheme("int8", torch.int8, 32), (48, 64)),  # two scales a row
        (Scheme("fp8", torch.float8_e5m2, 64), (48, 64)),
        (Scheme("int8", torch.int8, 64), (40, 64)),
        (Scheme("affine8", torch.uint8, 64, has_offsets=True), (48, 64)),
        (None, (48, 64)),
    ],
)
def test_what_cannot_be_multiplied_so(kind, shape):
    assert not any(is_product(kind, shape, name) for name in NAMES)
    assert is_product(Scheme("int8", torch.int8, 64), (48, 64), "int8")


def test_one_input_is_rounded_once(units):
    layers = [QuantLinear(packed("int8", seed=seed)[1]) for seed in range(3)]
    x = torch.randn(32, 64, dtype=BF16)
    with torch.inference_mode():
        dense = torch.nn.Linear(64, 8, dtype=BF16)
        plain = [layer(x) for layer in (*layers, dense)]
        for layer in layers:
            layer.in_8_bits = True
        made = project(x, *layers, dense)
    assert len(units) == 1
    assert torch.equal(made[3], plain[3]) and not torch.equal(made[0], plain[0])
    for one, wanted in zip(made[:3], plain[:3]):
        assert (one - wanted).float().norm() < 0.05 * wanted.float().norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_model(units, name):
    state = dit_state(SPEC)
    for key in [key for key, one in state.items() if key.startswith("blocks.") and one.ndim == 2]:
        codes, scales = quantize_channels(state.pop(key), name)
        state |= {key: codes, f"{key.removesuffix('weight')}weight_scale": scales}
    with torch.device("meta"):
        model = WanModel(**SPEC.dit).eval()
    load_weights(model, join_scales(DictSource(state)), "dit", dtype=BF16, stream=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 3, 8, 8, generator=generator)
    text = torch.randn(1, SPEC.dit.text_len, SPEC.dit.text_dim, generator=generator)
    with torch.inference_mode():
        plain = model(x, torch.tensor([500]), text)
        multiply_in_8_bits(model, name)
        made = model(x, torch.tensor([500]), text)
    assert len(units) == 7 * SPEC.dit.num_layers  # of ten layers in a block
    assert 0 < (made - plain).norm() < 0.1 * plain.norm()


# What is asked for


STORED = {(Scheme("fp8", torch.float8_e4m3fn, 64), (48, 64)), (Scheme("fp8", torch.float8_e4m3fn, 48), (64, 48))}


def test_what_matmul_comes_to(monkeypatch, tmp_path):
    assert choose_products("fp8", "cuda:1", STORED) == ("fp8", [])
    assert choose_products("fp8", "cuda", None) == ("fp8", [])  # files that are not here yet
    assert choose_products("auto", "cpu", STORED) == choose_products("bf16", "cpu", STORED) == ("bf16", [])
    with pytest.raises(UsageError, match="^--matmul fp8 is for CUDA devices, not mps: leave it out"):
        choose_products("fp8", "mps", STORED)
    with pytest.raises(UsageError, match="^--matmul int8: no weights are stored in int8 .* --to int8 makes such"):
        choose_products("int8", "cuda", STORED)


@pytest.mark.parametrize(
    "table, chosen",
    [
        ({}, None),
        ({"48 x 64": 0.7}, None),  # the other shape was not measured
        ({"48 x 64": 0.7, "64 x 48": 0.9}, "fp8"),
        ({"48 x 64": 0.7, "64 x 48": 1.1}, "bf16"),
    ],
)
def test_auto_goes_by_what_was_measured(monkeypatch, tmp_path, table, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(products, "MEASURED", tmp_path / "products.json")
    products.MEASURED.write_text(json.dumps({"GPU": {"fp8": table}}))
    name, lines = choose_products("auto", "cuda", STORED)
    assert name == (chosen or "bf16")
    told = ["--matmul auto: 8-bit products were not measured on GPU, so weights are dequantised"]
    assert lines == ([] if chosen else told)


def test_the_table_that_comes_with_the_code_names_no_gpu_that_nobody_measured():
    assert json.loads(products.MEASURED.read_text()) == {}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--matmul", "fp4"], "unknown --matmul 'fp4'; choose one of: bf16, fp8, int8, auto"),
        (["--matmul", "fp8", "--dtype", "bf16", "--device", "cpu"], "fp8 is for CUDA devices, not --device cpu"),
        (
            ["--matmul", "fp8", "--dtype", "fp16"],
            "a CUDA device, and activations in bf16, not in --dtype fp16",
        ),
        (
            ["--matmul", "fp8"],
            "a CUDA device, and activations in bf16, not in --dtype fp32",
        ),  # the tiny task's
        (["--matmul", "int8", "--dtype", "bf16", "--gguf_mode", "resident"], "--matmul int8 multiplies weights as"),
        (["--matmul", "int8", "--dtype", "bf16", "--vram_gb", "8"], "int8: no weights are stored in int8 with a"),
    ],
)
def test_command_line(capsys, flags, message):
    assert main([*flags, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded checkpoint in int8."""
    output = tmp_path_factory.mktemp("int8") / "tiny"
    source = str(embedded_checkpoint(load_task("t2v-tiny")))
    assert convert(["--to", "int8", "--checkpoint-dir", source, "--output-dir", str(output)]) == 0
    return str(output)


def test_a_run_tells_what_it_multiplied(units, monkeypatch, folder):
    """An engine whose device passes for one that can."""
    monkeypatch.setattr("wan.file_checks.choose_products", lambda *asked: ("int8", []))
    sample = {"size": "32*48", "frame_num": 5, "sample_steps": 1, "sample_guide_scale": 1}
    with Engine(ckpt_dir=folder, task="t2v-tiny", dtype="bf16", device="cpu", matmul="auto") as engine:
        video = engine.generate(**sample)
    assert video.report["matmul"] == "int8" and units
    assert video.report["gguf_mode"]["model"] == "stream"


def test_the_plan_counts_codes_and_no_dequantised_matrix(capsys, folder):
    """On a GPU that is not here."""
    flags = ["--task", "t2v-tiny", "--ckpt_dir", folder, "--dtype", "bf16", "--vram_gb", "8", "--dry_run", "--json"]
    found = {}
    for name in ("bf16", "int8"):
        assert main([*flags, "--matmul", name, *(["--gguf_mode", "stream"] if name == "bf16" else [])]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["int8"]["placement"]["packed"]["model"] == "stream"
    dit = load_task("t2v-tiny").dit
    codes = products.working_bytes(found["int8"]["tokens"], dit.ffn_dim, "int8")
    more = 1.05 * (codes - 2 * dit.ffn_dim * dit.dim)
    denoise = {name: one["memory_bytes"]["denoise"]["device"] for name, one in found.items()}
    assert denoise["int8"] - denoise["bf16"] == pytest.approx(more, abs=2)
    assert products.working_bytes(1000, 64, "fp8") == 1000 * 68


@pytest.mark.parametrize("scheme, told", [("fp8-vllm", "fp8"), ("int8-q8f", "int8"), ("fp8", None), ("nvfp4", None)])
def test_schemes_of_lightx2v_name_what_multiplies(scheme, told):
    config = {"dit_quantized": True, "dit_quant_scheme": scheme, "dit_quantized_ckpt": "a.safetensors"}
    spec = load_task("t2v-14B")
    notes = [note for note in translate(config, spec=spec).notes if "matmul" in note]
    line = f"weights are dequantised; --matmul {told} multiplies in 8 bits, with kernels of torch"
    assert notes == ([f"dit_quant_scheme '{scheme}': {line}"] if told else [])
    assert not [note for note in translate(config, given={"matmul": "bf16"}, spec=spec).notes if "matmul" in note]
