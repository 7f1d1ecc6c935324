"""The task told from a checkpoint: by shapes, by what lies where, and by names where shapes are alike."""

import subprocess
import sys

import pytest

from tests.unit.weight_helpers import REPO, dit_shapes, manifest, sparse
from wan import convert
from wan.cli import main
from wan.errors import SwanError, UsageError
from wan.options import build_load, build_request
from wan.tasks import embedded_checkpoint, load_task, task_names
from wan.weights.infer_task import infer_task

TINY = str(embedded_checkpoint(load_task("t2v-tiny")))
MANIFESTS = {"t2v-A14B": "t2v-A14B", "i2v-A14B": "i2v-A14B", "vace-A14B": "vace-14B"}
RELEASED = [name for name in task_names() if not load_task(name).get("checkpoint")]


def official(folder, task, shapes=None):
    for part in load_task(task).get("experts", {"model": "."}).values():
        sparse(folder / part / "diffusion_pytorch_model.safetensors", shapes or dit_shapes(task))
    return str(folder)


def diffusers(folder, task):
    for part in ("transformer", "transformer_2")[: len(load_task(task).get("experts", "1"))]:
        sparse(folder / part / "diffusion_pytorch_model.safetensors", dit_shapes(task))
    return str(folder)


@pytest.mark.parametrize("layout", [official, diffusers])
@pytest.mark.parametrize("task", task_names())
def test_every_task_is_told_from_its_folder(tmp_path, task, layout):
    assert infer_task(layout(tmp_path / "x", task), {}) == (task, "told from the checkpoint")


@pytest.mark.parametrize("task", RELEASED)
def test_every_released_checkpoint(tmp_path, task):
    shapes = manifest(MANIFESTS.get(task, task))
    assert infer_task(official(tmp_path / "x", task, shapes), {})[0] == task


@pytest.mark.parametrize("task", RELEASED)
def test_every_task_is_told_from_single_files(tmp_path, task):
    flags = {"high": "a", "low": "b"} if "experts" in load_task(task) else {"dit": "wan2.1"}
    files = {part: str(sparse(tmp_path / f"{name}.safetensors", dit_shapes(task))) for part, name in flags.items()}
    assert infer_task("", files) == (task, f"told from {next(iter(files.values()))}")


@pytest.mark.parametrize("task", RELEASED)
def test_hub_ids_are_told_by_name(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for hub in load_task(task).hub:
        assert infer_task(hub, {}) == infer_task(f"{hub}@main", {}) == (task, "told from the hub id")


@pytest.mark.parametrize(
    "task, name, words",
    [
        ("t2v-14B", "model", ["may be t2v-14B, or one of the two experts of t2v-A14B", "--task", "--high and --low"]),
        ("vace-14B", "model", ["may be vace-14B, or one of the two experts of vace-A14B"]),
        ("t2v-14B", "wan2.2_t2v", ["one of the two experts of t2v-A14B"]),
        ("t2v-14B", "wan_high_noise_14B", ["one of the two experts of t2v-A14B"]),
        ("i2v-A14B", "wan2.1", ["one of the two experts of i2v-A14B, as it seems; give both"]),
    ],
)
def test_one_of_two_experts_is_refused(tmp_path, task, name, words):
    path = sparse(tmp_path / f"{name}.safetensors", dit_shapes(task))
    with pytest.raises(UsageError) as error:
        infer_task("", {"dit": str(path)})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_names_decide_between_shapes_that_are_alike(tmp_path):
    for name in ("Wan2.1-T2V-14B/model", "wan2_1_t2v_14B", "Wan21_T2V"):
        path = sparse(tmp_path / f"{name}.safetensors", dit_shapes("t2v-14B"))
        assert infer_task("", {"dit": str(path)})[0] == "t2v-14B"
    folder = tmp_path / "one"
    sparse(folder / "Wan2.2-HighNoise.safetensors", dit_shapes("t2v-14B"))
    with pytest.raises(UsageError, match="two experts of t2v-A14B"):
        infer_task(str(folder), {})


def test_what_cannot_be_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit = sparse(tmp_path / "x.safetensors", {**dit_shapes("t2v-1.3B"), "blocks.30.ffn.0.weight": (8960, 1536)})
    for ckpt_dir, files, kind, words in (
        (
            "org/unknown",
            {},
            UsageError,
            "org/unknown: not here to be looked into: say with --task what it is: animate-14B",
        ),
        (str(tmp_path), {}, SwanError, "31 layers); no task has such a transformer"),
        ("", {"dit": str(dit)}, SwanError, "31 layers); no task has such a transformer"),
        ("", {"low": f"{TINY}/diffusion_pytorch_model.safetensors"}, SwanError, "no task of two experts has such"),
        ("", {"dit": f"{TINY}/Wan2.1_VAE.pth"}, SwanError, "looks like a Wan2.1 VAE"),
        (f"{TINY}/google", {}, SwanError, "the transformer is missing"),
    ):
        with pytest.raises(kind) as error:
            infer_task(ckpt_dir, files)
        assert words in str(error.value), str(error.value)
        assert type(error.value) is UsageError or kind is SwanError


def test_options_take_it(tmp_path):
    load = build_load({"ckpt_dir": official(tmp_path / "x", "t2v-1.3B")})
    assert (load.task, load.task_told) == ("t2v-1.3B", "told from the checkpoint")
    gguf = {"dit": f"{TINY}/diffusion_pytorch_model.safetensors", "seed": 1}
    assert build_request(gguf).load.task == "t2v-tiny" and build_request({**gguf, "task": "i2v-tiny", "dit": None})
    assert build_request({"seed": 1, "vae": f"{TINY}/Wan2.1_VAE.pth"}).load.task_told == ""


def test_it_is_said(tmp_path, capsys):
    flags = ["--ckpt_dir", TINY, "--frame_num", "1", "--sample_steps", "1", "--size", "32*32", "--seed", "1"]
    assert main([*flags, "--save_file", str(tmp_path / "x.png")]) == 0
    assert "task: t2v-tiny, told from the checkpoint\n" in capsys.readouterr().err
    assert main([*flags, "--dry_run"]) == 0
    assert "task: t2v-tiny, told from the checkpoint" in capsys.readouterr().out


def test_no_torch_for_it():
    code = f"import sys, wan.options as o; o.build_load({{'ckpt_dir': {TINY!r}}}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_quantised_files(tmp_path, capsys):
    for kind, more in (("mlx", ["--quantize", "--group-size", "32"]), ("fp8", [])):
        folder = str(tmp_path / kind)
        flags = ["--to", kind, "--checkpoint-dir", TINY, "--output-dir", folder, "--quiet", *more]
        assert convert.main(flags) == 0, capsys.readouterr()
        assert infer_task(folder, {})[0] == "t2v-tiny"
