"""Animate's transformer as diffusers has it: other names, keys and values of the face in two matrices."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.weight_helpers import sparse
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.tasks import load_task
from wan.weights.assign import check_weights, load_weights
from wan.weights.infer import check_dit, infer_dit_config
from wan.weights.infer_task import infer_task
from wan.weights.lora import open_lora, set_loras, weight_shapes
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

HEADS, WIDTH = 2, 64
CONFIG = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "text_dim": 48,
    "freq_dim": 256,
    "ffn_dim": 96,
    "num_layers": 10,
    "image_dim": 1280,
    "added_kv_proj_dim": WIDTH,
    "motion_encoder_size": 16,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_style_dim": 32,
    "motion_encoder_dim": 32,
    "face_encoder_hidden_dim": 32,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """diffusers' model of random weights, and its folder."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.WanAnimateTransformer3DModel(**CONFIG).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def loaded(source, dtype=torch.float32, **options):
    with torch.device("meta"):
        model = WanModel(**infer_dit_config(source))
    return load_weights(model, source, "dit", dtype=dtype, **options)


def inputs():
    def noise(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return {
        "latent": noise(1, 36, 4, 4, 6, seed=1),
        "text": noise(1, 512, 48, seed=2),
        "image": noise(1, 257, 1280, seed=3),
        "pose": noise(1, 16, 3, 4, 6, seed=4),
        "face": noise(1, 3, 9, 16, 16, seed=5),
    }


def predicted(model, given):
    conditions = {"pose_latents": given["pose"], "face_pixel_values": given["face"]}
    with torch.inference_mode():
        return model(given["latent"], torch.tensor([500.0]), given["text"], clip_fea=given["image"], **conditions)


def test_prediction(theirs):
    model, folder = theirs
    given = inputs()
    with torch.inference_mode():
        wanted = model(
            hidden_states=given["latent"],
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=given["text"],
            encoder_hidden_states_image=given["image"],
            pose_hidden_states=given["pose"],
            face_pixel_values=given["face"],
        ).sample
    ours = predicted(loaded(open_source(folder)), given)
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_it_is_known_for_what_it_is(theirs):
    source = open_source(theirs[1])
    config = infer_dit_config(source)
    assert config["model_type"] == "animate" and config["face_px"] == 16 and config["num_heads"] == HEADS
    assert "face_adapter.0.to_k.weight" not in source.keys()
    assert source.info("face_adapter.0.to_kv.weight").shape == (2 * WIDTH, WIDTH)


@pytest.mark.parametrize("rows", [(0, 2 * WIDTH), (3, 9), (WIDTH - 1, WIDTH + 2), (WIDTH, WIDTH + 5)])
def test_rows_of_what_is_joined(theirs, rows):
    source = open_source(theirs[1])
    whole = torch.cat([theirs[0].face_adapter[1].to_k.weight, theirs[0].face_adapter[1].to_v.weight])
    assert torch.equal(source.read("face_adapter.1.to_kv.weight", rows), whole[slice(*rows)])


def test_packed(theirs, tmp_path):
    """A GGUF file under these names: packed layers have the bits of dequantised ones."""
    tensors = load_file(next(theirs[1].glob("*.safetensors")))
    save_file(tensors, tmp_path / "plain.safetensors")
    export_gguf(open_source(theirs[1]), tmp_path / "q8.gguf", "Q8_0")
    source = open_source(tmp_path / "q8.gguf")
    results = [predicted(loaded(source, stream=stream), inputs()) for stream in (False, True)]
    assert torch.equal(*results)


def test_real_size_is_accepted_whole(tmp_path):
    """By names and shapes; the data of this file is a hole."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanAnimateTransformer3DModel(added_kv_proj_dim=5120)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source = open_source(sparse(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", shapes))
    check_dit(source, load_task("animate-14B"))
    with torch.device("meta"):
        check_weights(WanModel(**load_task("animate-14B").dit), source, "dit")
    assert infer_task("", {"dit": str(tmp_path / "transformer")})[0] == "animate-14B"


def test_halves_that_differ(theirs, tmp_path):
    tensors = load_file(next(theirs[1].glob("*.safetensors")))
    tensors["face_adapter.0.to_v.weight"] = torch.zeros(7, WIDTH)
    save_file(tensors, tmp_path / "bad.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(SwanError, match="face_adapter.0.to_k.weight and face_adapter.0.to_v.weight must be alike"):
        open_source(tmp_path / "bad.safetensors")


def test_a_lora_changes_keys_or_values_alone(theirs, tmp_path):
    """As diffusers trains them: of a layer that is one here, with a LoRA for each half, DoRA and alpha among them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.1  # noqa: E731
    tensors, base = load_file(next(theirs[1].glob("*.safetensors"))), load_file(next(theirs[1].glob("*.safetensors")))
    found = {}
    for name, rank in (("face_adapter.0.to_k", 4), ("face_adapter.0.to_v", 3), ("face_adapter.1.to_v", 2)):
        down, up, weight = draw(rank, WIDTH), draw(WIDTH, rank), base[f"{name}.weight"]
        found |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        merged = weight + up @ down
        if name.endswith("1.to_v"):
            found[f"transformer.{name}.lora_magnitude_vector"] = magnitude = 3 + draw(WIDTH)
            merged *= (magnitude / merged.norm(dim=1))[:, None]
        tensors[f"{name}.weight"] = merged
    found["transformer.face_adapter.1.to_k.diff_b"] = draw(WIDTH)
    tensors["face_adapter.1.to_k.bias"] = base["face_adapter.1.to_k.bias"] + found[[*found][-1]]
    save_file(found, tmp_path / "lora.safetensors")
    changed = shutil.copytree(theirs[1], tmp_path / "changed")
    save_file(tensors, next(changed.glob("*.safetensors")))
    model = loaded(open_source(theirs[1]))
    shapes = weight_shapes(model)
    lora = open_lora(tmp_path / "lora.safetensors", shapes)
    assert not lora.notes and lora.targets == {name: shapes[name] for name in lora.targets} and len(lora.targets) == 3
    set_loras(model, open_source(theirs[1]), [(lora, 1.0)])
    wanted = loaded(open_source(changed))
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, wanted.state_dict()[name], rtol=1e-5, atol=1e-6)
    name = "face_adapter.fuser_blocks.1.linear1_kv.weight"
    weights = torch.cat([base[f"face_adapter.1.to_{half}.weight"] for half in "kv"])
    read = lambda rows: weights[slice(*(rows or (None,)))]  # noqa: E731
    whole = lora.delta(name, read)
    for rows in ((0, 5), (WIDTH - 3, WIDTH + 4), (WIDTH, 2 * WIDTH), (2 * WIDTH - 1, 2 * WIDTH)):
        torch.testing.assert_close(lora.delta(name, read, rows), whole[slice(*rows)], rtol=1e-5, atol=1e-6)
    export_gguf(open_source(theirs[1]), tmp_path / "q8.gguf", "Q8_0")
    packed = loaded(open_source(tmp_path / "q8.gguf"), stream=True)
    dense = loaded(open_source(tmp_path / "q8.gguf"))
    results = []
    for one in (packed, dense):
        before = predicted(one, inputs())
        set_loras(one, open_source(tmp_path / "q8.gguf"), [(lora, 1.0)])
        results += [predicted(one, inputs())]
        assert not torch.equal(before, results[-1])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_lora_for_one_half_must_fit_it(theirs, tmp_path):
    factors = {"lora_A.weight": torch.ones(2, WIDTH), "lora_B.weight": torch.ones(2 * WIDTH, 2)}
    save_file({f"face_adapter.0.to_k.{name}": one for name, one in factors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(SwanError, match=r"linear1_kv.weight \[128, 64\] for \[64, 64\]"):
        open_lora(tmp_path / "lora.safetensors", weight_shapes(loaded(open_source(theirs[1]))))
