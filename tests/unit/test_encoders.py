import pytest
import torch

from tests.unit.weight_helpers import DictSource, ShapeSource, golden
from wan.errors import SwanError
from wan.models.encoders import load_clip_encoder, load_text_encoder
from wan.weights.names import Rows, official_names

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def t5_case():
    return golden("t5_umt5")


@pytest.fixture(scope="module")
def clip_case():
    return golden("clip_visual")


@pytest.fixture(scope="module")
def tokenizer_folder():
    return golden("tokenizer_tiny").folder


def renamed(tensors, component):
    """The same checkpoint under our names."""
    result = {}
    for ours, name in official_names(tensors, component).items():
        result[ours] = tensors[name.name].chunk(name.count)[name.index] if isinstance(name, Rows) else tensors[name]
    return result


def test_text_encoder_matches_the_official_one(t5_case, tokenizer_folder):
    encoder = load_text_encoder(DictSource(t5_case.group("weights")), tokenizer_folder, text_len=64)
    outputs = encoder(t5_case.meta["args"]["texts"])
    for index, output in enumerate(outputs):
        expected = t5_case.tensors[f"outputs/text_context_{index}"]
        assert output.shape == expected.shape and (output - expected).abs().max() < TOLERANCE
    assert encoder([]) == []


def test_padded_rows_do_not_disturb_valid_tokens(t5_case, tokenizer_folder):
    encoder = load_text_encoder(DictSource(t5_case.group("weights")), tokenizer_folder)
    ids, mask = t5_case.tensors["inputs/ids"], t5_case.tensors["inputs/mask"]
    output = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert ((output - t5_case.tensors["outputs/context"]) * mask[..., None]).abs().max() < TOLERANCE


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_text_encoder_from_transformers_layout(t5_case, tokenizer_folder, embedding):
    tensors = renamed(t5_case.group("weights"), "t5")
    table = tensors.pop("shared.weight")
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if embedding in (name, "both"):
            tensors[name] = table
    encoder = load_text_encoder(DictSource(tensors), tokenizer_folder, text_len=64)
    output = encoder(t5_case.meta["args"]["texts"][:1])[0]
    assert (output - t5_case.tensors["outputs/text_context_0"]).abs().max() < TOLERANCE
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_text_encoder_in_bf16(t5_case, tokenizer_folder):
    encoder = load_text_encoder(DictSource(t5_case.group("weights")), tokenizer_folder, dtype=torch.bfloat16)
    output = encoder(t5_case.meta["args"]["texts"][:1])[0]
    expected = t5_case.tensors["outputs/text_context_0"]
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.03 * expected.norm()


def test_an_encoder_with_fewer_rows_than_tokens_is_refused(t5_case, tokenizer_folder):
    tensors = t5_case.group("weights")
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:100]
    with pytest.raises(SwanError, match="tokenizer_tiny: has 389 tokens, the text encoder 100"):
        load_text_encoder(DictSource(tensors), tokenizer_folder)


def test_clip_matches_the_official_one(clip_case):
    encoder = load_clip_encoder(DictSource(clip_case.group("weights")), num_heads=clip_case.config["vision_heads"])
    images = [clip_case.tensors[f"inputs/image_{index}"] for index in range(3)]
    for index, image in enumerate(images):
        pixels = encoder.preprocess([image])
        assert (pixels - clip_case.tensors[f"outputs/pixel_values_{index}"]).abs().max() < TOLERANCE
    assert (encoder(images) - clip_case.tensors["outputs/clip_context_all"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_from_transformers_layout(clip_case, prefix, tmp_path):
    tensors = {prefix + name: t for name, t in renamed(clip_case.group("weights"), "clip").items()}
    tensors["visual_projection.weight"] = torch.zeros(24, 32)
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "num_attention_heads": 4}')
    encoder = load_clip_encoder(DictSource(tensors, str(tmp_path / "model.safetensors")))
    output = encoder([clip_case.tensors["inputs/image_0"]])
    assert (output - clip_case.tensors["outputs/clip_context_0"]).abs().max() < TOLERANCE


def test_clip_ignores_the_text_half(clip_case):
    tensors = clip_case.group("weights") | {"textual.norm.weight": torch.zeros(3), "log_scale": torch.zeros(())}
    assert load_clip_encoder(DictSource(tensors), num_heads=4)


def test_wrong_files_are_named_for_what_they_are(t5_case, clip_case, tokenizer_folder):
    with pytest.raises(SwanError, match="not a UMT5 encoder.*looks like a CLIP image encoder"):
        load_text_encoder(DictSource(clip_case.group("weights")), tokenizer_folder)
    with pytest.raises(SwanError, match="not a CLIP image encoder.*looks like a T5 encoder"):
        load_clip_encoder(DictSource(t5_case.group("weights")))
    with pytest.raises(SwanError, match="not a CLIP image encoder"):
        load_clip_encoder(ShapeSource({"visual.patch_embedding.weight": [1, 2]}))
