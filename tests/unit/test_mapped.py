"""Weights that a model on the CPU leaves in their file."""

import copy
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.tiny_checkpoint import dit_state, shrunk
from tests.unit.weight_helpers import DictSource
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.quant.linear import QuantLinear
from wan.weights.assign import load_weights
from wan.weights.containers import mapped
from wan.weights.containers.mapped import in_file_bytes
from wan.weights.lora import open_lora, set_loras
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

KINDS = ("gguf", "safetensors", "pth")
Q = "blocks.0.self_attn.q.weight"


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 0)


def spec_and_state():
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=64, num_heads=2)
    return spec, {name: tensor.bfloat16() for name, tensor in dit_state(spec).items()}


def write(folder, kind, state):
    path = folder / f"model.{kind}"
    if kind == "gguf":
        export_gguf(DictSource(state), path, "Q8_0")
    else:
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    return path


def loaded(path, spec, **options):
    with torch.device("meta"):
        model = WanModel(**spec.dit)
    return load_weights(model, open_source(path), "dit", stream=True, **{"dtype": torch.bfloat16} | options)


def predict(model):
    spec, generator = shrunk("t2v-1.3B"), torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 1, 8, 8, generator=generator)
    context = torch.randn(1, 5, spec.dit.text_dim, generator=generator)
    with torch.inference_mode():
        return model(x, torch.tensor([500]), context)


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """A transformer whose matrices are in its file, and that."""
    spec, state = spec_and_state()
    path = write(tmp_path, request.param, state)
    return loaded(path, spec), path


def matrix_of(model):
    layer = model.get_submodule(Q.removesuffix(".weight"))
    return layer.blocks if isinstance(layer, QuantLinear) else layer.weight


def test_matrices_are_not_copied(both):
    model, path = both
    there = in_file_bytes(model)
    assert 0.5 * path.stat().st_size < there < path.stat().st_size
    assert matrix_of(model).nbytes < there


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bits_are_those_of_weights_that_were_read(tmp_path, kind, monkeypatch):
    spec, state = spec_and_state()
    path = write(tmp_path, kind, state)
    there = loaded(path, spec)
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1 << 60)
    read = loaded(path, spec)
    assert in_file_bytes(there) > 0 == in_file_bytes(read)
    assert all(torch.equal(one, other) for one, other in zip(there.parameters(), read.parameters(), strict=True))
    assert torch.equal(predict(there), predict(read))


def test_of_another_type_they_are_copied(tmp_path):
    spec, state = spec_and_state()
    model = loaded(write(tmp_path, "safetensors", state), spec, dtype=torch.float32)
    assert in_file_bytes(model) == 0


def test_narrow_weights_stay_there(tmp_path):
    """`--dtype mixed`: bf16 in the file, fp32 in the products."""
    spec, state = spec_and_state()
    model = loaded(write(tmp_path, "safetensors", state), spec, dtype=torch.float32, kept=torch.bfloat16)
    assert in_file_bytes(model) > matrix_of(model).nbytes
    assert torch.isfinite(predict(model)).all()


def test_a_header_of_an_odd_length(tmp_path):
    """Its tensors lie askew."""
    spec, state = spec_and_state()
    path = write(tmp_path, "safetensors", state)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    path.write_bytes((header + 1).to_bytes(8, "little") + data[8 : 8 + header] + b" " + data[8 + header :])
    model = loaded(path, spec)
    assert in_file_bytes(model) == 0
    assert torch.equal(matrix_of(model), state[Q])


def test_a_file_that_is_cut(both):
    """An error, and not SIGBUS, which would end the process."""
    model, path = both
    predict(model)
    size = path.stat().st_size
    os.truncate(path, size - 5000)
    with pytest.raises(SwanError, match=f"cut from {size:,} to {size - 5000:,} bytes while its weights were in use"):
        predict(model)


@pytest.mark.parametrize("change", [os.remove, lambda path: os.replace(shutil.copy(path, f"{path}2"), path), os.utime])
def test_other_changes_change_nothing(both, change):
    model, path = both
    before = predict(model)
    change(path)
    assert torch.equal(predict(model), before)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled])
def test_a_copy_needs_no_file(both, copy_of):
    model, path = both
    copied = copy_of(model)
    before = predict(model)
    os.truncate(path, 100)
    assert torch.equal(predict(copied), before)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_loras_come_and_go_and_the_file_stays(tmp_path, kind):
    spec, state = spec_and_state()
    path = write(tmp_path, kind, state)
    digest, model, source = hashlib.sha256(path.read_bytes()).digest(), loaded(path, spec), open_source(path)
    before, base = predict(model), matrix_of(model).clone()
    up, down = torch.ones(64, 2), torch.ones(2, 64)
    name = f"diffusion_model.{Q.removesuffix('.weight')}"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "lora.safetensors")
    shapes = {one: tuple(tensor.shape) for one, tensor in model.state_dict().items()}
    set_loras(model, source, [(open_lora(tmp_path / "lora.safetensors", shapes), 1.0)])
    assert torch.equal(matrix_of(model), (base.float() + 2).bfloat16())
    set_loras(model, source, [])
    assert torch.equal(predict(model), before)
    assert hashlib.sha256(Path(path).read_bytes()).digest() == digest
