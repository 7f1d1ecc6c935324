"""NaN and overflow, wherever they begin: exit code 1, no video, and a line that names stage, file and a way out."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan.cli import main
from wan.tasks import REPO

ASSETS = REPO / "wan/assets"
T5, VAE, DIT = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors"
NAN, INF = float("nan"), float("inf")
QUICK = ("--frame_num", "5", "--sample_steps", "4", "--size", "32*32", "--seed", "1", "--device", "cpu", "--quiet")


@pytest.fixture
def assets(tmp_path):
    """Copies of both embedded checkpoints. Their files are copies of their own, and may be spoiled."""
    for name in ("tiny", "tiny_i2v"):
        shutil.copytree(ASSETS / name, tmp_path / name, ignore=shutil.ignore_patterns("loras"))
    return tmp_path


@pytest.fixture
def fails(tmp_path, capsys):
    """fails(*flags) -> the one line that a run ends with. There is no video; latents are kept only if `kept`."""
    (tmp_path / "out").mkdir()

    def run(*flags, kept=False):
        assert main([*QUICK, "--save_file", str(tmp_path / "out/a.mp4"), *map(str, flags)]) == 1
        printed, line = capsys.readouterr()
        assert printed == "" and line.startswith("error: ") and line.count("\n") == 1, line
        assert [path.name for path in (tmp_path / "out").iterdir()] == (["a.mp4.latents.safetensors"] if kept else [])
        return line

    return run


def spoil(path: Path, name: str, value: float) -> None:
    """One number of a tensor becomes `value`."""
    is_safetensors = path.suffix == ".safetensors"
    state = load_file(path) if is_safetensors else torch.load(path, weights_only=True)
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    (save_file if is_safetensors else torch.save)(state, path)


@pytest.mark.parametrize("flags", [(), ("--teacache", "--cache_force"), ("--easycache", "--cache_force")])
@pytest.mark.parametrize("offload", ["none", "block"])
def test_a_transformer(assets, fails, flags, offload):
    spoil(assets / "tiny" / DIT, "blocks.3.ffn.0.weight", NAN)
    line = fails("--ckpt_dir", assets / "tiny", "--offload", offload, *flags)
    assert "denoise, step 1 of 4" in line and str(assets / "tiny" / DIT) in line and "--dit" in line
    if offload == "none":
        assert "blocks.3.ffn.0.weight is not finite" in line


def test_the_expert_that_ran_is_named(assets, fails):
    path = assets / "tiny_i2v/low_noise_model" / DIT
    spoil(path, "head.head.weight", INF)
    line = fails("--task", "i2v-tiny", "--ckpt_dir", assets / "tiny_i2v")
    assert str(path) in line and "--low" in line and "step 1 of" not in line and "high" not in line


def test_a_text_encoder(assets, fails):
    spoil(assets / "tiny" / T5, "blocks.0.ffn.gate.0.weight", INF)
    line = fails("--ckpt_dir", assets / "tiny")
    assert "encode_text" in line and str(assets / "tiny" / T5) in line and "--t5" in line


def test_the_encoder_of_a_vae(assets, fails):
    spoil(assets / "tiny" / VAE, "encoder.conv1.bias", NAN)
    line = fails("--task", "i2v-tiny", "--ckpt_dir", assets / "tiny_i2v")
    assert "encode_image" in line and VAE in line and "--vae" in line


@pytest.mark.parametrize("value", [NAN, -INF])
def test_the_decoder_of_a_vae_after_which_the_latents_are_kept(assets, fails, value):
    spoil(assets / "tiny" / VAE, "decoder.head.2.bias", value)
    line = fails("--ckpt_dir", assets / "tiny", "--vae_dtype", "bf16", kept=True)
    assert "decode: frame 1 " in line and str(assets / "tiny" / VAE) in line and "--vae_dtype fp32" in line


@pytest.mark.parametrize("scale", ["1e6", "1e30"])
def test_absurd_guidance(fails, scale):
    line = fails("--sample_guide_scale", scale)
    assert "denoise, step 1 of 4" in line and "--sample_guide_scale" in line


@pytest.mark.parametrize("file, flag", [(DIT, "--dtype"), (T5, "--t5_dtype")])
def test_what_overflows_in_fp16(assets, fails, file, flag):
    name = "head.head.weight" if file == DIT else "norm.weight"
    spoil(assets / "tiny" / file, name, 1e5)
    line = fails("--ckpt_dir", assets / "tiny", flag, "fp16")
    assert f"{flag} bf16 or fp32" in line and str(assets / "tiny" / file) in line
