"""The models of every task take the whole released checkpoints, at real size and without memory (meta device)."""

import pytest
import torch

from tests.unit.weight_helpers import ShapeSource, manifest
from wan.errors import SwanError
from wan.models import encoders
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.assign import load_weights

TASKS = [
    "t2v-1.3B",
    "t2v-14B",
    "t2v-A14B",
    "i2v-14B",
    "i2v-A14B",
    "flf2v-14B",
    "ti2v-5B",
    "vace-1.3B",
    "vace-14B",
    "s2v-14B",
    "animate-14B",
]


class MetaSource(ShapeSource):
    """A checkpoint whose tensors have shapes and no values."""

    def read(self, name, rows=None):
        info = self.info(name)
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        return torch.empty(shape, dtype=info.dtype, device="meta")


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(**config)


def fill(model, shapes, component):
    """Loads every tensor of `shapes`; the model must hold exactly these afterwards."""
    load_weights(model, MetaSource(shapes), component, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.state_dict().values()) == sum(
        torch.Size(one).numel() for one in shapes.values()
    )
    return model


@pytest.mark.parametrize("task", TASKS)
def test_official_transformers(task):
    shapes = manifest(task)
    model = fill(on_meta(WanModel, load_task(task).dit), shapes, "dit")
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert held == {name: tuple(shape) for name, shape in shapes.items()}
    assert model.blocks[0].modulation.dtype == torch.float32 and model.dtype == torch.bfloat16


@pytest.mark.parametrize("task", TASKS)
def test_official_vaes(task):
    config = load_task(task).vae
    fill(on_meta(WanVAE, config), manifest(f"vae{config.version}"), "vae")


@pytest.mark.parametrize("task", [one for one in TASKS if one not in ("s2v-14B", "animate-14B")])  # laid out otherwise
def test_diffusers_transformers(task):
    pytest.importorskip("diffusers")
    from benchmarks.peers import build_theirs

    config = load_task(task).dit
    with torch.device("meta"):
        # diffusers tells Wan2.2's i2v by its having no image embedder
        theirs = build_theirs("dit", config | {"model_type": "t2v"} if config.get("clip") is False else config)
    fill(on_meta(WanModel, config), {name: tensor.shape for name, tensor in theirs.state_dict().items()}, "dit")


@pytest.mark.parametrize("task", ["t2v-1.3B", "ti2v-5B"])
def test_diffusers_vaes(task):
    pytest.importorskip("diffusers")
    from benchmarks.peers import build_theirs

    config = load_task(task).vae
    with torch.device("meta"):
        theirs = build_theirs("vae", config)
    fill(on_meta(WanVAE, config), {name: tensor.shape for name, tensor in theirs.state_dict().items()}, "vae")


def test_official_text_encoder(monkeypatch):
    shapes = manifest("umt5-xxl")
    monkeypatch.setattr(encoders, "load_tokenizer", lambda folder: None)
    encoder = encoders.load_text_encoder(MetaSource(shapes), "unused", device="meta", dtype=torch.bfloat16)
    parameters = dict(encoder.model.named_parameters())  # the tied embedding once
    assert sum(p.numel() for p in parameters.values()) == sum(torch.Size(s).numel() for s in shapes.values())
    config, spec = encoder.model.config, load_task("t2v-14B").text
    assert (config.vocab_size, config.d_model, config.d_ff) == (spec.vocab, spec.dim, spec.dim_ffn)
    assert (config.num_layers, config.num_heads) == (spec.num_layers, spec.num_heads)


def test_official_image_encoder():
    encoder = encoders.load_clip_encoder(MetaSource(manifest("clip-vit-h-visual")), device="meta")
    config = encoder.model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (1280, 16, 32)
    assert (config.image_size, config.patch_size) == (224, 14)


@pytest.mark.parametrize("held, task", [("t2v-14B", "t2v-1.3B"), ("i2v-14B", "flf2v-14B"), ("i2v-A14B", "i2v-14B")])
def test_the_transformer_of_another_task_does_not_fit(held, task):
    with pytest.raises(SwanError, match="missing|unexpected|mis-shaped") as error:
        fill(on_meta(WanModel, load_task(task).dit), manifest(held), "dit")
    assert "\n" not in str(error.value)
