"""The plan's numbers against the published tables and the real checkpoints' sizes."""

import json
import math
import struct
from dataclasses import replace

import pytest
from wan.distributed.grid import Grid

from wan.errors import UsageError
from wan.models.dit import WanModel
from wan.options import build_request
from wan.plan import (
    Machine,
    Placement,
    Plan,
    Workload,
    check_one_quantised,
    choose,
    format_plan,
    forward_flops,
    look,
    make_plan,
    missing_files,
    parameters,
    start_lines,
)
from wan.plan.runs import build, decoding, denoising_bytes
from wan.plan.transfers import exposed_seconds
from wan.plan.weights import Component, Reading, Sizes, as_gguf, count_parameters
from wan.tasks import load_task

# TFLOP of one forward: latent, linear, self-attention, cross-attention, total
WORK = [
    ("t2v-1.3B", (16, 21, 60, 104), 82, 198, 3, 283),
    ("t2v-14B", (16, 21, 60, 104), 785, 879, 14, 1678),
    ("t2v-14B", (16, 21, 90, 160), 1810, 4682, 32, 6523),
    ("ti2v-5B", (48, 31, 44, 80), 238, 274, 5, 517),
]
# Parameters of the real state dicts
PARAMETERS = {
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "i2v-14B": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
    "t2v-A14B": 14_288_491_584,
    "i2v-A14B": 14_288_901_184,
    "ti2v-5B": 4_999_787_712,
}


@pytest.mark.parametrize("task, latent, linear, self_attention, cross, total", WORK)
def test_work_matches_the_table(task, latent, linear, self_attention, cross, total):
    work = forward_flops(load_task(task), latent).by_kind()
    assert work["linear"] / 1e12 == pytest.approx(linear, rel=0.01)
    assert work["self_attention"] / 1e12 == pytest.approx(self_attention, rel=0.01)
    assert round(work["cross_attention"] / 1e12) == cross
    assert sum(work.values()) / 1e12 == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("task", PARAMETERS)
def test_parameters_are_those_of_the_checkpoints(task):
    counts = parameters(load_task(task))
    assert counts["dit"] == PARAMETERS[task]
    assert counts["text"] == 5_680_910_336
    assert counts["vae"] == (704_688_668 if task == "ti2v-5B" else 126_892_531)
    # But for the projection to the space of texts, which nobody reads.
    assert counts.get("clip", 0) == (632_076_800 - 1280 * 1024 if task in ("i2v-14B", "flf2v-14B") else 0)


QUICK = 1e20  # FLOP/s: no run is so long that changes which would take less are looked for, see test_duration
CPU = Machine("cpu", 1 << 40, None, QUICK)
GB = 10**9


def gpu(vram, ram=64, **rates):
    return Machine("cuda", int(ram * GB), int(vram * GB), **{"flops": QUICK, **rates})


def request_of(tmp_path, monkeypatch, **options):
    monkeypatch.chdir(tmp_path)
    request = build_request({"prompt": "a cat", "ckpt_dir": str(tmp_path), **options})
    return request, load_task(request.load.task)


def plan_of(tmp_path, monkeypatch, machine=CPU, **options):
    return make_plan(*request_of(tmp_path, monkeypatch, **options), machine)


def test_plan_of_two_experts(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, monkeypatch, task="t2v-A14B", size="1280*720")
    assert (plan["latent_shape"], plan["tokens"]) == ([16, 21, 90, 160], 75_600)
    assert (plan["steps"], plan["forwards"]) == (40, 80)
    assert sum(plan["steps_by_expert"].values()) == 40
    assert plan["tflop_total"] == pytest.approx(80 * 6523, rel=0.01)
    assert len(missing_files(plan)) == 5 and "MISSING" in format_plan(plan)


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_steps_by_expert_are_those_of_the_solver(tmp_path, monkeypatch, task, solver):
    from PIL import Image

    from wan.solvers import make_solver

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png") if task.startswith("i2v") else None
    plan = plan_of(tmp_path, monkeypatch, task=task, sample_solver=solver, image=image)
    timesteps = make_solver(solver, steps=plan["steps"], shift=plan["shift"]).timesteps
    assert plan["steps_by_expert"]["high"] == int((timesteps >= load_task(task).boundary * 1000).sum())


def test_guidance_of_one_halves_the_forwards(tmp_path, monkeypatch):
    assert plan_of(tmp_path, monkeypatch, task="ti2v-5B", sample_guide_scale=1)["forwards"] == 50


def test_files_are_found_with_their_sizes(tmp_path, monkeypatch):
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"x" * 50)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x" * 7)
    plan = plan_of(tmp_path, monkeypatch, task="t2v-1.3B", vae=str(other))
    sizes = {row["component"]: row["bytes"] for row in plan["files"]}
    assert sizes == {"dit": 100, "t5": 50, "vae": 7, "tokenizer": None}


def test_hub_files_are_not_missing(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, monkeypatch, task="t2v-1.3B", ckpt_dir="Wan-AI/Wan2.1-T2V-1.3B")
    assert not missing_files(plan) and all(row["hub"] for row in plan["files"])


def peaks(plan):
    return {stage: max(sizes.values()) for stage, sizes in plan["memory_bytes"].items()}


def test_bigger_videos_need_more(tmp_path, monkeypatch):
    small = peaks(plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480"))
    large = peaks(plan_of(tmp_path, monkeypatch, task="t2v-14B", size="1280*720"))
    kept = peaks(plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480", offload="none"))
    tiled = peaks(plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480", vae_tile_px=256))
    halved = peaks(plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480", vae_dtype="bf16"))
    assert large["denoise"] > small["denoise"] and large["decode"] > small["decode"]
    assert kept["decode"] > small["decode"] > max(tiled["decode"], halved["decode"])


# What is stored


def write_safetensors(path, tensors):
    """tensors: name -> (type, shape, bytes a value). The data is a hole."""
    header, end = {}, 0
    for name, (kind, shape, size) in tensors.items():
        start = end
        for one in shape:
            size *= one
        end += size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def write_gguf(path, tensors, keys=()):
    """tensors: name -> (shape as stored, ggml type, bytes)."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key in keys:
        data += (
            struct.pack("<Q", len(key))
            + key.encode()
            + struct.pack("<IIQ", 9, 8, 2)
            + 2 * struct.pack("<Q2s", 2, b"ab")
        )
    offset = 0
    for name, (shape, kind, size) in tensors.items():
        data += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        data += struct.pack("<IQ", kind, offset)
        offset += -(-size // 32) * 32
    data += bytes(-len(data) % 32)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + offset)
    return path


def dit_shapes(spec):
    """Name -> shape of all tensors of the DiT."""
    return {name: list(one.shape) for name, one in build("dit", spec.dit).state_dict().items()}


def matrices(spec):
    """Of these, the matrices of the blocks."""
    return {name: one for name, one in dit_shapes(spec).items() if name.startswith("blocks.") and len(one) == 2}


def others(spec):
    """And the rest, as they are stored in BF16 files: name -> (shape as GGUF has it, type, bytes)."""
    packed = matrices(spec)
    return {name: (one[::-1], 30, 2 * math.prod(one)) for name, one in dit_shapes(spec).items() if name not in packed}


@pytest.mark.parametrize("scheme, bits", [("Q8_0", 8.5), ("Q4_K", 4.5), ("fp8", 8), ("int8", 8), ("affine4", 5)])
def test_packed_weights_count_as_stored(tmp_path, monkeypatch, scheme, bits):
    spec = load_task("t2v-1.3B")
    shapes, outside = matrices(spec), others(spec)
    if scheme.startswith("Q"):
        kind = {"Q8_0": 8, "Q4_K": 12}[scheme]
        tensors = {name: ([c, r], kind, int(r * c * bits / 8)) for name, (r, c) in shapes.items()}
        path = write_gguf(tmp_path / "model.gguf", tensors | outside, keys=["a", "b"])
    else:
        tensors = {name: ("BF16", shape[::-1], 2) for name, (shape, _, _) in outside.items()}
        for name, (rows, columns) in shapes.items():
            if scheme == "affine4":
                tensors[name] = ("U32", [rows, columns // 8], 4)
                tensors |= {
                    name.replace("weight", one): ("BF16", [rows, columns // 32], 2) for one in ("scales", "biases")
                }
            else:
                tensors[name] = ({"fp8": "F8_E4M3", "int8": "I8"}[scheme], [rows, columns], 1)
                tensors[name + "_scale"] = ("F32", [rows, 1], 4)
        path = write_safetensors(tmp_path / "model.safetensors", tensors)
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-1.3B", dit=str(path), gguf_mode="stream")
    component = Workload(request, spec).components["model"]
    weights = sum(rows * columns for rows, columns in shapes.values())
    stays = sum((4 if WanModel.keep_fp32(name) else 2) * size // 2 for name, (_, _, size) in outside.items())
    assert component.packed.total == pytest.approx(weights * bits / 8 + stays, rel=0.01)  # rows are padded
    blocks = component.packed.blocks
    assert sum(sum(one.values()) for one in blocks) == pytest.approx(weights * bits / 8, rel=0.01)
    assert component.packed.unpacked == 2 * spec.dit.dim * spec.dit.ffn_dim
    assert len(blocks) == spec.dit.num_layers and all(one == blocks[0] for one in blocks)
    stream, resident = (
        make_plan(request.changed(gguf_mode=mode), spec, CPU)["memory_bytes"]["denoise"]["ram"]
        for mode in ("stream", "resident")
    )
    assert stream < resident


@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B", "ti2v-5B"])
def test_dense_weights_are_those_of_our_model(tmp_path, monkeypatch, task):
    """What stays in fp32 included, and what is streamed of a block."""
    import torch
    from PIL import Image

    from wan.models.dit import WanModel

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    request, spec = request_of(
        tmp_path, monkeypatch, task=task, image=None if task[0] == "t" else str(tmp_path / "a.png")
    )
    with torch.device("meta"):
        model = WanModel(**spec.dit)
    sizes = Workload(request, spec).components["model"].dense
    assert sizes.total == sum(
        one.numel() * (4 if model.keep_fp32(name) else 2) for name, one in model.named_parameters()
    )
    matrices = {part: 0 for part in ("self_attn", "cross_attn", "ffn")}
    for name, one in model.blocks[0].named_parameters():
        if one.ndim == 2:
            matrices[name.split(".")[0]] += 2 * one.numel()
    assert sizes.blocks == (matrices,) * spec.dit.num_layers


@pytest.mark.parametrize("task", ["t2v-1.3B", "ti2v-5B"])
def test_activations_of_the_vae_grow_with_the_picture_and_with_the_video(task):
    vae = load_task(task).vae

    def peak(frames, rows=32):
        return decoding(vae, (vae.z_dim, frames, rows, 32), "fp32", "cpu").peak

    assert peak(1) < peak(2)
    assert peak(2, rows=64) == pytest.approx(2 * peak(2), rel=0.01)
    assert peak(21) - peak(20) == peak(20) - peak(19) == peak(5) - peak(4) > 0  # of these the last two ran
    assert peak(21) < 1.2 * peak(4)


def test_what_processes_share_is_counted_for_each():
    spec = load_task("t2v-14B")

    def peak(device="cpu", **grid):
        return denoising_bytes(spec, (16, 21, 60, 104), "bf16", device, Grid(**grid), "unipc", True, False)

    assert peak(ulysses=4) < peak() and peak(ring=4) < peak()
    assert 0.95 * peak() < peak(cfg=2) <= peak()
    assert peak("cuda") > peak("cpu")  # where GELU is not in place
    halves = [decoding(spec.vae, (16, 3, 60, 104), "fp32", "cpu", ranks=ranks).peak for ranks in (1, 2)]
    assert 0.5 < halves[1] / halves[0] < 0.6


def test_caches_count(tmp_path, monkeypatch):
    def size(**options):
        request, spec = request_of(tmp_path, monkeypatch, task="t2v-1.3B", size="832*480", **options)
        return Workload(request, spec).cache_bytes()

    one = 32_760 * 1536 * 2  # a residual
    assert size() == (0, True)
    assert size(teacache=True) == (one, True)  # of the branch that does not run
    assert size(teacache=True, sample_guide_scale=1) == (0, True)
    assert size(teacache=True, cache_predictor="first") == (3 * one, True)
    assert size(fbcache=True) == (3 * one, True)  # and the reference of each branch
    assert size(fbcache=True, fb_downsample=2) == (2 * one, True)
    assert size(fbcache=True, fb_cfg_sep_diff=False) == (2 * one, True)
    assert size(teacache=True, cache_device="cpu") == (one, False)
    latent = 16 * 21 * 60 * 104 * 4  # bytes
    assert size(easycache=True) == (7 * latent, True)  # three for each branch, and a residual


def test_loras_are_listed_and_counted_beside_packed_weights(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors", {"x.lora_A.weight": ("BF16", [1000, 1000], 2)})
    plan = plan_of(tmp_path, monkeypatch, task="t2v-1.3B", lora=f"{path}:0.5")
    row = next(row for row in plan["files"] if row["component"] == "lora")
    assert row == {"component": "lora", "path": str(path), "bytes": path.stat().st_size, "hub": False}
    assert str(path) in format_plan(plan)
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-1.3B", lora=str(path))
    assert Workload(request, spec).lora_bytes("model") == 4_000_000


# The choice


ORDER = ["model", "block ram", "block disk", "phase ram", "phase disk"]


@pytest.mark.parametrize("task", ["t2v-14B", "t2v-A14B"])
def test_more_memory_is_never_slower(tmp_path, monkeypatch, task):
    request, spec = request_of(tmp_path, monkeypatch, task=task, size="832*480", vae_dtype="bf16")

    def rank(vram, ram):
        placement = choose(request, spec, gpu(vram, ram))
        return -ORDER.index(f"{placement.offload} {placement.blocks_from}".strip()), placement.resident_blocks

    ranks = {(vram, ram): rank(vram, ram) for vram in (80, 24, 12, 8) for ram in (64, 16)}
    for (vram, ram), here in ranks.items():
        for (more, too), there in ranks.items():
            if more >= vram and too >= ram:
                assert there >= here, ((vram, ram), (more, too))
    assert ranks[80, 64] == (0, 40) and ranks[24, 64][0] == -1 and 0 < ranks[12, 64][1] < ranks[24, 64][1]


def test_what_lies_where(tmp_path, monkeypatch):
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-A14B", size="832*480")
    assert choose(request, spec, gpu(80, 64)).next_expert == "ram"
    assert choose(request, spec, gpu(80, 16)).next_expert == "disk"
    assert choose(request, spec, gpu(80, 64)).text == "device" and choose(request, spec, gpu(8, 64)).text == "stream"
    assert choose(request.changed(t5_cpu=True), spec, gpu(80, 64)).text == "cpu"
    none = choose(request.changed(offload="none"), spec, gpu(200))
    assert (none.next_expert, none.released, none.resident_blocks) == ("device", (), 40)
    assert choose(request.changed(offload="none", vae_offload=True), spec, gpu(200)).released == ("vae",)
    assert choose(request.changed(offload="none", t5_offload=True), spec, gpu(200)).released == ("t5",)
    assert "vae" not in choose(request.changed(vae_offload=False), spec, gpu(80)).released
    on_cpu = choose(request.changed(offload="phase"), spec, CPU)
    assert (on_cpu.offload, on_cpu.blocks_from, on_cpu.resident_blocks) == ("phase", "disk", 39)
    all_blocks = choose(request.changed(offload="block", resident_blocks=40), spec, gpu(80))
    assert (all_blocks.offload, all_blocks.blocks_from) == ("model", "")
    some = choose(request.changed(offload="block", resident_blocks=3), spec, gpu(80))
    assert (some.offload, some.blocks_from, some.resident_blocks) == ("block", "ram", 3)


@pytest.mark.parametrize("boundary_step, runs", [(0, "low"), (4, "high")])
def test_an_expert_without_a_step_takes_no_memory(tmp_path, monkeypatch, boundary_step, runs):
    options = {"task": "t2v-A14B", "size": "832*480", "sample_steps": 4, "offload": "none"}
    both = plan_of(tmp_path, monkeypatch, gpu(80, 64), **options)
    one = plan_of(tmp_path, monkeypatch, gpu(80, 64), **options, boundary_step_index=boundary_step)
    assert (both["placement"]["next_expert"], one["placement"]["next_expert"]) == ("device", "")
    assert both["memory_bytes"]["denoise"]["device"] - one["memory_bytes"]["denoise"]["device"] > 28e9
    assert {row["component"] for row in one["weights"]} == {"t5", "vae", runs}


def test_quantised_weights_stay_packed_where_memory_is_short(tmp_path, monkeypatch):
    spec = load_task("t2v-14B")
    tensors = {name: ([c, r], 8, r * c // 32 * 34) for name, (r, c) in matrices(spec).items()}
    path = write_gguf(tmp_path / "model.gguf", tensors | others(spec))
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480", gguf=str(path))
    assert choose(request, spec, gpu(80)).packed == {"t5": "", "model": "resident"}
    assert (
        choose(request, spec, gpu(24)).packed["model"] == "stream" and choose(request, spec, gpu(24)).offload == "model"
    )
    assert choose(request.changed(offload="block"), spec, gpu(80)).packed["model"] == "stream"
    assert choose(request.changed(gguf_mode="stream"), spec, gpu(80)).packed["model"] == "stream"
    notes = make_plan(request, spec, gpu(24))["notes"]
    assert len(notes) == 1 and notes[0].startswith(f"{path}: bf16 weights would take 28.") and "is stream" in notes[0]


def refused(tmp_path, monkeypatch, vram=None, ram=None, **options):
    """What is said of a budget, in GB, that is too small."""
    budget = {"vram_gb": vram, "ram_gb": ram}
    request, spec = request_of(tmp_path, monkeypatch, **budget, **options)
    machine = gpu(vram, ram or 64) if vram else replace(CPU, ram_bytes=request.load.ram_bytes)
    with pytest.raises(UsageError) as caught:
        choose(request, spec, machine)
    line = str(caught.value)
    assert "\n" not in line
    plan = Plan.of(request.changed(vram_bytes=None, ram_bytes=None), spec, machine)
    assert any(note.startswith("warning: ") and "that are free; " in note for note in plan.notes)
    return line, machine


@pytest.mark.parametrize(
    "vram, ram, options, stages, sets",
    [
        (8, None, {"task": "t2v-A14B"}, ["denoise"], ["--frame_num 41", "--size 832*480"]),
        (8, 16, {"task": "t2v-A14B"}, ["denoise", "encode_text"], ["--t5_gguf t5-Q8_0.gguf and --frame_num 41"]),
        (None, 8, {"task": "t2v-1.3B"}, ["encode_text"], ["--t5_gguf t5-Q8_0.gguf"]),
        (None, 10, {"task": "t2v-14B", "vae_tile_px": 0}, ["encode_text", "decode"], ["--vae_tile_px 256 and --t5_"]),
        (20, None, {"task": "t2v-14B", "offload": "model", "size": "832*480"}, ["denoise"], ["--offload block"]),
        (16, None, {"task": "t2v-14B", "offload": "none"}, ["denoise", "decode"], ["--offload block"]),
        (
            16,
            None,
            {"task": "t2v-14B", "offload": "block", "resident_blocks": 30},
            ["denoise"],
            ["--resident_blocks auto"],
        ),
        (6, None, {"task": "t2v-1.3B", "vae_offload": False, "vae_tile_px": 0}, ["decode"], ["--vae_tile_px 256"]),
    ],
)
def test_what_does_not_fit_is_told_with_what_makes_it_fit(tmp_path, monkeypatch, vram, ram, options, stages, sets):
    line, machine = refused(tmp_path, monkeypatch, vram, ram, **options)
    flag = "--vram_gb" if vram else "--ram_gb"
    for stage in stages:
        assert f"{stage} needs " in line and f"more than {flag} {vram or ram}" in line
    lacks, _, advice = line.partition("; it fits with ")
    assert lacks.count(" needs ") == len(stages)
    assert all(one in advice for one in sets)
    # Each set that is offered fits, and none of its changes can be left out.
    for flags in advice.split("; a GGUF")[0].split(", or with "):
        given = [words.split() for words in flags.replace(" and ", " ").split("--") if words]
        assert fits(tmp_path, monkeypatch, machine, options, given)
        for left_out in range(len(given)):
            assert not fits(tmp_path, monkeypatch, machine, options, given[:left_out] + given[left_out + 1 :])


def fits(tmp_path, monkeypatch, machine, options, given):
    """Whether a run with more flags fits. A GGUF file is one that `wan.convert` would write."""
    options, folder = dict(options), tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    for flag, value in given:
        if flag in ("gguf", "t5_gguf"):
            tensors = (text_tensors if flag == "t5_gguf" else dit_tensors)(load_task(options["task"]), value)
            value = str(write_gguf(folder / value, tensors))
        options[flag] = value
    if "offload" in dict(given):
        options.pop("resident_blocks", None)
    request, spec = request_of(tmp_path, monkeypatch, **options)
    return not any(note.startswith("warning: ") for note in Plan.of(request, spec, machine).notes)


def stored(rows, columns, is_larger, name):
    """A matrix in a file of the type that its name has: in Q8_0, or in Q4_K and some in Q6_K."""
    kind, bits = (8, 8.5) if "Q8_0" in name else (14, 6.5625) if is_larger else (12, 4.5)
    return [columns, rows], kind, int(rows * columns * bits) // 8


def dit_tensors(spec, name):
    """The transformer as `wan.convert` stores it."""
    tensors = {
        one: stored(*shape, one.endswith((".v.weight", "ffn.2.weight")), name) for one, shape in matrices(spec).items()
    }
    return tensors | others(spec)


def text_tensors(spec, name):
    text, tensors = spec.text, {"enc.output_norm.weight": ([spec.text.dim], 0, 4 * spec.text.dim)}
    shapes = {one: (text.dim_attn, text.dim) for one in ("attn_q", "attn_k", "attn_v", "attn_o")}
    shapes |= {one: (text.dim_ffn, text.dim) for one in ("ffn_gate", "ffn_up")} | {"ffn_down": (text.dim, text.dim_ffn)}
    for layer in range(text.num_layers):
        for one, shape in shapes.items():
            tensors[f"enc.blk.{layer}.{one}.weight"] = stored(*shape, one in ("attn_v", "ffn_down"), name)
        for one in ("attn_norm", "ffn_norm"):
            tensors[f"enc.blk.{layer}.{one}.weight"] = ([text.dim], 0, 4 * text.dim)
        bias = [text.num_heads, text.num_buckets]
        tensors[f"enc.blk.{layer}.attn_rel_b.weight"] = (bias, 0, 4 * math.prod(bias))
    return tensors | {"token_embd.weight": stored(text.vocab, text.dim, True, name)}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_gguf_file_that_is_not_there_yet_is_planned_as_it_will_be(tmp_path, monkeypatch, kind):
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-14B")
    asked = Workload(request, spec).changed(gguf={"t5": kind, "model": kind})
    files = {"t5_gguf": text_tensors(spec, kind), "gguf": dit_tensors(spec, kind)}
    paths = {flag: str(write_gguf(tmp_path / f"{flag}.gguf", tensors)) for flag, tensors in files.items()}
    there = Workload(*request_of(tmp_path, monkeypatch, task="t2v-14B", **paths))
    for name in ("t5", "model"):
        wanted, found = there.components[name].packed, asked.components[name].packed
        assert found.total == pytest.approx(wanted.total, rel=0.01)
        assert found.unpacked == wanted.unpacked
        assert found.units("block")[0] == pytest.approx(wanted.units("block")[0], rel=0.01)


def test_where_nothing_fits_it_says_how_much_is_needed(tmp_path, monkeypatch):
    line, _ = refused(tmp_path, monkeypatch, vram=1.5, task="t2v-14B")
    assert "; it does not fit in any way: with " in line and "it still needs 2.1 GB of GPU memory to denoise" in line
    assert all(one in line for one in ("--vae_dtype bf16", "--t5_cpu", "--size 416*240", "--gguf dit-Q4_K_M.gguf"))


def test_a_gguf_file_comes_with_the_command_that_makes_it(tmp_path, monkeypatch):
    import shlex

    from wan.convert import make_parser

    with (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").open("wb") as file:
        file.truncate(2 * 5_680_910_336)
    line, _ = refused(tmp_path, monkeypatch, ram=8, task="t2v-1.3B")
    command = line.partition("a GGUF file is made by: python -m wan.convert ")[2]
    args = make_parser().parse_args(shlex.split(command))
    assert (args.type, args.component, args.output) == ("Q8_0", "t5", "t5-Q8_0.gguf")
    assert args.checkpoint_dir == str(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")


def test_a_margin_is_left(tmp_path, monkeypatch):
    """Peaks that were measured are up to 4.7 % above the planned ones, benchmarks/results/cpu/plan_memory.json."""
    request, spec = request_of(tmp_path, monkeypatch, task="t2v-1.3B", offload="model")
    plan = make_plan(request, spec, CPU)
    peak = max(sizes["ram"] for sizes in plan["memory_bytes"].values())
    exactly, enough = (replace(CPU, ram_bytes=int(peak * share)) for share in (1.04, 1.051))
    assert any("warning: encode_text needs" in note for note in make_plan(request, spec, exactly)["notes"])
    assert not any("warning" in note for note in make_plan(request, spec, enough)["notes"])
    assert "margin      5% of each peak stay free, for estimates" in format_plan(plan)


def test_the_vae_is_tiled_where_that_is_all_that_is_missing(tmp_path, monkeypatch):
    def planned(vram, **options):
        plan = plan_of(tmp_path, monkeypatch, gpu(vram), task="t2v-1.3B", size="832*480", **options)
        return plan["placement"]["vae_tile_px"], " ".join(plan["notes"])

    assert planned(24) == (0, "")
    tile, notes = planned(6)
    assert tile == 512 and "tiles of 512 pixels" in notes and "differ slightly" in notes and "warning" not in notes
    assert planned(6, vae_tile_px=128) == (128, "")
    tile, notes = planned(6, vae_tile_px=0)  # as asked
    assert tile == 0 and notes.startswith("warning: decode needs ")


@pytest.mark.parametrize("vram, offload", [(200, "none"), (40, "model"), (16, "block")])
def test_several_processes_have_what_fits(tmp_path, monkeypatch, vram, offload):
    monkeypatch.chdir(tmp_path)
    options = {"task": "t2v-A14B", "size": "832*480", "prompt": "a cat", "ckpt_dir": str(tmp_path)}
    request, spec = build_request(options, 2), load_task("t2v-A14B")
    plan = make_plan(request, spec, gpu(vram))
    assert plan["placement"]["offload"] == offload and not any("warning" in note for note in plan["notes"])
    asked = make_plan(build_request(options | {"offload_model": False}, 2), spec, gpu(vram))
    assert asked["placement"]["offload"] == "none"  # as asked for, with a warning where it does not fit
    assert any("warning" in note for note in asked["notes"]) == (offload != "none")
    shared = make_plan(build_request(options | {"dit_fsdp": True}, 2), spec, gpu(24))
    assert shared["placement"]["offload"] == "model"


def test_vram_is_of_a_gpu(tmp_path, monkeypatch):
    request, _ = request_of(tmp_path, monkeypatch, task="t2v-14B", vram_gb=8, device="cpu")
    with pytest.raises(UsageError, match="^--vram_gb is for a GPU, this run is on the CPU: use --ram_gb$"):
        look(request)
    asked = look(request.changed(device="auto"))  # a dry run elsewhere
    assert (asked.device, asked.vram_bytes, asked.is_measured) == ("cuda", 8 * GB, False)
    unknown, _ = request_of(tmp_path, monkeypatch, task="t2v-14B", ram_gb=7, device="cuda:1")
    assert (look(unknown).device, look(unknown).vram_bytes, look(unknown).ram_bytes) == ("cuda", None, 7 * GB)
    assert look(unknown.changed(device="auto")).device == "cpu"


# Transfers


@pytest.mark.parametrize("offload", ["block", "phase"])
def test_what_stands_beside_the_blocks_travels_too(tmp_path, monkeypatch, offload):
    request, spec = request_of(tmp_path, monkeypatch, task="vace-14B", offload=offload, resident_blocks=0)
    load, plan = Workload(request, spec), Plan.of(request, spec, gpu(80, flops=120e12))
    blocks = load.components["model"].dense.blocks
    assert len(blocks) == 48 and list(blocks[1]) == ["before_proj", "self_attn", "cross_attn", "ffn", "after_proj"]
    told = plan.to_json()["transfers"]
    assert told["bytes_per_forward"] == sum(sum(one.values()) for one in blocks)
    assert told["compute_seconds_per_forward"] == pytest.approx(load.forward_flops.total / 120e12)
    assert told["exposed_seconds_per_forward"] < 0.01 * told["compute_seconds_per_forward"]
    plain = Workload(request, load_task("t2v-14B")).forward_flops.total  # 8 hints are made by as many blocks
    assert load.forward_flops.total / plain == pytest.approx(48 / 40, rel=0.02)


def test_transfers_are_those_of_the_table(tmp_path, monkeypatch):
    """14B in bf16 at 480p: a block of 703 MB takes 29 ms of 349 ms on a 4090, 14 of 73 ms on an H200."""
    request, spec = request_of(
        tmp_path, monkeypatch, task="t2v-14B", size="832*480", offload="block", resident_blocks=0
    )
    for rate, flops, sent, computed in ((24e9, 120e12, 0.029, 0.349), (50e9, 573e12, 0.014, 0.073)):
        told = make_plan(request, spec, gpu(80, transfer_rate=rate, flops=flops))["transfers"]
        assert told["bytes_per_forward"] / 40 == pytest.approx(703e6, rel=0.01)
        assert told["seconds_per_forward"] / 40 == pytest.approx(sent, rel=0.05)
        assert told["compute_seconds_per_forward"] / 40 == pytest.approx(computed, rel=0.02)
        assert told["is_hidden"] and told["exposed_seconds_per_forward"] == 0
    slow = make_plan(request, spec, gpu(80, transfer_rate=1e9, flops=120e12))["transfers"]
    assert not slow["is_hidden"] and slow["exposed_seconds_per_forward"] == pytest.approx(
        40 * (0.703 - 0.349), rel=0.02
    )
    half = make_plan(request.changed(resident_blocks=20), spec, gpu(80))["transfers"]
    assert half["bytes_per_forward"] / 20 == pytest.approx(703e6, rel=0.01)


def test_what_is_not_hidden_adds_up():
    assert exposed_seconds([1, 5, 0], [2, 2, 2]) == 3


# Files, text


def test_two_quantised_networks_contradict_each_other(tmp_path, monkeypatch):
    folder = tmp_path / "quantised"
    folder.mkdir()
    tensors = {"blocks.0.ffn.0.weight": ("I8", [8, 8], 1), "blocks.0.ffn.0.weight_scale": ("F32", [8, 1], 4)}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    gguf = write_gguf(tmp_path / "a.gguf", {"blocks.0.ffn.0.weight": ([32, 8], 8, 272)})
    given = request_of(tmp_path, monkeypatch, task="t2v-1.3B", ckpt_dir=str(folder), gguf=str(gguf))
    with pytest.raises(UsageError, match="^--gguf .* and --ckpt_dir .* both hold quantised weights") as caught:
        check_one_quantised(*given)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        make_plan(*given, CPU)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", {"blocks.0.ffn.0.weight": ("BF16", [8, 8], 2)})
    check_one_quantised(*given)
    (folder / "config.json").write_text('{"quantization": {"bits": 4, "group_size": 64}}')
    with pytest.raises(UsageError):
        check_one_quantised(*given)


@pytest.mark.parametrize("machine", [CPU, gpu(12), gpu(8, 16)], ids=["cpu", "12 GB", "8 GB"])
def test_plans_are_plain_data_and_read_well(tmp_path, monkeypatch, machine):
    plan = plan_of(tmp_path, monkeypatch, machine, task="t2v-A14B", size="832*480")
    assert json.loads(json.dumps(plan)) == plan
    whole = Plan.of(*request_of(tmp_path, monkeypatch, task="t2v-A14B", size="832*480"), machine)
    assert whole.placement == Placement(**plan["placement"]) and whole.memory == plan["memory_bytes"]
    placement = Placement(**plan["placement"])
    assert placement == choose(*request_of(tmp_path, monkeypatch, task="t2v-A14B", size="832*480"), machine)
    text, lines = format_plan(plan), start_lines(plan)
    assert "placement   offload" in text and "memory      denoise" in text and "(estimate)" in text
    assert ("transfers " in text) == (placement.offload == "block") and ("assumed" in text)
    assert 3 <= len(lines) <= 5 and all("\n" not in line for line in lines)
    assert lines[0].startswith("placement: offload")


def test_nothing_is_streamed_to_mps(tmp_path, monkeypatch):
    small = Machine("mps", 8 * GB, 8 * GB, 1e12)
    plan = plan_of(tmp_path, monkeypatch, small, task="t2v-14B", size="832*480")
    assert plan["placement"]["offload"] == "model" and any(note.startswith("warning: ") for note in plan["notes"])
    with pytest.raises(UsageError, match="--offload block streams to the CPU and to CUDA, not to mps"):
        plan_of(tmp_path, monkeypatch, small, task="t2v-14B", size="832*480", offload="block")


def test_a_text_encoder_that_is_shared_out_is_not_streamed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"task": "t2v-14B", "size": "832*480", "prompt": "a cat", "ckpt_dir": str(tmp_path), "t5_fsdp": True}
    assert choose(build_request(options, 2), load_task("t2v-14B"), gpu(4)).text == "device"
    assert choose(build_request(options | {"t5_cpu": True}, 2), load_task("t2v-14B"), gpu(4)).text == "cpu"


def test_the_rate_of_the_disk_is_always_assumed(tmp_path, monkeypatch):
    measured = replace(CPU, is_measured=True)
    plan = plan_of(tmp_path, monkeypatch, measured, task="t2v-14B", size="832*480", offload="block", resident_blocks=0)
    assert not plan["transfers"]["is_measured"] and "(rates assumed)" in "\n".join(start_lines(plan))


@pytest.mark.parametrize("task", ["s2v-14B", "animate-14B", "vace-14B"])
def test_a_gguf_file_that_is_not_there_yet_has_all_that_the_model_has(task):
    bf16 = 2 * count_parameters(load_task(task), "dit")
    made = Component("model", "dit", load_task(task).dit, (), Sizes(bf16), None, Reading(0, 0, 0))
    assert 0.5 < as_gguf(made, "Q8_0", "bf16").packed.total / bf16 < 0.65
