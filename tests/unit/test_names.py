import pytest
import torch

from tests.unit.weight_helpers import fact, manifest
from wan.errors import SwanError
from wan.weights.names import Rows, official_names

RELEASED_DITS = ["t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B"]


def diffusers_dit(name, shapes):
    """The diffusers model of a release, on the meta device, cut to two blocks."""
    diffusers = pytest.importorskip("diffusers")
    dim = shapes["patch_embedding.weight"][0]
    extra = {}
    if "img_emb.proj.0.weight" in shapes:
        extra = {"image_dim": 1280, "added_kv_proj_dim": dim}
    if "img_emb.emb_pos" in shapes:
        extra["pos_embed_seq_len"] = shapes["img_emb.emb_pos"][1]
    cls = diffusers.WanTransformer3DModel
    if name.startswith("vace"):
        cls, extra = diffusers.WanVACETransformer3DModel, {"vace_layers": [0, 1]}
    with torch.device("meta"):
        return cls(
            num_attention_heads=dim // 128,
            in_channels=shapes["patch_embedding.weight"][1],
            out_channels=shapes["head.head.weight"][0] // 4,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_layers=2,
            **extra,
        )


def first_blocks(shapes, count=2):
    beyond = tuple(f"{kind}.{index}." for kind in ("blocks", "vace_blocks") for index in range(count, 64))
    return {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(beyond)}


@pytest.mark.parametrize("name", [*RELEASED_DITS, "vace-1.3B"])
def test_diffusers_transformers_get_the_official_names_and_shapes(name):
    official = first_blocks(manifest(name))
    theirs = {key: tuple(value.shape) for key, value in diffusers_dit(name, manifest(name)).state_dict().items()}
    assert {ours: theirs[key] for ours, key in official_names(theirs, "dit").items()} == official


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_diffusers_vaes_get_the_official_names_and_shapes(version):
    diffusers = pytest.importorskip("diffusers")
    extra = {}
    if version == "2.2":
        extra = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
        extra |= {"in_channels": 12, "out_channels": 12, "patch_size": 2}
        extra |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in diffusers.AutoencoderKLWan(**extra).state_dict().items()}
    official = {key: tuple(shape) for key, shape in manifest(f"vae{version}").items()}
    assert {ours: theirs[key] for ours, key in official_names(theirs, "vae").items()} == official


@pytest.mark.parametrize("table", ["vae_2_1", "vae_2_2"])
def test_vae_names_match_the_published_table(table):
    expected = fact("diffusers_key_map.json")[table]
    assert official_names(expected.values(), "vae") == expected


def test_dit_block_names_match_the_published_table():
    table = fact("diffusers_key_map.json")["dit"]
    pairs = {theirs: ours for ours, theirs in table["top_level"].items()}
    for blocks in ("blocks", "vace_blocks"):
        pairs |= {f"{blocks}.7.{theirs}": f"{blocks}.7.{ours}" for ours, theirs in table["block"].items()}
    pairs |= {
        "vace_blocks.0.proj_in": "vace_blocks.0.before_proj",
        "vace_blocks.0.proj_out": "vace_blocks.0.after_proj",
    }
    for theirs, ours in pairs.items():
        leaf = "" if theirs.split(".")[-1] in ("scale_shift_table", "pos_embed") else ".weight"
        keys = {theirs + leaf, "condition_embedder.time_proj.bias"}
        assert official_names(keys, "dit")[ours + leaf] == theirs + leaf


def test_what_a_quantiser_puts_beside_a_weight_moves_with_it():
    keys = ["condition_embedder.time_proj.bias", "blocks.3.attn1.to_q.weight_scale"]
    assert official_names(keys, "dit")["blocks.3.self_attn.q.weight_scale"] == keys[1]


@pytest.mark.parametrize("component, name", [("dit", "t2v-1.3B"), ("vae", "vae2.1"), ("vae", "vae2.2")])
def test_official_names_stay(component, name):
    keys = list(manifest(name))
    assert official_names(keys, component) == {key: key for key in keys}


@pytest.mark.parametrize(
    "component, prefix",
    [
        ("dit", "model.diffusion_model."),
        ("dit", "diffusion_model."),
        ("vae", "first_stage_model."),
        ("vae", "vae."),
    ],
)
def test_prefixes_of_single_files(component, prefix):
    keys = {"dit": ["blocks.0.ffn.0.weight", "head.modulation"], "vae": ["conv1.weight", "encoder.head.0.gamma"]}
    others = ["text_encoders.umt5xxl.transformer.shared.weight", "something.else"]
    found = official_names([prefix + key for key in keys[component]] + others, component)
    assert found == {key: prefix + key for key in keys[component]}


NAMES = {
    "dit": ["patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.modulation", "head.modulation"],
    "vae": ["encoder.conv1.weight", "decoder.middle.0.residual.2.bias", "conv2.weight"],
    "t5": ["token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.norm1.weight", "norm.weight"],
    "clip": ["visual.transformer.0.attn.proj.weight", "visual.cls_embedding", "visual.pre_norm.weight"],
}
PREFIXES = ["model.", "module.", "pipe.dit.", "transformer.", "_orig_mod.", "net.", "generator.model.", "dit."]
PREFIXES += ["module._orig_mod.", "model._fsdp_wrapped_module.", "state_dict.ema_model.", "a.b.c.d.e."]


@pytest.mark.parametrize("component", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_that_all_names_have_is_taken_off(component, prefix):
    plain = official_names(NAMES[component], component)
    assert official_names([prefix + name for name in NAMES[component]], component) == {
        ours: prefix + name for ours, name in plain.items()
    }


@pytest.mark.parametrize("prefix", ["dit/", "model_", "xyz"])
@pytest.mark.parametrize("component", ["dit", "vae", "t5"])
def test_a_prefix_without_a_dot(component, prefix):
    plain = official_names(NAMES[component], component)
    assert official_names([prefix + name for name in NAMES[component]], component).keys() == plain.keys()


def test_a_prefix_before_other_dialects_and_beside_other_components():
    theirs = ["condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight", "proj_out.weight"]
    found = official_names([f"net.{name}" for name in theirs], "dit")
    assert list(found) == ["time_projection.1.weight", "blocks.0.self_attn.q.weight", "head.head.weight"]
    gguf = official_names(["model.enc.blk.4.ffn_up.weight", "model.token_embd.weight"], "t5")
    assert gguf["shared.weight"] == "model.token_embd.weight"
    others = ["first_stage_model.conv1.weight", "text_encoders.umt5xxl.transformer.shared.weight"]
    both = official_names([f"model.diffusion_model.{name}" for name in NAMES["dit"]] + others, "dit")
    assert list(both) == NAMES["dit"]


def test_wrappers_are_taken_off_in_the_middle_of_names():
    keys = ["patch_embedding._orig_mod.weight", "blocks.3._orig_mod.ffn.0.weight", "module.blocks.4.module.norm3.bias"]
    ours = ["patch_embedding.weight", "blocks.3.ffn.0.weight", "blocks.4.norm3.bias"]
    assert official_names(keys, "dit") == dict(zip(ours, keys))


def test_what_a_prefix_leaves_out_is_not_dropped():
    """Half a file under a prefix is no checkpoint whose other half may be forgotten."""
    keys = [f"model.{name}" for name in NAMES["dit"]] + ["model_ema.decay", "blocks.7.ffn.0.weight"]
    assert {"model_ema.decay", "blocks.7.ffn.0.weight"} < official_names(keys, "dit").keys()


def test_two_models_in_one_file_are_not_chosen_from():
    both = [prefix + name for prefix in ("transformer.", "transformer_2.") for name in NAMES["dit"]]
    with pytest.raises(SwanError, match=r"begin with transformer\. and transformer_2\."):
        official_names(both, "dit")
    twice = ["_orig_mod.blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight"]
    with pytest.raises(SwanError, match=r"_orig_mod\.blocks.0.ffn.0.weight and blocks.0.ffn.0.weight"):
        official_names(twice, "dit")


def test_an_image_encoder_under_a_prefix_is_no_transformer():
    keys = ["visual.patch_embedding.weight", *NAMES["clip"]]
    assert "patch_embedding.weight" not in official_names(keys, "dit")


def test_t5_names_match_the_published_table():
    table = {
        ours.replace("{N}", "5"): theirs.replace("{N}", "5") for ours, theirs in fact("t5_key_map.json")["map"].items()
    }
    assert official_names(table, "t5") == {theirs: ours for ours, theirs in table.items()}


def test_t5_names_of_other_files():
    assert official_names(["spiece_model", "shared.weight", "scaled_fp8"], "t5") == {"shared.weight": "shared.weight"}
    gguf = official_names(["token_embd.weight", "enc.blk.4.ffn_up.weight", "enc.output_norm.weight"], "t5")
    assert gguf["encoder.block.4.layer.1.DenseReluDense.wi_1.weight"] == "enc.blk.4.ffn_up.weight"
    assert "shared.weight" in gguf and "encoder.final_layer_norm.weight" in gguf


def test_clip_names_match_the_published_table():
    expected = {}
    for official, theirs in fact("clip_key_map.json")["map"].items():
        official = official.replace("{N}", "31")
        parts = theirs if isinstance(theirs, list) else [theirs]
        for index, part in enumerate(parts):
            ours = part.replace("{N}", "31").removeprefix("vision_model.")
            expected[ours] = Rows(official, index, 3) if len(parts) == 3 else official
    keys = {name.name if isinstance(name, Rows) else name for name in expected.values()}
    assert official_names(keys | {"visual.head", "textual.x.weight", "log_scale"}, "clip") == expected


def test_a_name_claimed_twice_is_refused():
    keys = ["condition_embedder.time_proj.weight", "blocks.0.norm2.weight", "blocks.0.norm3.weight"]
    with pytest.raises(SwanError, match="blocks.0.norm3.weight"):
        official_names(keys, "dit")


def test_unknown_names_are_kept():
    assert official_names(["condition_embedder.new.weight"], "dit") == {
        "condition_embedder.new.weight": "condition_embedder.new.weight"
    }
