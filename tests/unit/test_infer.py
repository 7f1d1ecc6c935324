"""Telling what a file holds from its shapes."""

import json

import pytest

from tests.unit.weight_helpers import ShapeSource, manifest
from wan.errors import SwanError
from wan.tasks import load_task
from wan.weights.infer import check_dit, identify, infer_dit_config


@pytest.mark.parametrize(
    "name, words",
    [
        ("t2v-1.3B", "Wan2.1 t2v-1.3B"),
        ("t2v-14B", "Wan2.1 t2v-14B"),
        ("i2v-14B", "Wan2.1 i2v-14B"),
        ("flf2v-14B", "Wan2.1 flf2v-14B"),
        ("i2v-A14B", "Wan2.2 i2v-A14B expert"),
        ("t2v-A14B", "Wan2.2 t2v-A14B expert"),
        ("ti2v-5B", "Wan2.2 ti2v-5B"),
        ("vace-1.3B", "vace-1.3B"),
        ("s2v-14B", "s2v-14B"),
        ("animate-14B", "animate-14B"),
        ("vae2.1", "Wan2.1 VAE (z 16, width 96)"),
        ("vae2.2", "Wan2.2 VAE (z 48, width 160)"),
        ("lightvaew2_1", "Wan2.1 VAE (z 16, width 24)"),
        ("lighttaew2_1", "tiny VAE"),
        ("umt5-xxl", "umt5-xxl encoder"),
        ("clip-vit-h-visual", "CLIP image encoder (dim 1280, 32 layers)"),
    ],
)
def test_identify_released_files(name, words):
    assert words in identify(ShapeSource(manifest(name)))


def test_identify_others():
    assert identify(ShapeSource({"x": [1]})) is None
    assert identify(ShapeSource({"diffusion_model.blocks.0.ffn.0.lora_A.weight": [4, 8]})) == "a LoRA"
    odd = {"patch_embedding.weight": [3], "blocks.0.ffn.0.weight": [], "head.head.weight": [1]}
    assert identify(ShapeSource(odd)) is None
    with pytest.raises(SwanError, match="other shapes"):
        infer_dit_config(ShapeSource(odd))


RELEASED_TASKS = [
    "t2v-1.3B",
    "t2v-14B",
    "t2v-A14B",
    "i2v-14B",
    "i2v-A14B",
    "flf2v-14B",
    "ti2v-5B",
    "vace-1.3B",
    "vace-14B",
    "animate-14B",
]


@pytest.mark.parametrize("name", RELEASED_TASKS)
def test_released_shapes_pass_their_task_and_give_its_config(name):
    source, spec = ShapeSource(manifest(name)), load_task(name)
    check_dit(source, spec)
    config = infer_dit_config(source)
    assert {key: value for key, value in spec.dit.items() if key in config}.items() <= config.items()


def test_where_hints_of_vace_go_is_told_by_a_config_else_they_are_spread(tmp_path):
    source, spec = ShapeSource(manifest("vace-14B")), load_task("vace-14B")
    assert infer_dit_config(source)["vace_layers"] == [0, 5, 10, 15, 20, 25, 30, 35]
    spec.dit.vace_layers = [0, 1, 2, 3, 4, 5, 6, 7]
    check_dit(source, spec)
    spec.dit.vace_layers = [0, 1]
    with pytest.raises(SwanError, match=r"needs vace_layers \[0, 1\]"):
        check_dit(source, spec)
    for told, wanted in (
        ([0, 1, 2, 3, 4, 5, 6, 39], [0, 1, 2, 3, 4, 5, 6, 39]),
        ([0, -1], None),
        ([0] * 7 + [40], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"vace_layers": told}))
        source.paths = [tmp_path / "a.safetensors"]
        assert infer_dit_config(source)["vace_layers"] == (wanted or [0, 5, 10, 15, 20, 25, 30, 35])


@pytest.mark.parametrize(
    "held, task, words",
    [
        ("vace-14B", "t2v-14B", ["holds the Wan2.1 vace-14B", "needs model_type t2v"]),
        ("t2v-14B", "vace-14B", ["holds the Wan2.1 t2v-14B", "needs model_type vace"]),
        ("vace-1.3B", "vace-14B", ["holds the Wan2.1 vace-1.3B", "vace_layers [0, 5, 10"]),
        ("i2v-14B", "t2v-14B", ["holds the Wan2.1 i2v-14B", "needs in_dim 16", "no image embedding"]),
        ("i2v-A14B", "i2v-14B", ["Wan2.2 i2v-A14B expert", "needs an image embedding"]),
        ("i2v-14B", "flf2v-14B", ["needs model_type flf2v"]),
        ("t2v-1.3B", "t2v-14B", ["in_dim 16, dim 1536, 30 layers", "needs dim 5120, ffn_dim 13824, num_layers 40"]),
        ("umt5-xxl", "t2v-14B", ["not a Wan transformer", "looks like the umt5-xxl encoder"]),
        ("vae2.1", "t2v-14B", ["not a Wan transformer", "looks like a Wan2.1 VAE"]),
    ],
)
def test_a_transformer_of_another_task_is_refused(held, task, words):
    with pytest.raises(SwanError) as error:
        check_dit(ShapeSource(manifest(held)), load_task(task))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_heads_come_from_the_config_beside_the_file(tmp_path):
    shapes = {name: shape for name, shape in manifest("t2v-1.3B").items()}
    path = str(tmp_path / "x.safetensors")
    assert infer_dit_config(ShapeSource(shapes, path))["num_heads"] == 12
    (tmp_path / "config.json").write_text('{"dim": 1536, "num_heads": 24}')
    assert infer_dit_config(ShapeSource(shapes, path))["num_heads"] == 24
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6, "attention_head_dim": 256}')
    assert infer_dit_config(ShapeSource(shapes, path))["num_heads"] == 6
    (tmp_path / "config.json").write_text('{"dim": 4096, "num_heads": 64}')  # of the text encoder, say
    assert infer_dit_config(ShapeSource(shapes, path))["num_heads"] == 12
