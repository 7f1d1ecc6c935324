"""The plan's numbers against the published tables and the real checkpoints' sizes."""

import pytest

from wan.memory import format_plan, forward_flops, make_plan, missing_files, parameters
from wan.request import build_request
from wan.tasks import load_task, task_names

# TFLOP of one forward: tokens, linear, self-attention, cross-attention, total
WORK = [
    ("t2v-1.3B", 32_760, 82, 198, 3, 283),
    ("t2v-14B", 32_760, 785, 879, 14, 1678),
    ("t2v-14B", 75_600, 1810, 4682, 32, 6523),
    ("ti2v-5B", 27_280, 238, 274, 5, 517),
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


@pytest.mark.parametrize("task, tokens, linear, self_attention, cross, total", WORK)
def test_work_matches_the_table(task, tokens, linear, self_attention, cross, total):
    work = forward_flops(load_task(task), tokens)
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
    assert counts.get("clip", 0) == (632_076_800 if task in ("i2v-14B", "flf2v-14B") else 0)


@pytest.mark.parametrize("task", task_names())
def test_parameters_are_those_of_our_models(task):
    import torch

    from wan.models.dit import WanModel
    from wan.models.vae import WanVAE

    spec = load_task(task)
    with torch.device("meta"):
        models = {"dit": WanModel(**spec.dit), "vae": WanVAE(**spec.vae)}
    for component, model in models.items():
        assert sum(weight.numel() for weight in model.parameters()) == parameters(spec)[component]


def plan_of(tmp_path, monkeypatch, **options):
    monkeypatch.chdir(tmp_path)
    request = build_request({"prompt": "a cat", "ckpt_dir": str(tmp_path), **options})
    return make_plan(request, load_task(request.task))


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


def test_bigger_videos_need_more(tmp_path, monkeypatch):
    small = plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480")["memory_bytes"]
    large = plan_of(tmp_path, monkeypatch, task="t2v-14B", size="1280*720")["memory_bytes"]
    kept = plan_of(tmp_path, monkeypatch, task="t2v-14B", size="832*480", offload_model=False)["memory_bytes"]
    assert large["denoise"] > small["denoise"] and large["decode"] > small["decode"]
    assert kept["decode"] > small["decode"]
