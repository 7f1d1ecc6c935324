"""--dry_run refuses what the run refuses, in the same words, and loads and downloads nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.weight_helpers import dit_shapes, sparse
from wan.cli import main
from wan.options import build_request
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.locate import locate
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

SPEC = load_task("t2v-tiny")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the embedded checkpoint in an empty folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(embedded_checkpoint(SPEC), tmp_path / "ckpt")
    return tmp_path / "ckpt"


def both(capsys, *args):
    """(exit code, message) of a dry run. The run has the same code, and tells the first of what is wrong."""
    flags = [*map(str, args), "--seed", "1", "--device", "cpu", "--quiet"]
    told = []
    for dry in (["--dry_run"], []):
        code = main([*flags, *dry])
        told.append((code, capsys.readouterr().err))
    (code, dry), (run_code, run) = told
    assert code == run_code and dry.startswith(run.strip()) and dry.count("\n") == 1
    return code, dry


def test_a_transformer_of_another_task(folder, capsys):
    sparse(folder / "diffusion_pytorch_model.safetensors", dit_shapes("t2v-1.3B"))
    code, err = both(capsys, "--task", "t2v-14B", "--ckpt_dir", folder, "--prompt", "a cat")
    assert code == 1 and "holds the Wan2.1 t2v-1.3B transformer" in err and "task t2v-14B needs dim 5120" in err


def test_a_text_encoder_in_place_of_the_transformer(folder, capsys):
    export_gguf(open_source(locate(folder, SPEC).t5), folder.parent / "t5.gguf", "Q8_0")
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder, "--gguf", "t5.gguf")
    assert code == 1 and "t5.gguf: not a Wan transformer" in err and "looks like a T5 encoder" in err


def test_a_vae_in_place_of_the_text_encoder(folder, capsys):
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder, "--t5", locate(folder, SPEC).vae[0])
    assert code == 1 and "internal error" not in err and "T5" in err


def test_a_file_that_is_cut_short(folder, capsys):
    export_gguf(open_source(folder / "diffusion_pytorch_model.safetensors"), folder.parent / "a.gguf", "Q8_0")
    whole = (folder.parent / "a.gguf").read_bytes()
    (folder.parent / "a.gguf").write_bytes(whole[:-1000])
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder, "--gguf", "a.gguf")
    assert code == 1 and "a.gguf: truncated, expected" in err
    [vae] = locate(folder, SPEC).vae
    vae.write_bytes(vae.read_bytes()[:-1000])
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder)
    assert code == 1 and vae.name in err


def test_a_lora_of_another_width(folder, capsys):
    name = "diffusion_model.blocks.0.self_attn.q.lora_"
    save_file({f"{name}A.weight": torch.ones(4, 5120), f"{name}B.weight": torch.ones(5120, 4)}, "14b.safetensors")
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder, "--lora", "14b.safetensors")
    assert code == 1 and "14b.safetensors" in err and "5120" in err


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard(folder, capsys, has_index):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = [f"diffusion_pytorch_model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for shard, half in zip(shards, halves):
        save_file({name: tensors[name] for name in half}, folder / shard)
    if has_index:
        index = {"weight_map": {name: shard for shard, half in zip(shards, halves) for name in half}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["--dry_run", "--task", "t2v-tiny", "--ckpt_dir", str(folder)]) == 0
    capsys.readouterr()
    (folder / shards[1]).unlink()
    code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder)
    assert code == 1 and (
        "1 of 2 shards are missing" in err if has_index else "patch_embedding" in err or "lacks" in err
    )


def test_a_tensor_that_is_missing(folder, capsys):
    """In each component: told before anything is loaded."""
    files = locate(folder, SPEC)
    for path in (files.dit["model"][0], *files.vae, *files.t5):
        whole = path.read_bytes()
        is_pth = path.suffix == ".pth"
        tensors = torch.load(path, weights_only=True) if is_pth else load_file(path)
        del tensors[sorted(name for name in tensors if "1" in name)[-1]]
        torch.save(tensors, path) if is_pth else save_file(tensors, path)
        code, err = both(capsys, "--task", "t2v-tiny", "--ckpt_dir", folder)
        assert code == 1 and path.name in err and "missing" in err
        path.write_bytes(whole)


def test_all_that_is_wrong_is_told(folder, capsys):
    files = locate(folder, SPEC)
    for path in (*files.vae, *files.t5):
        path.write_bytes(b"<html>")
    assert main(["--dry_run", "--task", "t2v-tiny", "--ckpt_dir", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("a web page, not weights") == 2 and err.count("\n") == 1


def test_all_that_is_missing_is_told(folder, capsys):
    files = locate(folder, SPEC)
    for path in (*files.vae, *files.t5):
        path.unlink()
    assert main(["--dry_run", "--task", "t2v-tiny", "--ckpt_dir", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out.count("MISSING") == 2 and err.startswith("error: missing: ") and err.count("\n") == 1


@pytest.fixture
def hub(folder, monkeypatch):
    """That checkpoint in the cache of the hub, as org/tiny; any other id is refused without network."""
    cache = folder.parent / "cache"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    return snapshot


def test_a_hub_id_is_looked_into_where_it_has_been_downloaded(hub, capsys):
    assert main(["--dry_run", "--json", "--task", "t2v-tiny", "--ckpt_dir", "org/tiny"]) == 0
    rows = json.loads(capsys.readouterr().out)["files"]
    assert all(row["bytes"] and not row["hub"] for row in rows)
    [vae] = locate(hub, SPEC).vae
    vae.write_bytes(vae.read_bytes()[:1000])
    assert main(["--dry_run", "--task", "t2v-tiny", "--ckpt_dir", "org/tiny"]) == 1
    assert vae.name in capsys.readouterr().err
    vae.unlink()  # the rest is still to come
    assert main(["--dry_run", "--json", "--task", "t2v-tiny", "--ckpt_dir", "org/tiny"]) == 0
    rows = {row["component"]: row for row in json.loads(capsys.readouterr().out)["files"]}
    assert rows["vae"]["hub"] and rows["vae"]["bytes"] is None and not rows["dit"]["hub"]


def test_a_hub_id_is_not_downloaded(hub, capsys):
    assert main(["--dry_run", "--json", "--task", "t2v-tiny", "--ckpt_dir", "org/other"]) == 0
    assert all(row["hub"] for row in json.loads(capsys.readouterr().out)["files"])
    assert main(["--dry_run", "--ckpt_dir", "org/other"]) == 2
    assert "say with --task what it is" in capsys.readouterr().err


def test_a_gpu_that_is_not_here(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("it is")
    flags = ["--dry_run", "--task", "t2v-tiny", "--ckpt_dir", str(folder), "--device", "cuda"]
    for more, memory in ((["--vram_gb", "8"], "taken to be 8.0 GB"), ([], "unknown (--vram_gb says it)")):
        assert main([*flags, *more]) == 0
        assert f"no such device: its memory is {memory}, its rates are assumed" in capsys.readouterr().out


def test_the_plan_is_that_of_the_run(folder, capsys):
    from wan.pipeline import WanPipeline

    flags = {"ckpt_dir": str(folder), "device": "cpu", "seed": 1, "ram_gb": 8, "save_file": "a.mp4"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["--dry_run", "--json", *words]) == 0
    dry = json.loads(capsys.readouterr().out)
    request = build_request(flags)
    plan = WanPipeline.from_request(request, load_task(request.load.task)).plan
    measured = {"machine", "seconds", "transfers"}
    assert {name: dry[name] for name in dry.keys() - measured} == {name: plan[name] for name in plan.keys() - measured}
    assert dry["machine"]["is_measured"] and dry["seconds"].keys() == plan["seconds"].keys()
