"""Where weights lie, through the command line: every way gives the same video, and what cannot be is one line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from wan.cli import main
from wan.errors import UsageError
from wan.options import build_request
from wan.pipeline import WanPipeline
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.locate import locate
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

QUICK = ("--sample_steps", "4", "--frame_num", "5", "--seed", "1", "--device", "cpu")
WAYS = {
    "none": ("--offload", "none"),
    "model": ("--offload", "model"),
    "block": ("--offload", "block", "--resident_blocks", "0"),
    "block with some resident": ("--offload", "block", "--resident_blocks", "2"),
    "phase": ("--offload", "phase", "--resident_blocks", "1"),
}


@pytest.fixture
def generate(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(*args):
        capsys.readouterr()
        code = main([*QUICK, *map(str, args)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 and out.startswith("{") else out, err

    return of


@pytest.fixture
def files(tmp_path):
    """A GGUF file and a LoRA for t2v-tiny."""
    source = open_source(embedded_checkpoint(load_task("t2v-tiny")) / "diffusion_pytorch_model.safetensors")
    export_gguf(source, tmp_path / "model.gguf", "Q8_0")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(6):
        name = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{name}.lora_up.weight"] = torch.randn(192, 4, generator=generator) * 0.2
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 192, generator=generator) * 0.2
    save_file(tensors, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "what",
    [
        (),
        ("--task", "i2v-tiny"),
        ("--gguf", "model.gguf", "--gguf_mode", "stream", "--lora", "lora.safetensors"),
        ("--lora", "lora.safetensors:0.5", "--fbcache", "--fb_thresh", "0.2", "--cache_force"),
    ],
)
def test_every_way_makes_the_same_video(generate, files, what):
    found = {}
    for name, way in WAYS.items():
        code, report, err = generate(*what, *way)
        assert code == 0, err
        found[name] = report["sha256"]
        seconds, is_streamed = report["seconds"], way[1] in ("block", "phase")
        assert report["offload"] == way[1] and ("wait_for_blocks" in seconds) == is_streamed
        assert ("swap" in seconds) == ("i2v-tiny" in what)
    assert len(set(found.values())) == 1, found


def test_a_video_does_not_store_where_weights_lay():
    stored = build_request({"offload": "block", "resident_blocks": 2, "ram_gb": 9, "vae_offload": True}).settings()
    assert not {"offload", "offload_model", "resident_blocks", "ram_gb", "vram_gb", "vae_offload"} & stored.keys()


def test_what_is_released(tmp_path):
    def kept(**options):
        options |= {"device": "cpu", "sample_steps": 1, "frame_num": 1, "save_file": str(tmp_path / "a.png")}
        request = build_request(options)
        pipe = WanPipeline.from_request(request, load_task(request.load.task))
        pipe(request)
        return set(pipe._models) | {name for name in ("model",) if name in pipe.experts}

    assert kept() == kept(offload_model=True) == kept(offload="block") == set()
    assert kept(offload="none") == kept(offload_model=False) == {"t5", "model", "vae"}
    assert kept(offload="none", vae_offload=True) == {"t5", "model"}
    assert kept(offload="model", vae_offload=False) == {"vae"}
    assert kept(offload="model", t5_offload=False) == {"t5"}
    with pytest.raises(UsageError, match="--clip_offload has no meaning for t2v-tiny, which has no image encoder"):
        build_request({"clip_offload": True})


def test_the_start_says_what_lies_where(generate):
    code, _, err = generate("--offload", "block", "--resident_blocks", "2")
    lines = err.splitlines()
    assert code == 0 and any("2 of 6 blocks" in line and "disk" in line for line in lines), err
    code, _, quiet = generate("--offload", "block", "--quiet")
    assert code == 0 and quiet == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--offload", "blocks"), "unknown --offload 'blocks'; choose one of: auto, none, model, block, phase"),
        (("--offload", "block", "--offload_model", "false"), "--offload_model false contradicts --offload block"),
        (("--offload", "none", "--offload_model", "true"), "--offload_model true contradicts --offload none"),
        (("--resident_blocks", "2"), "--resident_blocks is for --offload block and phase"),
        (
            ("--offload", "block", "--resident_blocks", "7"),
            "--resident_blocks must be a whole number from 0 to 6",
        ),
        (("--vram_gb", "8"), "--vram_gb is for a GPU, this run is on the CPU: use --ram_gb"),
        (("--ram_gb", "-1"), "--ram_gb must be a number of GB (of 10^9 bytes) above 0, not -1"),
        (("--ram_gb", "much"), "--ram_gb must be a number of GB"),
    ],
)
def test_bad_input_is_one_line(generate, flags, message):
    code, out, err = generate(*flags)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_budget_that_is_too_small_says_by_how_much_before_anything_is_loaded(generate, monkeypatch, dry):
    monkeypatch.setattr(WanPipeline, "_load_t5", lambda self: pytest.fail("loaded"))
    code, out, err = generate("--ram_gb", "0.1", *dry)
    assert code == 2 and "GB more than --ram_gb 0.1; " in err.splitlines()[-1], err


def test_fsdp_and_streaming_exclude_each_other():
    with pytest.raises(UsageError, match="--dit_fsdp shares the weights out, and --offload block streams them"):
        build_request({"dit_fsdp": True, "offload": "block"}, 2)


def test_quantised_weights_from_the_hub_stay_packed_as_local_ones_do(tmp_path, monkeypatch):
    spec = load_task("t2v-tiny")
    files = locate(embedded_checkpoint(spec), spec)
    parts = {"dit": open_source(files.dit["model"]), "t5": open_source(files.t5), "vae": open_source(files.vae)}
    form = Form("fp8", torch.float32)
    export_folder(parts, tmp_path / "fp8", form, copies={spec.files.tokenizer: files.tokenizer}, config={})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path / "fp8"))
    options = {"device": "cpu", "gguf_mode": "stream", "save_file": str(tmp_path / "a.mp4")}
    for where in ("somebody/tiny-fp8", str(tmp_path / "fp8")):
        pipe = WanPipeline.from_request(build_request(options | {"ckpt_dir": where}), spec)
        assert pipe.placement.packed == {"t5": "stream", "model": "stream"}


def test_a_gguf_file_beside_a_quantised_folder_is_one_line(generate, files, tmp_path):
    spec = load_task("t2v-tiny")
    own = locate(embedded_checkpoint(spec), spec)
    parts = {"dit": open_source(own.dit["model"]), "t5": open_source(own.t5), "vae": open_source(own.vae)}
    copies = {spec.files.tokenizer: own.tokenizer}
    export_folder(parts, tmp_path / "int8", Form("int8", torch.float32), copies=copies, config={})
    for dry in ((), ("--dry_run",)):
        code, out, err = generate("--ckpt_dir", "int8", "--gguf", "model.gguf", *dry)
        line = err.splitlines()[-1]
        assert code == 2 and line.startswith("error: --gguf ") and "both hold quantised weights" in line
    assert generate("--ckpt_dir", "int8", "--dit", own.dit["model"][0])[0] == 0


@pytest.mark.parametrize("where", ["cpu", "stream"])
def test_the_text_encoder_where_a_gpu_has_no_room_for_it(tmp_path, where):
    options = {"device": "cpu", "sample_steps": 2, "frame_num": 5, "seed": 1, "save_file": str(tmp_path / "a.mp4")}
    request, spec = build_request(options), load_task("t2v-tiny")
    wanted = WanPipeline.from_request(request, spec)(request).latents
    pipe = WanPipeline.from_request(request, spec)
    pipe.placement = replace(pipe.placement, text=where)  # as the plan has it for a small GPU
    assert torch.equal(pipe(request).latents, wanted)
