"""python -m wan.compat.run_gguf_t2v: the video of generate.py, every flag acts, and failures are one line."""

import json
from pathlib import Path

import pytest

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan import cli
from wan.compat.run_gguf_t2v import main
from wan.media import read_settings
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

TINY = Path(__file__).resolve().parents[2] / "wan" / "assets" / "tiny"
PROMPT = "a red circle moving right on a black background"
QUICK = {"prompt": PROMPT, "height": 64, "width": 64, "video_length": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    export_gguf(open_source(TINY / "diffusion_pytorch_model.safetensors"), path, "Q8_0")
    return path


@pytest.fixture
def run(capsys, tiny_gguf, tmp_path):
    """run(flag=value, ...) -> (exit code, JSON report or None, stderr). True: a flag alone; None: not that flag."""

    def call(**flags):
        files = {"gguf_path": tiny_gguf, "base_model_path": TINY, "output_path": tmp_path / "out.mp4"}
        argv = []
        for name, value in (files | QUICK | flags).items():
            argv += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
        code = main(argv)
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return call


def test_the_video_of_generate(run, tiny_gguf, tmp_path, capsys):
    code, report, _ = run(video_length=17, num_inference_steps=4, guidance_scale=3, shift=7, seed=5)
    assert code == 0 and Path(report["file"]).stat().st_size
    generate = {"gguf": tiny_gguf, "prompt": PROMPT, "negative_prompt": "", "size": "64x64", "sample_steps": 4}
    generate |= {"sample_guide_scale": 3, "sample_shift": 7, "seed": 5, "save_file": tmp_path / "b.mp4"}
    assert cli.main(["--quiet", *(str(part) for flag in generate.items() for part in (f"--{flag[0]}", flag[1]))]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert theirs["sha256"] == report["sha256"] and theirs["fps"] == report["fps"] == 8
    again = ["--quiet", "--replay", report["file"], "--replay_files", "--save_file", str(tmp_path / "c.mp4")]
    assert cli.main(again) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == report["sha256"]


def test_defaults(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, report, _ = run(output_path=None, video_length=None)
    settings = read_settings(tmp_path / "output_gguf.mp4")
    assert code == 0 and report["seed"] == 42 and report["frames"] == 17
    assert settings["sample_guide_scale"] == 7.5 and settings["negative_prompt"] == "" and settings["dtype"] == "fp32"
    assert settings["sample_solver"] == "unipc" and report["offload"] == "model"


def test_flags_act(run, tmp_path):
    base = run()[1]["sha256"]
    for flags in (
        {"seed": 1},
        {"guidance_scale": 1},
        {"shift": 2},
        {"negative_prompt": "blue"},
        {"sampler_name": "Flow"},
        {"sampler_name": "Flow_DPM++"},
        {"dtype": "bfloat16"},
        {"prompt": "a blue square"},
    ):
        code, report, _ = run(**flags)
        assert code == 0 and report["sha256"] != base, flags
    code, report, err = run(**{"no-smart_memory": True, "fps": 12, "device": "cpu", "gguf_mode": "stream"})
    assert (code, report["sha256"], report["fps"], report["gguf_mode"]) == (0, base, 12, {"model": "stream"})
    settings = read_settings(report["file"])
    assert report["offload"] == "none" and settings["device"] == "cpu"
    run(enable_vae_tiling=True)
    assert read_settings(report["file"])["vae_tile_px"] == 256


def test_unknown_sampler_warns_and_uses_unipc(run):
    code, report, err = run(sampler_name="Euler A")
    assert code == 0 and "warning: sampler 'Euler A'" in err and "Flow_Unipc" in err
    assert report["sha256"] == run()[1]["sha256"]


def test_config(run, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("scheduler_kwargs: {shift: 2.0}\nvae_kwargs: {vae_subpath: other.pth, odd: 1}\n")
    code, _, err = run(config_path=config)
    assert code == 1 and "vae is missing; looked for other.pth" in err
    base = tmp_path / "base"
    base.mkdir()
    (base / "other.pth").symlink_to(TINY / "Wan2.1_VAE.pth")
    (base / "tokens").symlink_to(TINY / "google" / "umt5-xxl")
    (base / "models_t5_umt5-xxl-enc-bf16.pth").symlink_to(TINY / "models_t5_umt5-xxl-enc-bf16.pth")
    config.write_text(config.read_text() + "text_encoder_kwargs: {tokenizer_subpath: tokens}\n")
    code, report, err = run(config_path=config, base_model_path=base)
    assert code == 0 and "vae_kwargs.odd has no effect" in err
    assert report["sha256"] == run(shift=2)[1]["sha256"]
    assert read_settings(report["file"])["sample_shift"] == 2


def test_one_expert_of_two_is_named(run, tiny_gguf):
    path = tiny_gguf.with_name("Wan2.2-T2V-A14B-HighNoise-Q8_0.gguf")
    path.write_bytes(tiny_gguf.read_bytes())
    code, _, err = run(gguf_path=path)
    assert code == 0 and "warning: " in err and "one of the two experts of Wan2.2" in err


def test_failures_are_one_line(run, tmp_path):
    spec = shrunk("i2v-14B")
    write_checkpoint(tmp_path / "i2v", spec)
    other = tmp_path / "i2v" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "list.yaml").write_text("- 1")
    for flags, code, message in [
        ({"gguf_path": "absent.gguf"}, 2, "no file absent.gguf"),
        ({"gguf_path": __file__}, 1, "not a safetensors, PyTorch or GGUF file"),
        ({"gguf_path": other}, 1, "holds a Wan i2v transformer"),
        ({"gguf_path": TINY / "Wan2.1_VAE.pth"}, 1, "looks like a Wan2.1 VAE"),
        ({"base_model_path": "no/such/folder"}, 2, "--base_model_path: no folder"),
        ({"base_model_path": tmp_path}, 1, "vae is missing"),
        ({"config_path": "absent.yaml"}, 2, "no config file absent.yaml"),
        ({"config_path": tmp_path / "list.yaml"}, 1, "must hold a table"),
        ({"height": 70}, 2, "--width*--height 64*70"),
        ({"height": "tall"}, 2, "must be WIDTH*HEIGHT"),
        ({"video_length": 6}, 2, "--video_length"),
        ({"num_inference_steps": 0}, 2, "--num_inference_steps must be"),
        ({"guidance_scale": -1}, 2, "--guidance_scale must be"),
        ({"guidance_scale": "high"}, 2, "--guidance_scale must be"),
        ({"shift": 0}, 2, "--shift must be"),
        ({"seed": "x"}, 2, "--seed must be"),
        ({"dtype": "int8"}, 2, "unknown --dtype"),
        ({"device": "tpu"}, 2, "unknown --device"),
        ({"output_path": tmp_path / "a.gif"}, 2, "--output_path must end in .mp4"),
        ({"output_path": tmp_path / "no" / "a.mp4"}, 2, "--output_path: no folder"),
        ({"prompt": " "}, 2, "the prompt is empty"),
        ({"enable_magic": True}, 2, "unrecognized arguments: --enable_magic"),
        ({"gguf_path": None}, 2, "--gguf_path"),
    ]:
        got, report, err = run(**flags)
        assert (got, report) == (code, None), (flags, err)
        assert message in err.splitlines()[-1] and err.count("error: ") == 1, (flags, err)
        assert not (tmp_path / "out.mp4").exists()
