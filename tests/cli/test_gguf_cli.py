"""GGUF files through the command line: every task, both experts, the text encoder, and files that do not fit."""

import json
import shutil

import pytest
import torch

from benchmarks.judge import judge
from tests.unit.tiny_checkpoint import dit_state, shrunk, write_checkpoint
from tests.unit.weight_helpers import DictSource, manifest
from wan import cli
from wan.cli import main
from wan.convert import main as convert
from wan.tasks import load_task
from wan.weights.write.export import data_bytes, export_gguf, plan_tensors, write_header
from wan.weights.write.recipes import RECIPES

TINY = load_task("t2v-tiny")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded transformer and text encoder as GGUF files, and a folder with the rest."""
    from wan.tasks import embedded_checkpoint

    folder = tmp_path_factory.mktemp("gguf")
    source = embedded_checkpoint(TINY)
    assert (
        convert(["--type", "Q8_0", "--checkpoint-dir", str(source), "--output", f"{folder}/dit.gguf", "--quiet"]) == 0
    )
    flags = ["--component", "t5", "--checkpoint-dir", str(source), "--output", f"{folder}/t5.gguf", "--quiet"]
    assert convert(["--type", "Q8_0", *flags]) == 0
    rest = folder / "rest"
    for name in (TINY.files.vae, TINY.files.tokenizer):
        target = rest / name
        target.parent.mkdir(parents=True, exist_ok=True)
        found = source / name
        shutil.copytree(found, target) if found.is_dir() else shutil.copy(found, target)
    return folder


def generate(capsys, *args):
    capsys.readouterr()
    code = main([*map(str, args)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else None, err


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_transformer_and_text_encoder_from_gguf(tiny, tmp_path, capsys, mode, monkeypatch):
    """With --ckpt_dir for the VAE and the tokenizer alone: no official .pth of the text encoder is there."""
    import av
    import numpy as np

    monkeypatch.chdir(tmp_path)
    flags = ("--ckpt_dir", tiny / "rest", "--gguf", tiny / "dit.gguf", "--t5_gguf", tiny / "t5.gguf")
    prompt = ("--prompt", "a blue square moving up on a white background", "--seed", 1)
    code, report, _ = generate(capsys, *flags, *prompt, "--gguf_mode", mode, "--save_file", "a.mp4")
    assert code == 0 and report["gguf_mode"] == {"t5": mode, "model": mode}
    with av.open("a.mp4") as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert judge(frames) == ("blue", "square", "up", "white")
    again_flags = ("--replay", "a.mp4", "--replay_files", "--gguf_mode", "resident")
    code, again, _ = generate(capsys, *again_flags, "--save_file", "b.mp4")
    assert again["sha256"] == report["sha256"]  # fp32: both modes give the same bits


def test_auto_decides_from_memory_and_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--gguf", tiny / "dit.gguf", "--sample_steps", 1, "--frame_num", 1, "--seed", 0)
    code, report, err = generate(capsys, *flags, "--save_file", "a.png")
    assert report["gguf_mode"] == {"model": "resident"} and "gguf_mode is resident" in err
    monkeypatch.setattr("wan.plan.machine._ram_of_one", lambda *_: 1000)
    code, report, err = generate(capsys, *flags, "--offload", "model", "--save_file", "b.png")
    assert report["gguf_mode"] == {"model": "stream"} and "GB that are free; " in err
    assert "fp32 weights would take 0.0 GB of 0.0 GB free, so gguf_mode is stream" in err


def test_two_experts(tmp_path, capsys, monkeypatch):
    spec = shrunk("t2v-A14B")
    for module in ("wan.cli", "wan.options"):
        monkeypatch.setattr(f"{module}.load_task", lambda name: spec)
    folder = write_checkpoint(tmp_path / "ckpt", spec)
    for index, expert in enumerate(("high", "low")):
        with torch.random.fork_rng():
            torch.manual_seed(10 + index)
            source = DictSource(dit_state(spec))
        export_gguf(source, tmp_path / f"{expert}.gguf", "Q8_0")
        shutil.rmtree(folder / spec.experts[expert])
    run = ("--task", "t2v-A14B", "--ckpt_dir", folder, "--prompt", "a", "--size", "32*32", "--frame_num", 5)
    run += ("--sample_steps", 4, "--seed", 0, "--dtype", "fp32")
    experts = ("--gguf_high", tmp_path / "high.gguf", "--gguf_low", tmp_path / "low.gguf")
    reports = {}
    for mode in ("stream", "resident"):
        code, reports[mode], err = generate(
            capsys, *run, *experts, "--gguf_mode", mode, "--save_file", tmp_path / f"{mode}.mp4"
        )
        assert code == 0, err
        assert reports[mode]["gguf_mode"] == {"high": mode, "low": mode}
    assert reports["stream"]["sha256"] == reports["resident"]["sha256"]
    swapped = ("--gguf_high", tmp_path / "low.gguf", "--gguf_low", tmp_path / "high.gguf")
    code, other, _ = generate(capsys, *run, *swapped, "--save_file", tmp_path / "c.mp4")
    assert other["sha256"] != reports["stream"]["sha256"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gguf", "no.gguf"], "--gguf: no file no.gguf"),
        (
            ["--task", "t2v-tiny", "--gguf_high", "a.gguf"],
            "--gguf_high has no meaning for t2v-tiny; single files it takes: --dit",
        ),
        (["--gguf", "a.gguf", "--dit", "a.gguf"], "--dit and --gguf both name a file"),
        (["--gguf", "a.safetensors"], "a.safetensors is not a GGUF file; for other formats use --dit"),
        (["--gguf", "."], ". is not a GGUF file"),
        (["--gguf", "empty.gguf"], "--gguf: empty.gguf is empty: download it again"),
        (["--gguf_mode", "fast"], "unknown --gguf_mode 'fast'; choose one of: auto, resident, stream"),
        (["--tokenizer", "a.gguf"], "--tokenizer takes a folder, and a.gguf is a file"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    code, _, err = generate(capsys, "--quiet", *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def sparse(path, shapes):
    """A whole file of that size, with Q8_0 blocks of zeros."""
    from tests.unit.weight_helpers import ShapeSource

    planned = plan_tensors(ShapeSource(shapes), RECIPES["Q8_0"])
    with path.open("wb") as file:
        write_header(file, {"general.architecture": "wan"}, planned)
        file.truncate(file.tell() + data_bytes(planned))
    return path


@pytest.mark.parametrize(
    "held, task, says",
    [
        ("vace-14B", "t2v-14B", "the Wan2.1 vace-14B transformer"),
        ("vace-1.3B", "t2v-1.3B", "the Wan2.1 vace-1.3B transformer"),
        ("s2v-14B", "t2v-14B", "the Wan2.2 s2v-14B transformer"),
        ("animate-14B", "i2v-14B", "the Wan2.2 animate-14B transformer"),
        ("t2v-14B", "t2v-1.3B", "the Wan2.1 t2v-14B transformer"),
    ],
)
def test_the_model_of_another_task_says_so(held, task, says, tmp_path, capsys, monkeypatch):
    path = sparse(tmp_path / "model.gguf", manifest(held))
    folder = write_checkpoint(tmp_path / "ckpt", shrunk(task))
    flags = ["--task", task, "--ckpt_dir", folder, "--gguf", path, "--prompt", "a", "--save_file", tmp_path / "a.mp4"]
    if task.startswith("i2v"):
        from PIL import Image

        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        flags += ["--image", tmp_path / "a.png"]
    code, _, err = generate(capsys, "--quiet", *flags)
    assert code == 1 and f"holds {says}" in err and f"task {task} needs" in err and err.count("\n") == 1


def test_a_download_that_stopped(tiny, tmp_path, capsys):
    data = (tiny / "dit.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:-1000])
    code, _, err = generate(capsys, "--quiet", "--gguf", path)
    assert code == 1 and "truncated, expected" in err and f"has {len(data) - 1000:,}" in err


def test_dry_run_names_the_file(tiny, capsys):
    code = main(["--dry_run", "--json", "--gguf", str(tiny / "dit.gguf"), "--gguf_mode", "stream"])
    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert str(tiny / "dit.gguf") in [row["path"] for row in plan["files"]]
    main(["--dry_run", "--json", "--gguf", str(tiny / "dit.gguf"), "--gguf_mode", "resident"])
    resident = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"]["denoise"]["ram"] < resident["memory_bytes"]["denoise"]["ram"]
    assert cli.make_parser().parse_args(["--gguf", "a"]).gguf == "a"
