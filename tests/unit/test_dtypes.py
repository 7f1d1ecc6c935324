"""Which types a run computes in, where the user leaves it open: by task, by CPU, and the text encoder's own."""

import pytest
import torch

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.cli import main
from wan.media import read_settings
from wan.memory import residency
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.plan import Machine, machine, make_plan
from wan.tasks import load_task

GB = 10**9


@pytest.fixture
def without_bf16(monkeypatch, tmp_path):
    """A processor with AVX2 alone."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 fma avx avx2\n\nprocessor\t: 1\nflags\t\t: avx avx2\n")
    monkeypatch.setattr(machine, "CPUINFO", path)


@pytest.mark.parametrize("flags, made", [((), "mixed"), (("--dtype", "bf16", "--t5_dtype", "bf16"), "bf16")])
def test_auto_is_mixed_on_a_cpu_without_units_for_bf16(without_bf16, tmp_path, monkeypatch, capsys, flags, made):
    """Told once, and stored in the video."""
    spec = shrunk("t2v-1.3B")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", spec)
    monkeypatch.setattr("wan.options.load_task", lambda name: spec)
    monkeypatch.setattr("wan.cli.load_task", lambda name: spec)
    types, real = {}, residency.load_text_encoder
    monkeypatch.setattr(
        residency,
        "load_text_encoder",
        lambda *args, **kwargs: types.update(t5=(kwargs["dtype"], kwargs["kept"])) or real(*args, **kwargs),
    )
    monkeypatch.setattr(residency, "load_expert", _noting(residency.load_expert, types))
    run = ["--task", "t2v-1.3B", "--ckpt_dir", checkpoint, "--prompt", "a", "--size", "64*32", "--frame_num", 5]
    run += ["--sample_steps", 2, "--device", "cpu", "--save_file", tmp_path / "a.mp4", *flags]
    assert main(list(map(str, run))) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no units for bf16" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: " if flags else "this CPU")
    wanted = (torch.float32, torch.bfloat16) if made == "mixed" else (torch.bfloat16, None)
    assert types == {"t5": wanted, "dit": wanted}
    stored = read_settings(tmp_path / "a.mp4")
    assert stored["dtype"] == stored["t5_dtype"] == made


def _noting(real, types):
    def load(model, source, **options):
        types["dit"] = options["dtype"], options["kept"]
        return real(model, source, **options)

    return load


@pytest.mark.parametrize("t5_dtype, wanted", [(None, torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_text_encoder_has_a_type_of_its_own(tmp_path, t5_dtype, wanted):
    """That of the task's file by default, whatever --dtype is."""
    options = {"dtype": "bf16", "t5_dtype": t5_dtype, "offload": "none", "frame_num": 1, "sample_steps": 1}
    request = build_request(options | {"size": "32*32", "device": "cpu", "save_file": str(tmp_path / "a.png")})
    pipe = WanPipeline.from_request(request, load_task(request.load.task))
    pipe(request)
    assert pipe._models["t5"].model.shared.weight.dtype == wanted and pipe.experts["model"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text, has",
    [
        ("flags\t: avx2 avx512f\n", False),
        ("flags\t: avx512f avx512_bf16\n", True),
        ("flags\t: amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("model name\t: bf16\n", False),
        (None, False),
    ],
)
def test_units_for_bf16(monkeypatch, tmp_path, text, has):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine._has_bf16() == has


def plan(tmp_path, ram_gb, has_bf16=False, **options):
    run = {"task": "t2v-1.3B", "prompt": "a", "ckpt_dir": str(tmp_path), "size": "832*480"}
    request = build_request(run | {"save_file": str(tmp_path / "a.mp4")} | options)
    return make_plan(request, load_task("t2v-1.3B"), Machine("cpu", ram_gb * GB, None, 1e11, has_bf16=has_bf16))


@pytest.mark.parametrize(
    "ram_gb, options, dit, t5, told",
    [
        (64, {}, "mixed", "mixed", ["--dtype and --t5_dtype auto are mixed"]),
        (64, {"has_bf16": True}, "bf16", "bf16", []),
        (64, {"dtype": "bf16"}, "bf16", "mixed", ["--t5_dtype auto is mixed", "--dtype bf16 is what was asked for"]),
        (64, {"convert_model_dtype": True, "t5_dtype": "bf16"}, "bf16", "bf16", ["--dtype and --t5_dtype bf16 are"]),
        (64, {"dtype": "bf16", "has_bf16": True}, "bf16", "bf16", []),
        (64, {"dtype": "fp32"}, "fp32", "mixed", ["--t5_dtype auto is mixed"]),
        (64, {"dtype": "fp16", "t5_dtype": "fp32"}, "fp16", "fp32", []),
        (64, {"dtype": "mixed", "has_bf16": True}, "mixed", "bf16", []),
        (19, {"vae_tile_px": 256, "offload": "none"}, "bf16", "mixed", ["t5_dtype auto is", "not fit into 19.0 GB"]),
        (9, {"vae_tile_px": 256}, "mixed", "mixed", ["auto are mixed"]),  # the text encoder does not fit in any case
    ],
)
def test_what_the_plan_makes_of_auto(tmp_path, ram_gb, options, dit, t5, told):
    found = plan(tmp_path, ram_gb, **options)
    notes = [note for note in found["notes"] if "bf16" in note and "units" in note]
    assert found["dtypes"] == {"dit": dit, "t5": t5, "vae": "fp32"}
    assert len(notes) == len(told) and all(one in note for one, note in zip(told, notes))
    assert all(note.startswith("warning: ") != (" mixed: " in note) for note in notes)


def test_a_vae_in_bf16_is_warned_of(tmp_path):
    notes = plan(tmp_path, 64, vae_dtype="bf16")["notes"]
    assert any(note.startswith("warning: ") and "--vae_dtype bf16 is what was asked for" in note for note in notes)


def test_mixed_takes_the_memory_of_bf16_for_weights(tmp_path):
    """And of fp32 for what is computed; with the largest matrix widened."""
    found = {name: plan(tmp_path, 64, True, dtype=name, t5_dtype=name) for name in ("bf16", "mixed", "fp32")}
    rows = {name: {row["component"]: row["bytes"] for row in one["weights"]} for name, one in found.items()}
    peak = {name: one["memory_bytes"]["encode_text"]["ram"] for name, one in found.items()}
    assert rows["mixed"]["t5"] < 1.001 * rows["bf16"]["t5"] and rows["mixed"]["model"] < 1.01 * rows["bf16"]["model"]
    assert peak["bf16"] + 4 * 4096 * 10240 < peak["mixed"] < 0.6 * peak["fp32"]


def test_fp32_for_the_transformer_does_not_double_the_text_encoder(tmp_path):
    """UMT5-XXL: 11 GB, or 23."""
    sizes = {}
    for name, options in {"bf16": {}, "fp32": {"dtype": "fp32"}, "both": {"dtype": "fp32", "t5_dtype": "fp32"}}.items():
        found = plan(tmp_path, 64, has_bf16=True, **options)
        rows = {row["component"]: row["bytes"] for row in found["weights"]}
        sizes[name] = rows["t5"], rows["model"], found["memory_bytes"]["encode_text"]["ram"]
    assert sizes["bf16"][0] == sizes["fp32"][0] == sizes["both"][0] // 2 == 5_680_910_336 * 2
    assert sizes["fp32"][1] > 1.9 * sizes["bf16"][1]
    assert sizes["bf16"][2] == sizes["fp32"][2] < sizes["both"][2] - 11e9


def test_a_video_of_before_had_one_type_for_both(tmp_path):
    stored = build_request({"dtype": "bf16", "save_file": str(tmp_path / "a.mp4")}).settings()
    assert (stored["dtype"], stored["t5_dtype"]) == ("bf16", "fp32")
    del stored["t5_dtype"]
    assert build_request(replay_options(stored, {})).load.t5_dtype == "bf16"
    assert build_request(replay_options(stored, {"t5_dtype": "auto"})).load.t5_dtype == "fp32"
