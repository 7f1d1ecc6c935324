"""Checkpoints written as GGUF: what becomes of each tensor, and that other readers agree with what is in the file."""

import json
import math
import shutil
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.tiny_checkpoint import clip_state, dit_state, shrunk, t5_state
from tests.unit.weight_helpers import DictSource, ShapeSource, manifest
from wan.errors import SwanError
from wan.models.vae import WanVAE
from wan.quant.ggml import BY_NAME
from wan.quant.quantize import quantize
from wan.weights.names import official_names
from wan.weights.source import open_source
from wan.weights.write import export
from wan.weights.write.export import export_gguf, make_metadata, plan_tensors, write_header
from wan.weights.write.recipes import RECIPES

# Root of the mean squared error over the standard deviation of normal weights, rounded up.
ERROR = {"F32": 0, "F16": 3e-4, "BF16": 3e-3, "Q8_0": 6e-3, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.045}
ERROR |= {"Q4_K": 0.075, "Q4_1": 0.085, "Q4_0": 0.095, "Q3_K": 0.16, "Q2_K": 0.32, "IQ4_NL": 0.08, "IQ4_XS": 0.08}

DITS = ["t2v-1.3B", "t2v-14B", "t2v-A14B", "i2v-14B", "i2v-A14B", "flf2v-14B", "ti2v-5B"]
DITS += ["vace-1.3B", "vace-14B", "s2v-14B", "animate-14B"]


def small_spec():
    """Wide enough for blocks of 256 weights."""
    spec = shrunk("t2v-14B")
    spec.dit.update(dim=256, ffn_dim=512, freq_dim=256, text_dim=256, num_heads=2)
    spec.text.update(vocab=512, dim=256, dim_attn=256, dim_ffn=512)
    return spec


def small_dit(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape).mul(0.05).to(dtype) for name, tensor in dit_state(small_spec()).items()}


def small_t5(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return {name: tensor.to(dtype) for name, tensor in t5_state(small_spec()).items()}


def plan(shapes, type_name):
    return plan_tensors(ShapeSource(shapes), RECIPES[type_name])


def planned_types(tensors, type_name="Q4_K_M"):
    return {one.name: one.type.name for one in plan_tensors(DictSource(tensors), RECIPES[type_name])}


def histogram(planned):
    return Counter(one.type.name for one in planned)


def refused(tensors, output, match, type_name="Q4_K_M"):
    with pytest.raises(SwanError, match=match) as error:
        export_gguf(DictSource(tensors), output / "out.gguf", type_name)
    assert "\n" not in str(error.value) and not list(output.iterdir())


# Recipes


@pytest.mark.parametrize(
    "name, tensors, quantised",
    [
        ("t2v-1.3B", 825, 300),
        ("ti2v-5B", 825, 300),
        ("t2v-14B", 1095, 400),
        ("i2v-A14B", 1095, 400),
        ("i2v-14B", 1303, 480),
        ("flf2v-14B", 1304, 480),
        ("vace-14B", 1331, 489),
        ("s2v-14B", 1260, 400),
        ("animate-14B", 1441, 480),
        ("umt5-xxl", 242, 169),
    ],
)
@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q8_0", "IQ4_XS"])
def test_counts_of_released_files(name, tensors, quantised, type_name):
    planned = plan(manifest(name), type_name)
    assert (len(planned), sum(one.type.torch_dtype is None for one in planned)) == (tensors, quantised)


@pytest.mark.parametrize(
    "type_name, types",
    [
        ("Q8_0", {"Q8_0": 400}),
        ("Q5_K_M", {"Q5_K": 280, "Q6_K": 120}),
        ("Q4_K_M", {"Q4_K": 280, "Q6_K": 120}),
        ("Q4_K_S", {"Q4_K": 356, "Q5_K": 44}),
        ("Q4_K", {"Q4_K": 400}),
        ("Q3_K_M", {"Q3_K": 280, "Q4_K": 118, "Q5_K": 2}),
        ("Q3_K_S", {"Q3_K": 400}),
        ("Q2_K", {"Q2_K": 320, "Q3_K": 80}),
        ("Q5_0", {"Q5_0": 360, "Q5_1": 40}),
        ("Q4_0", {"Q4_0": 360, "Q4_1": 40}),
    ],
)
def test_mixtures(type_name, types):
    found = histogram(plan(manifest("t2v-14B"), type_name))
    assert {key: value for key, value in found.items() if key not in ("F32", "BF16")} == types
    assert found["F32"] + found["BF16"] == 695


def test_early_value_projections():
    types = {one.name: one.type.name for one in plan(manifest("vace-14B"), "Q4_K_S") if ".v." in one.name}
    assert sorted(name for name, kind in types.items() if kind == "Q5_K") == [
        *(f"blocks.{block}.{one}.v.weight" for block in (0, 1) for one in ("cross_attn", "self_attn"))
    ]


def test_image_value_projections_are_no_value_projections():
    """So it is in the files in the wild: the rule goes by `.v.weight`."""
    types = {one.name: one.type.name for one in plan(manifest("i2v-14B"), "Q4_K_M")}
    assert types["blocks.3.cross_attn.v.weight"] == "Q6_K" and types["blocks.3.cross_attn.v_img.weight"] == "Q4_K"


@pytest.mark.parametrize(
    "type_name, table, matrix, v",
    [
        ("Q4_K_M", "Q6_K", "Q4_K", "Q6_K"),
        ("Q4_K", "Q4_K", "Q4_K", "Q4_K"),
        ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
        ("F16", "F16", "F16", "F16"),
    ],
)
def test_text_encoder_types(type_name, table, matrix, v):
    types = planned_types(small_t5(), type_name)
    assert types["token_embd.weight"] == table
    assert types["enc.blk.0.attn_q.weight"] == matrix and types["enc.blk.0.attn_v.weight"] == v
    assert types["enc.blk.0.attn_norm.weight"] == types["enc.blk.0.attn_rel_b.weight"] == "F32"


def test_what_is_not_quantised():
    fixed = {"patch_embedding.weight", "blocks.0.modulation", "head.modulation", "blocks.1.ffn.0.bias"}
    fixed |= {"blocks.0.self_attn.norm_q.weight", "blocks.0.norm3.weight"}
    for dtype, kept in [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F16")]:
        types = planned_types(small_dit(dtype))
        assert {types[name] for name in fixed} == {"F32"}
        for name in ("text_embedding.0.weight", "time_projection.1.weight", "head.head.weight"):
            assert types[name] == kept
    assert set(planned_types(small_dit(), "F32").values()) == {"F32"}
    assert set(planned_types(small_dit(torch.float32), "BF16").values()) == {"F32", "BF16"}


def test_rows_that_are_no_whole_blocks_stay_in_f16():
    types = planned_types(dit_state(shrunk("t2v-14B")), "Q4_K_M")  # rows of 48 and 64
    assert set(types.values()) == {"F32", "F16"}
    types = planned_types(dit_state(shrunk("t2v-14B")), "Q8_0")
    assert types["blocks.0.ffn.0.weight"] == "F16" and types["blocks.0.ffn.2.weight"] == "Q8_0"


# The file


def read_back(path):
    """Name -> fp32 values, by the gguf package."""
    reader = gguf.GGUFReader(path)
    return reader, {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(tuple(int(n) for n in one.shape[::-1]))
        for one in reader.tensors
    }


@pytest.mark.parametrize("type_name", RECIPES)
def test_other_readers_agree(tmp_path, type_name):
    tensors = small_dit()
    report = export_gguf(DictSource(tensors), tmp_path / "out.gguf", type_name)
    reader, values = read_back(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "wan"
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert values.keys() == tensors.keys()
    ours = open_source(tmp_path / "out.gguf")
    types = {one.name: one.tensor_type.name for one in reader.tensors}
    for name, tensor in tensors.items():
        wanted, found = tensor.float(), torch.from_numpy(np.array(values[name], dtype=np.float32))
        error = (found - wanted).square().mean().sqrt() / wanted.std()
        assert error <= ERROR[types[name]], (name, types[name])
        assert torch.equal(ours.read(name).float(), found) and ours.info(name).shape == tuple(tensor.shape)
    assert report["tensors"] == len(tensors) and report["types"] == Counter(types.values())
    assert report["bytes"] == (tmp_path / "out.gguf").stat().st_size


def test_file_types_have_llama_cpps_numbers():
    uniform = {"Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S"}
    for name, recipe in RECIPES.items():
        prefix = "ALL" if name == "F32" else "MOSTLY"
        assert recipe.file_type == gguf.LlamaFileType[f"{prefix}_{uniform.get(name, name)}"], name


def test_patch_embedding_has_five_dimensions(tmp_path):
    export_gguf(DictSource(small_dit()), tmp_path / "out.gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    patch = next(one for one in reader.tensors if one.name == "patch_embedding.weight")
    assert patch.shape.tolist() == [2, 2, 1, 16, 256] and patch.tensor_type == gguf.GGMLQuantizationType.F32
    assert not any("orig_shape" in key for key in reader.fields)


def test_names_of_every_layout(tmp_path):
    """diffusers' and ComfyUI's names give the same file as the official ones."""
    pytest.importorskip("diffusers")
    from benchmarks.peers import build_theirs

    official = small_dit()
    with torch.device("meta"):
        theirs = official_names(build_theirs("dit", small_spec().dit).state_dict(), "dit")
    layouts = {
        "official": official,
        "diffusers": {theirs[name]: tensor for name, tensor in official.items()},
        "comfy": {f"model.diffusion_model.{name}": tensor for name, tensor in official.items()},
    }
    files = []
    for name, tensors in layouts.items():
        export_gguf(DictSource(tensors), tmp_path / f"{name}.gguf", "Q4_0")
        files.append((tmp_path / f"{name}.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


def test_threads_do_not_change_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("wan.weights.write.stream._SLICE_WEIGHTS", 1000)
    for threads in (1, 3):
        export_gguf(DictSource(small_dit()), tmp_path / f"{threads}.gguf", "Q4_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_progress_ends_at_the_size_of_the_file(tmp_path):
    calls = []
    export_gguf(DictSource(small_dit()), tmp_path / "out.gguf", "Q8_0", on_progress=lambda *call: calls.append(call))
    assert calls == sorted(calls) and len(calls) > len(small_dit())
    assert calls[-1] == ((tmp_path / "out.gguf").stat().st_size,) * 2


@pytest.mark.parametrize("name", [*DITS, "umt5-xxl"])
@pytest.mark.parametrize("type_name", ["Q4_K_M", "BF16"])
def test_released_shapes_are_accepted_by_our_reader(tmp_path, name, type_name):
    """A sparse file: the table of a real checkpoint over zeros that take no space."""
    source = ShapeSource(manifest(name))
    planned = plan_tensors(source, RECIPES[type_name])
    path = tmp_path / "out.gguf"
    with path.open("wb") as file:
        write_header(file, make_metadata(source, RECIPES[type_name]), planned)
        file.truncate(file.tell() + export.data_bytes(planned))
    opened = open_source(path)
    component = export.component_of(opened)
    shapes = {ours: list(opened.info(name).shape) for ours, name in official_names(opened.keys(), component).items()}
    assert shapes == {ours: manifest(name)[key] for ours, key in official_names(manifest(name), component).items()}
    smallest = min(planned, key=lambda one: (one.type.torch_dtype is not None, math.prod(one.shape)))
    assert not opened.read(smallest.name).any()


def test_diffusers_computes_the_same(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from benchmarks.peers import build_theirs

    spec = small_spec()
    torch.manual_seed(0)
    reference = build_theirs("dit", spec.dit)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "out.gguf"
    export_gguf(open_source(tmp_path / "diffusion_pytorch_model.safetensors"), path, "Q4_K_M")
    loaded = diffusers.WanTransformer3DModel.from_single_file(
        str(path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tmp_path),
        torch_dtype=torch.float32,
    )
    ours, shapes = open_source(path), {name: tensor.shape for name, tensor in reference.state_dict().items()}
    names = official_names(shapes, "dit")
    reference.load_state_dict({name: ours.read(key).reshape(shapes[name]) for key, name in names.items()})
    args = torch.randn(1, 16, 2, 8, 8), torch.tensor([500]), torch.randn(1, spec.dit.text_len, spec.dit.text_dim)
    with torch.no_grad():
        found, wanted = (model(*args, return_dict=False)[0] for model in (loaded, reference))
    assert (found - wanted).abs().max() < 2e-3 * wanted.std()  # diffusers dequantises in half precision


# Quantising


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_bytes_are_those_of_the_gguf_package(name):
    """It writes these types itself; a weight that lies between two codes may be rounded to either."""
    weights = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    found = quantize(weights, BY_NAME[name])
    wanted = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[name]).view(np.uint8)
    assert found.shape == wanted.shape and (found != wanted).mean() < 1e-3


def test_zeros_and_odd_shapes():
    for name in ("Q4_K", "Q8_0", "IQ4_NL", "F16"):
        blocks = quantize(torch.zeros(3, 256), BY_NAME[name])
        kind = gguf.GGMLQuantizationType[name]
        values = blocks.view(np.float16) if name == "F16" else blocks
        assert not gguf.quants.dequantize(values, kind).any()
    assert quantize(torch.ones(2, 3, 1, 2, 2), BY_NAME["F32"]).shape == (12, 8)
    assert quantize(torch.tensor(1.0), BY_NAME["F32"]).shape == (1, 4)
    assert np.array_equal(*(quantize(one, BY_NAME["Q8_0"]) for one in (torch.eye(64), torch.eye(64).T)))
    with pytest.raises(ValueError, match="whole number"):
        quantize(torch.ones(2, 48), BY_NAME["Q4_K"])


# The text encoder


def test_text_encoder(tmp_path):
    tensors = small_t5()
    export_gguf(DictSource(tensors), tmp_path / "out.gguf", "Q8_0")
    reader, values = read_back(tmp_path / "out.gguf")
    block = "attn_norm attn_q attn_k attn_v attn_o attn_rel_b ffn_norm ffn_gate ffn_up ffn_down".split()
    wanted = {"token_embd.weight", "enc.output_norm.weight", *(f"enc.blk.0.{one}.weight" for one in block)}
    assert values.keys() == wanted
    assert (
        np.abs(values["enc.blk.0.ffn_gate.weight"] - tensors["blocks.0.ffn.gate.0.weight"].float().numpy()).max() < 0.01
    )
    keys, arch = gguf.Keys, {"arch": "t5encoder"}
    expected = {
        keys.General.ARCHITECTURE: "t5encoder",
        keys.General.FILE_TYPE: gguf.LlamaFileType.MOSTLY_Q8_0,
        keys.LLM.VOCAB_SIZE.format(**arch): 512,
        keys.LLM.CONTEXT_LENGTH.format(**arch): 512,
        keys.LLM.EMBEDDING_LENGTH.format(**arch): 256,
        keys.LLM.FEED_FORWARD_LENGTH.format(**arch): 512,
        keys.LLM.BLOCK_COUNT.format(**arch): 1,
        keys.Attention.HEAD_COUNT.format(**arch): 2,
        keys.Attention.KEY_LENGTH.format(**arch): 128,
        keys.Attention.VALUE_LENGTH.format(**arch): 128,
        keys.Attention.REL_BUCKETS_COUNT.format(**arch): 32,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected
    for key in (keys.Attention.LAYERNORM_EPS, keys.Attention.LAYERNORM_RMS_EPS):
        assert reader.fields[key.format(**arch)].contents() == pytest.approx(1e-6)
    ours = open_source(tmp_path / "out.gguf")
    assert official_names(ours.keys(), "t5").keys() == official_names(tensors, "t5").keys()


# From GGUF to GGUF


def test_gguf_as_input(tmp_path):
    tensors = small_dit(torch.float32)
    export_gguf(DictSource(tensors), tmp_path / "f32.gguf", "F32")
    for source, output in ((DictSource(tensors), "direct"), (open_source(tmp_path / "f32.gguf"), "again")):
        export_gguf(source, tmp_path / f"{output}.gguf", "Q4_K_M")
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_weights_that_are_quantised_already_are_noticed(tmp_path):
    def before(source, type_name):
        return export.quantised_before(source, plan_tensors(source, RECIPES[type_name]))

    export_gguf(DictSource(small_dit()), tmp_path / "out.gguf", "Q8_0")
    assert before(open_source(tmp_path / "out.gguf"), "Q4_K_M") == "Q8_0"
    assert before(open_source(tmp_path / "out.gguf"), "F16") is None
    assert before(DictSource(small_dit()), "Q4_K_M") is None
    fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in small_dit().items()}
    assert before(DictSource(fp8), "Q8_0") == "float8_e4m3fn"


# What is refused


def test_values_that_cannot_be_written(tmp_path):
    for bad, match in [(math.nan, "not finite"), (math.inf, "not finite"), (1e6, "Q4_K cannot hold its value 999424")]:
        tensors = small_dit()
        tensors["blocks.1.ffn.0.weight"][3, 5] = bad
        refused(tensors, tmp_path, rf"tensor blocks\.1\.ffn\.0\.weight: .*{match}")
    tensors = small_dit()
    tensors["blocks.1.norm3.bias"][3] = math.nan
    refused(tensors, tmp_path, r"tensor blocks\.1\.norm3\.bias: it holds values that are not finite", "F32")


def test_incomplete_checkpoints(tmp_path):
    tensors = small_dit()
    del tensors["blocks.0.ffn.2.weight"]
    refused(tensors, tmp_path, r"incomplete, block 0 has no ffn\.2\.weight \(1 of its 27")
    refused({n: t for n, t in small_dit().items() if "time_embedding" not in n}, tmp_path, "has no time_embedding")
    tensors = small_t5()
    tensors["blocks.1.attn.q.weight"] = tensors["blocks.0.attn.q.weight"]
    refused(tensors, tmp_path, "incomplete, block 1 has no")


def test_scaled_weights(tmp_path):
    refused(small_dit() | {"blocks.0.ffn.0.scale_weight": torch.ones(1)}, tmp_path, "scale_weight is no tensor of")
    tensors = small_dit()
    tensors["blocks.0.ffn.0.weight"] = torch.ones(512, 256, dtype=torch.int8)
    refused(tensors, tmp_path, "holds int8, not weights")
    refused(small_t5() | {"decoder.block.0.wi.weight": torch.ones(4, 4)}, tmp_path, "no tensor of the UMT5 encoder")


@pytest.mark.parametrize("what", ["vae", "clip", "lora"])
def test_other_components(tmp_path, what):
    tensors = {
        "vae": lambda: WanVAE(**shrunk("t2v-14B").vae).state_dict(),
        "clip": clip_state,
        "lora": lambda: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 4)},
    }[what]()
    looks = {"vae": "a Wan2.1 VAE", "clip": "a CLIP image encoder", "lora": "a LoRA"}[what]
    refused(tensors, tmp_path, f"neither a Wan transformer nor its text encoder; the file looks like {looks}")


def test_disk_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(small_dit(), tmp_path, r"needs 0\.00 GB, and .* has 0\.00 GB free")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", full)
    refused(small_dit(), tmp_path, "cannot write .*out.gguf: No space left")


def test_sharded_input(tmp_path):
    tensors = small_dit()
    names = list(tensors)
    shards = {"m-1.safetensors": names[:40], "m-2.safetensors": names[40:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert export_gguf(open_source(tmp_path), tmp_path / "out.gguf", "Q8_0")["tensors"] == len(tensors)
    assert set(open_source(tmp_path / "out.gguf").keys()) == set(tensors)


def test_the_number_of_heads_goes_along_where_it_is_told(tmp_path):
    from wan.tasks import embedded_checkpoint, load_task
    from wan.weights.infer import infer_dit_config

    spec = load_task("t2v-tiny")
    source = open_source(next(embedded_checkpoint(spec).glob("diffusion_pytorch_model*.safetensors")))
    export_gguf(source, tmp_path / "a.gguf", "Q8_0")
    assert infer_dit_config(open_source(tmp_path / "a.gguf"))["num_heads"] == spec.dit.num_heads
