"""generate.py as a user meets it: exit codes, one line on failure, one JSON line on success, replay."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan.cli import main
from wan.errors import SwanError
from wan.media import read_settings

REPO = Path(__file__).parents[2]


class StandIn:
    """A pipeline of the real one's interface that draws noise by seed instead of sampling."""

    fail = None  # raised after denoising
    early = None  # raised before
    notes, placement = (), types.SimpleNamespace(offload="none", packed={})
    plan, attention = {"notes": (), "seconds": {}}, "sdpa"

    @classmethod
    def from_load(cls, load, spec, parallel):
        pipe = cls()
        pipe.load, pipe.parallel, pipe.latents, pipe.asked_loras = load, parallel, None, {}
        pipe.device = types.SimpleNamespace(type=load.device)
        return pipe

    def plan_for(self, request):
        return self.plan

    def decided(self, request):
        return request

    def take_notes(self):
        return []

    def __call__(self, request, progress, **others):
        import torch

        if self.early:
            raise self.early
        for done in range(request.sample.steps + 1):
            progress("denoise", done, request.sample.steps)
        self.latents = torch.zeros(
            16, (request.sample.frame_num - 1) // 4 + 1, request.sample.height // 8, request.sample.width // 8
        )
        if self.fail:
            raise self.fail
        shape = (request.sample.frame_num, request.sample.height, request.sample.width, 3)
        frames = np.random.default_rng(request.sample.seed).integers(0, 255, shape, dtype=np.uint8)
        made = types.SimpleNamespace(clips=1, frames=len(frames), sha256=[hashlib.sha256(frames.tobytes()).hexdigest()])
        return types.SimpleNamespace(frames=frames, latents=self.latents, seconds={"denoise": 0.5}, made=made)


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """The stand-in in place of wan.pipeline, in an empty folder."""
    stand_in = type("WanPipeline", (StandIn,), {})
    monkeypatch.setattr("wan.engine.WanPipeline", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


def generate(*args, env=None, cwd=None, check_torch=False):
    """generate.py in a process of its own. With check_torch, a line on stderr if torch got imported."""
    command = [sys.executable, str(REPO / "generate.py"), *args]
    if check_torch:
        code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        code += (
            f"sys.argv = {['generate.py', *args]!r}; runpy.run_path({str(REPO / 'generate.py')!r}, run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(REPO), **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)


def test_help_imports_no_torch():
    done = generate("--help", check_torch=True)
    assert done.returncode == 0 and done.stderr.strip() == "False"
    official = (
        "task size frame_num ckpt_dir offload_model t5_cpu save_file prompt base_seed image first_frame last_frame"
    )
    official += " sample_solver sample_steps sample_shift sample_guide_scale convert_model_dtype"
    for flag in official.split():
        assert f"--{flag}" in done.stdout


def test_refusals_of_wrong_options_import_no_torch(tmp_path):
    done = generate(
        "--task", "t2v-1.3B", "--prompt", "a", "--dry_run", "--size", "65*64", cwd=tmp_path, check_torch=True
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "False"


def test_dry_run_of_a_hub_id(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--dry_run", "--json", "--task", "t2v-1.3B", "--ckpt_dir", "Wan-AI/Wan2.1-T2V-1.3B", "--prompt", "a cat"]
    assert main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 32_760 and not list(tmp_path.iterdir())


def test_dry_run_names_what_is_missing(tmp_path, capsys):
    args = ["--task", "t2v-1.3B", "--ckpt_dir", str(tmp_path), "--prompt", "a", "--save_file", str(tmp_path / "a.mp4")]
    assert main(["--dry_run", *args]) == 1
    out, err = capsys.readouterr()
    assert "32760 tokens" in out and "MISSING" in out
    assert err.startswith("error: missing: ") and err.count("\n") == 1 and "Wan2.1_VAE.pth" in err


@pytest.mark.parametrize(
    "args",
    [
        ["--task", "t2v-9B"],
        ["--size", "65*64"],
        ["--frame_num", "16"],
        ["--ckpt_dir", "/no/such/folder"],
        ["--prompt", ""],
        ["--save_file", "/no/such/folder/a.mp4"],
        ["--offload_model", "perhaps"],
        ["--no_such_flag"],
        ["--sample_steps"],
        ["--samp", "3"],
        ["--replay", "/no/such/file.mp4"],
        ["--device", "cuda:99"],
    ],
)
def test_usage_errors_are_one_line_and_exit_2(pipeline, capsys, tmp_path, args):
    assert main([*args, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unreadable_image_exits_1(pipeline, capsys, tmp_path):
    (tmp_path / "bad.png").write_text("<html>")
    assert main(["--task", "i2v-14B", "--ckpt_dir", ".", "--prompt", "a", "--image", "bad.png"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read image bad.png")


def test_a_run_prints_one_json_line(pipeline, capsys, tmp_path):
    assert main(["--sample_steps", "3", "--base_seed", "7", "--save_file", "a.mp4"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert out.count("\n") == 1
    assert (report["task"], report["seed"], report["size"], report["frames"]) == ("t2v-tiny", 7, "64x64", 17)
    assert report["steps"] == 3 and set(report["seconds"]) == {"denoise", "save", "total"}
    assert report["peak_memory_bytes"] > 1e6 and len(report["sha256"]) == 64
    assert report["file"] == str(tmp_path / "a.mp4") and (tmp_path / "a.mp4").is_file()
    assert "seed 7" in err and "denoise" in err


def test_quiet(pipeline, capsys):
    assert main(["--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["seed"] >= 0


def test_replay_makes_the_same_video(pipeline, capsys, tmp_path):
    assert main(["--quiet", "--size", "80x64", "--save_file", "a.mp4"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["--quiet", "--replay", "a.mp4", "--save_file", "b.mp4"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["sha256"], again["size"], again["seed"]) == (first["sha256"], "80x64", first["seed"])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert main(["--quiet", "--replay", "b.mp4", "--seed", "5", "--save_file", "c.mp4"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] != first["sha256"]
    assert read_settings("c.mp4")["seed"] == 5


def test_replay_of_one_frame(pipeline, capsys):
    assert main(["--quiet", "--frame_num", "1", "--save_file", "a.png"]) == 0
    assert main(["--quiet", "--replay", "a.png", "--save_file", "b.png"]) == 0
    first, again = (json.loads(line)["sha256"] for line in capsys.readouterr().out.splitlines())
    assert first == again


def test_replay_of_a_file_without_settings(pipeline, capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert main(["--replay", "plain.png"]) == 1
    assert "holds no Swan settings" in capsys.readouterr().err


def test_failure_after_denoising_keeps_the_latents(pipeline, capsys, tmp_path):
    pipeline.fail = RuntimeError("decoder\nbroke")
    assert main(["--quiet", "--save_file", "a.mp4"]) == 1
    err = capsys.readouterr().err
    kept = tmp_path / "a.mp4.latents.safetensors"
    assert err == f"error: RuntimeError: decoder broke; the latents are kept in {kept}\n"
    assert [item.name for item in tmp_path.iterdir()] == [kept.name]


def test_failed_save_keeps_the_latents_elsewhere(pipeline, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    other = tmp_path / "temporary"
    folder.mkdir()
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    vanish = pipeline.__call__

    def folder_goes_away(self, request, progress, **others):
        result = vanish(self, request, progress)
        folder.rmdir()
        return result

    monkeypatch.setattr(pipeline, "__call__", folder_goes_away)
    assert main(["--quiet", "--save_file", str(folder / "a.mp4")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write {folder / 'a.mp4'}: ") and err.count("\n") == 1
    kept = other / "a.mp4.latents.safetensors"
    assert err.endswith(f"; the latents are kept in {kept}\n") and kept.is_file()


def test_kept_latents_of_two_runs_and_of_a_long_name(pipeline, capsys, tmp_path):
    pipeline.fail = RuntimeError("x")
    name = "é" * 120 + ".mp4"  # 244 bytes
    for _ in range(2):
        assert main(["--quiet", "--save_file", name]) == 1
        assert "the latents are kept in " in capsys.readouterr().err
    kept = sorted(item.name for item in tmp_path.iterdir())
    assert len(kept) == 2 and kept[0].endswith("é-2.latents.safetensors") and kept[1].endswith("é.latents.safetensors")
    assert all(len(name.encode()) <= 255 for name in kept)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (SwanError("vae.pth: truncated"), 1, "error: vae.pth: truncated\n"),
        (ValueError("a\nb"), 1, "internal error: ValueError: a b (set SWAN_DEBUG=1 to see where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failure_before_denoising(pipeline, capsys, tmp_path, error, code, line):
    pipeline.early = error
    assert main(["--quiet"]) == code
    assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_interrupt_after_denoising_leaves_no_file(pipeline, capsys, tmp_path):
    pipeline.fail = KeyboardInterrupt()
    assert main(["--quiet", "--save_file", "a.mp4"]) == 130
    assert capsys.readouterr().err == "interrupted\n" and not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(pipeline, capsys, monkeypatch):
    monkeypatch.setenv("SWAN_DEBUG", "1")
    pipeline.early = ValueError("x")
    assert main([]) == 1
    assert "Traceback" in capsys.readouterr().err
