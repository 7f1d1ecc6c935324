"""Models from GGUF files: the same numbers whether weights stay packed or not, mapped files, folded tensors."""

import gguf
import pytest
import torch

from tests.unit.gguf_helpers import quantised, write_gguf
from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state, write_tokenizer
from tests.unit.weight_helpers import DictSource
from wan.errors import SwanError
from wan.models.dit import CLIP_TOKENS, WanModel
from wan.models.encoders import load_text_encoder
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.weights.assign import load_weights
from wan.weights.infer import check_dit
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf


def dequantised(path):
    """The file's tensors as the gguf package has them, fp32."""
    tensors = {}
    for one in gguf.GGUFReader(path).tensors:
        weights = gguf.quants.dequantize(one.data, one.tensor_type) if one.data.dtype != "float32" else one.data
        tensors[one.name] = torch.from_numpy(weights.copy()).float().reshape([int(n) for n in reversed(one.shape)])
    return DictSource(tensors)


def wide(task):
    """A small spec with rows of whole K-blocks."""
    spec = shrunk(task)
    spec.dit.update(dim=256, ffn_dim=512, num_heads=2)
    return spec


def on_meta(spec):
    with torch.device("meta"):
        return WanModel(**spec.dit)


@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B", "flf2v-14B", "ti2v-5B", "vace-1.3B"])
@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q3_K_M", "Q5_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_resident_and_dequantised_weights_give_the_same_bits(tmp_path, task, type_name, dtype):
    spec = wide(task)
    path = tmp_path / "model.gguf"
    report = export_gguf(DictSource(dit_state(spec)), path, type_name)
    assert len(set(report["types"]) - {"F32", "F16", "BF16"}) >= 2  # the file is mixed
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(1, spec.dit.out_dim, 2, 4, 4, generator=generator),
        "t": torch.tensor([500]),
        "context": torch.randn(1, 5, spec.dit.text_dim, generator=generator),
    }
    if extra := spec.dit.in_dim - spec.dit.out_dim:
        inputs["y"] = torch.randn(1, extra, 2, 4, 4, generator=generator)
    if "clip" in spec.files:
        images = 2 if spec.kind == "flf2v" else 1
        inputs["clip_fea"] = torch.randn(images, CLIP_TOKENS, 1280, generator=generator)
    if spec.kind == "vace":
        inputs["vace_context"] = torch.randn(1, spec.dit.vace_in_dim, 2, 4, 4, generator=generator)
        inputs["vace_context_scale"] = 0.8
    sources = {"packed": open_source(path), "resident": open_source(path), "dequantised": dequantised(path)}
    models = {
        name: load_weights(on_meta(spec), source, "dit", dtype=dtype, stream=name == "packed")
        for name, source in sources.items()
    }
    packed = [layer for layer in models["packed"].modules() if isinstance(layer, QuantLinear)]
    assert len(packed) == report["quantized"]
    with torch.inference_mode():
        results = {name: model(**inputs) for name, model in models.items()}
    assert torch.equal(results["packed"], results["dequantised"])
    assert torch.equal(results["resident"], results["dequantised"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoder(tmp_path, dtype):
    spec = shrunk("t2v-1.3B")
    path = tmp_path / "t5.gguf"
    export_gguf(DictSource(t5_state(spec)), path, "Q8_0")
    write_tokenizer(tmp_path / "tokenizer")
    encoders = [
        load_text_encoder(source, tmp_path / "tokenizer", text_len=16, dtype=dtype, stream=stream)
        for source, stream in ((open_source(path), True), (open_source(path), False), (dequantised(path), False))
    ]
    assert isinstance(encoders[0].model.shared, QuantEmbedding)
    assert encoders[0].model.encoder.embed_tokens is encoders[0].model.shared
    rows = [encoder(["a cat", "x"]) for encoder in encoders]
    for other in rows[1:]:
        assert all(torch.equal(one, two) for one, two in zip(rows[0], other))
    assert rows[0][0].dtype == dtype


def test_a_folded_patch_embedding(tmp_path):
    """Exporters that know four axes at most fold the first layer, each in its way."""
    spec = shrunk("t2v-1.3B")
    state = dit_state(spec)
    model = WanModel(**spec.dit)
    expected = state["patch_embedding.weight"]
    out_dim, in_dim = expected.shape[:2]
    for shape in ((out_dim, in_dim, 2, 2), (out_dim * in_dim, 1, 2, 2), (out_dim, in_dim * 4)):
        tensors = {name: tensor.numpy() for name, tensor in state.items()}
        tensors["patch_embedding.weight"] = expected.reshape(shape).numpy()
        source = open_source(write_gguf(tmp_path / "folded.gguf", tensors))
        check_dit(source, spec)
        load_weights(model, source, "dit")
        assert torch.equal(model.patch_embedding.weight, expected)
    tensors["patch_embedding.weight"] = expected.reshape(in_dim * 4, out_dim).numpy()
    with pytest.raises(SwanError, match="patch_embedding"):
        load_weights(model, open_source(write_gguf(tmp_path / "other.gguf", tensors)), "dit")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("true_shape", [True, False])
@pytest.mark.parametrize("axes", [2, 4])
def test_a_quantised_folded_patch_embedding(tmp_path, stream, true_shape, axes):
    """It is no matrix: whether others stay packed or not, it is dequantised while loading."""
    spec = wide("t2v-1.3B")
    state = dit_state(spec)
    patch = state["patch_embedding.weight"]
    rows = [patch.shape[0], -1] if axes == 2 else [1, 1, patch.shape[0], 64]
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    tensors["patch_embedding.weight"] = quantised(patch.reshape(rows), "Q8_0")
    tensors["blocks.0.self_attn.q.weight"] = quantised(state["blocks.0.self_attn.q.weight"], "Q8_0")

    def add(writer):
        if true_shape:
            writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(patch.shape))

    path = write_gguf(tmp_path / "folded.gguf", tensors, add=add)
    model = load_weights(on_meta(spec), open_source(path), "dit", dtype=torch.float32, stream=stream)
    assert isinstance(model.blocks[0].self_attn.q, QuantLinear) is stream
    expected = dequantised(path).read("patch_embedding.weight")
    assert torch.equal(model.patch_embedding.weight, expected.reshape(patch.shape))
