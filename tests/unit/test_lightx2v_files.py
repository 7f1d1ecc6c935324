"""Folders of LightX2V: a file a block, precisions in folders of their own, quantised encoders."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_locate import CLIP, T5, VAE, lay_out, names
from tests.unit.tiny_checkpoint import clip_state
from wan.engine import Engine
from wan.errors import SwanError
from wan.models.encoders import load_clip_encoder
from wan.quant.rounding import quantize_channels
from wan.tasks import load_task
from wan.weights.infer import check_encoder
from wan.weights.infer_task import infer_task
from wan.weights.locate import LIGHTX2V_FOLDERS, locate
from wan.weights.source import open_source

TOKENIZER = "google/umt5-xxl/tokenizer.json"
T5_FP8, CLIP_FP8 = T5.replace("bf16", "fp8"), f"{Path(CLIP).stem}-fp8.pth"
EXPERTS = [f"wan2.2_i2v_A14b_{one}_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors" for one in ("high", "low")]


@pytest.mark.parametrize("folder", LIGHTX2V_FOLDERS)
def test_parts_in_folders_by_precision(folder, tmp_path):
    blocks = [f"{folder}/{name}.safetensors" for name in ("block_0", "block_1", "block_10", "non_block")]
    lay_out(tmp_path, *blocks, f"{folder}/{T5_FP8}", f"{folder}/{CLIP_FP8}", VAE, TOKENIZER, f"{folder}/config.json")
    files = locate(tmp_path, load_task("i2v-14B"))
    assert sorted(names(tmp_path, files.dit["model"])) == blocks and files.tokenizer == tmp_path / "google/umt5-xxl"
    found = names(tmp_path, files.t5 + files.clip + files.vae)
    assert found == [f"{folder}/{T5_FP8}", f"{folder}/{CLIP_FP8}", VAE]


def test_experts_below_such_a_folder_and_by_their_names(tmp_path):
    task, both = load_task("i2v-A14B"), ["high_noise_model/x.safetensors", "low_noise_model/block_0.safetensors"]
    lay_out(tmp_path / "a", T5, VAE, TOKENIZER, *(f"distill_models/{one}" for one in both))
    files = locate(tmp_path / "a", task)
    assert names(tmp_path / "a/distill_models", files.dit["high"] + files.dit["low"]) == both
    lay_out(tmp_path / "b", T5, VAE, TOKENIZER, *EXPERTS, "wan2.2_high_noise_lora_rank64.safetensors")
    files = locate(tmp_path / "b", task)
    assert names(tmp_path / "b", files.dit["high"] + files.dit["low"]) == EXPERTS
    lay_out(tmp_path / "b", "Wan2.2-HighNoise-Q8_0.gguf")
    with pytest.raises(SwanError, match="cannot tell which of wan2.2_i2v.*Q8_0.gguf to take; name it with --high"):
        locate(tmp_path / "b", task)
    lay_out(tmp_path / "b", "transformer/model.safetensors")  # a folder for it goes before a name
    assert names(tmp_path / "b", locate(tmp_path / "b", task).dit["high"]) == ["transformer/model.safetensors"]
    given = {"high": tmp_path / "b/Wan2.2-HighNoise-Q8_0.gguf"}
    assert names(tmp_path / "b", locate(tmp_path / "b", task, given).dit["low"]) == EXPERTS[1:]


def test_what_lies_at_the_top_goes_first_and_two_folders_are_not_chosen_from(tmp_path):
    task = load_task("t2v-14B")
    lay_out(tmp_path, T5, VAE, TOKENIZER, "original/a.safetensors", "distill_fp8/b.safetensors", f"fp8/{T5_FP8}")
    with pytest.raises(SwanError, match="cannot tell which of distill_fp8/, original/ to take; name it with --dit"):
        locate(tmp_path, task)
    files = locate(tmp_path, task, {"dit": tmp_path / "original"})
    assert names(tmp_path, files.dit["model"] + files.t5) == ["original/a.safetensors", T5]
    lay_out(tmp_path, "distill_model.pt")
    assert names(tmp_path, locate(tmp_path, task).dit["model"]) == ["distill_model.pt"]
    lay_out(tmp_path / "original", "c.safetensors")
    (tmp_path / "distill_model.pt").unlink()
    with pytest.raises(SwanError, match="original: cannot tell which file is the transformer .a.safetensors, c.saf"):
        shutil.rmtree(tmp_path / "distill_fp8")
        locate(tmp_path, task)


def quantised(state, scheme, parts):
    """A state dict as LightX2V's converter leaves it: matrices of these parts of the model in codes with scales."""
    tensors = {}
    for name, weight in state.items():
        if weight.ndim == 2 and name.endswith(".weight") and any(f".{part}." in name for part in parts):
            tensors[name], tensors[f"{name}_scale"] = quantize_channels(weight, scheme)
        else:
            tensors[name] = weight
    return tensors


def dequantised(path):
    source = open_source(path)
    return {name: source.read(name) for name in source.keys()}


def by_block(tensors, folder):
    """A file for each block, one for the rest."""
    files = {}
    for name, tensor in tensors.items():
        index = name.split(".")[1] if name.startswith("blocks.") else None
        files.setdefault("non_block" if index is None else f"block_{index}", {})[name] = tensor
    folder.mkdir(parents=True)
    for name, held in files.items():
        save_file(held, folder / f"{name}.safetensors")


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_video_by_such_a_folder_is_that_of_the_same_weights_dequantised(scheme, tmp_path, capsys):
    """The embedded model, its transformer a file a block and its text encoder quantised; and told from it alone."""
    tiny, root = Path(load_task("t2v-tiny").checkpoint), tmp_path / "model"
    by_block(
        quantised(
            dequantised(tiny / "diffusion_pytorch_model.safetensors"), scheme, ("self_attn", "cross_attn", "ffn")
        ),
        root / f"distill_{scheme}",
    )
    torch.save(quantised(dequantised(tiny / T5), scheme, ("attn", "ffn")), root / T5.replace("bf16", scheme))
    shutil.copy(tiny / VAE, root)
    shutil.copytree(tiny / "google", root / "google")
    (tmp_path / "dense").mkdir()
    save_file(dequantised(root / f"distill_{scheme}"), tmp_path / "dense/dit.safetensors")
    save_file(dequantised(root / T5.replace("bf16", scheme)), tmp_path / "dense/t5.safetensors")
    dense = {"dit": str(tmp_path / "dense/dit.safetensors"), "t5": str(tmp_path / "dense/t5.safetensors")}
    request = {"prompt": "a red circle moving right", "seed": 5, "sample_steps": 2, "frame_num": 5, "size": "32*32"}
    latents = []
    for options in ({"ckpt_dir": str(root), "gguf_mode": "stream"}, dense):
        with Engine(task="t2v-tiny", **options) as engine:
            latents.append(engine.generate(**request).latents)
    assert torch.equal(*latents)
    assert infer_task(str(root), {})[0] == "t2v-tiny"


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_quantised_image_encoder_computes_what_its_weights_do(scheme, tmp_path):
    torch.manual_seed(0)
    state = clip_state(layers=2)
    torch.save(quantised(state, scheme, ("attn", "mlp")), tmp_path / f"{Path(CLIP).stem}-{scheme}.pth")
    lay_out(tmp_path, T5, VAE, TOKENIZER, "dit.safetensors")
    [path] = locate(tmp_path, load_task("i2v-14B")).clip
    source = open_source(path)
    check_encoder(source, "clip", load_task("i2v-14B"))
    assert source.block_type("visual.transformer.1.attn.to_qkv.weight").name == scheme
    save_file(dequantised(path), tmp_path / "dense.safetensors")
    image = [torch.rand(3, 1, 40, 56) * 2 - 1]
    made, dense = (
        load_clip_encoder(open_source(one), dtype=torch.bfloat16)(image)
        for one in (path, tmp_path / "dense.safetensors")
    )
    assert torch.equal(made, dense) and made.isfinite().all()
