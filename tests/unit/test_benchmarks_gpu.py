"""The one benchmark for GPUs, on a CPU at tiny shapes: does every row run, and is a run that ended gone on with?"""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import run, speed, table
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import FULL, Bench, Skip
from benchmarks.gpu.results import read_row, slug, write_row
from benchmarks.gpu.rows import NAMES, ROWS, Row
from wan.tasks import load_task

CPU_LACKS = ("cudnn", "flash_attn", "sage_attn", "sparge_attn")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with all rows, but for one that imports another program's model."""
    folder = tmp_path_factory.mktemp("results") / "a-cpu"
    folder.mkdir()
    assert run.work([row for row in ROWS if row.name != "diffusers"], folder, Bench("cpu", tiny=True)) == 0
    return folder


def test_every_row_runs(results):
    for name in NAMES:
        row = read_row(results, name)
        if name == "diffusers":
            assert row == {}
        elif any(part in name for part in CPU_LACKS):
            assert row["state"] == "not run" and " needs " in row["reason"]
        elif name != "golden":
            assert (row["state"], row["reason"]) == ("done", ""), name
            assert row["machine"]["tiny"] and row["result"]


def test_rows_measure_what_they_say(results):
    found = {name: read_row(results, name).get("result") for name in NAMES}
    assert found["ops"]["cases"] > 60 and found["ops"]["wrong"] == []
    assert sum(name.startswith("a model, ") for name in found["ops"]["errors"]) == 12
    assert found["tiny-world"]["psnr_db"] == 99  # the same device twice
    forward = found["forward-14B-480p-sdpa"]
    assert forward["share_of_products"] == pytest.approx(
        forward["tflop"] / forward["seconds"] / found["rates"]["product_tflops"]
    )
    assert sum(found["split"]["shares"].values()) == pytest.approx(1)
    assert found["split"]["seconds"].keys() >= {"products", "elementwise"}  # a kernel of ours attends on some CPUs
    assert [row["resident_blocks"] for row in found["offload"]["ways"].values()] == [2, 0, 2]
    assert found["packed"]["kinds"].keys() == {"bf16", "Q4_K", "Q8_0"}
    assert found["video"]["experts"] == ["high", "high", "low", "low"]
    assert found["video"]["video"] == [1, 3, 5, 64, 64]


def test_shapes_are_those_of_the_tasks():
    for name, task in (("14B", "t2v-14B"), ("5B", "ti2v-5B")):
        spec = load_task(task)
        assert FULL.dit[name].items() <= spec.dit.items()
    assert FULL.dit["14B"].items() <= load_task("t2v-A14B").dit.items()
    assert FULL.vae.items() <= load_task("t2v-14B").vae.items()


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_tf32f32_conv", "products"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert speed.kind_of(kernel) == kind


# What becomes of a row that does not end well


def row(name, measure, seconds=0.0):
    class Own(Row):
        def measure(self, bench):
            return measure()

    return Own(name, name, "", "", (), seconds, lambda result: str(result["x"]))


def fail(error):
    raise error


def test_a_row_that_fails_is_one_line_and_the_next_one_runs(tmp_path, monkeypatch):
    rows = [
        row("a", lambda: fail(RuntimeError("two\nlines"))),
        row("b", lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB ..."))),
        row("c", lambda: fail(ModuleNotFoundError("No module named 'x.y'", name="x.y"))),
        row("d", lambda: fail(Skip("14 GB, 8 are free"))),
        row("e", lambda: {"x": 1, "wrong": ["this", "that"]}),
        row("f", lambda: {"x": 1}),
        row("g", lambda: {"x": 1}, seconds=1e9),
    ]
    bench = Bench("cpu", tiny=True, deadline=float("inf"))
    monkeypatch.setattr(bench, "expected", lambda seconds: seconds)
    monkeypatch.setattr(bench, "left", lambda: 60.0)
    assert run.work(rows, tmp_path, bench) == 0
    found = {one.name: read_row(tmp_path, one.name) for one in rows}
    assert {name: (one["state"], one["reason"]) for name, one in found.items()} == {
        "a": ("failed", "RuntimeError: two lines"),
        "b": ("failed", "out of memory"),
        "c": ("not run", "needs the package x"),
        "d": ("not run", "14 GB, 8 are free"),
        "e": ("failed", "wrong: this; that"),
        "f": ("done", ""),
        "g": ("not run", "time"),
    }
    assert found["e"]["result"]["x"] == 1


CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.results import write_row
folder, run, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
for name in names:
    write_row(folder, name, "running", run=run, started=time.time())
    if name == "kills":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(600)
    write_row(folder, name, "done", run=run, result={"x": 1})
"""


def starter(tmp_path, started):
    def start(names, of_run, deadline):
        started.append(names)
        return subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), of_run, *names])

    return start


def test_a_killed_process_costs_one_row(tmp_path):
    rows, started = [row(name, dict) for name in ("a", "kills", "b")], []
    run.supervise(rows, tmp_path, 5, starter(tmp_path, started))
    assert started == [["a", "kills", "b"], ["b"]]
    found = {one.name: read_row(tmp_path, one.name) for one in rows}
    assert [one["state"] for one in found.values()] == ["done", "failed", "done"]
    assert found["kills"]["reason"] == "its process ended with exit code -9"


def test_time_ends_a_row(tmp_path):
    rows = [row(name, dict) for name in ("hangs", "b")]
    run.supervise(rows, tmp_path, 0.02, starter(tmp_path, []))
    assert [read_row(tmp_path, one.name)["reason"] for one in rows] == ["time", "time"]


def test_a_row_that_stays_ends_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_LEAST_LONG", 0.5)
    rows, started = [row(name, dict) for name in ("hangs", "b")], []
    run.supervise(rows, tmp_path, 5, starter(tmp_path, started))
    assert [read_row(tmp_path, one.name)["state"] for one in rows] == ["failed", "done"]
    assert read_row(tmp_path, "hangs")["reason"] == "it had not ended after 0 s"


def test_a_run_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    """What was under way is measured again; what was done stays."""
    write_row(tmp_path, "rates", "done", result={"product_tflops": 1.0})
    write_row(tmp_path, "ops", "running", run="of a run that was killed")
    write_row(tmp_path, "golden", "not run", "time")
    asked = []
    monkeypatch.setattr("benchmarks.gpu.__main__.supervise", lambda rows, *_: asked.extend(one.name for one in rows))
    assert main(["--device", "cpu", "--tiny", "--resume", str(tmp_path), "--rows", "rates", "ops", "golden"]) == 0
    assert asked == ["ops", "golden"]
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 2
    assert "has results: go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "cpu", "--out", "x"], "--device cpu is for --tiny alone"),
        (["--device", "cpu", "--tiny"], "--tiny wants --out DIR"),
        (["--minutes", "0"], "--minutes must be more than 0, not 0"),
        (["--rows", "nothing"], "--rows nothing: no such row; rows: rates, ops"),
        (["--resume", "nowhere"], "--resume nowhere: there are no results"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert message in capsys.readouterr().err


# The table


def test_the_table_is_made_of_the_json_alone(results, tmp_path):
    assert table.table(tmp_path).splitlines()[2].endswith("| not run |")
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{table._BEGIN}old\n{table._END}after\n")
    made = table.write_table(page, results.parent)
    assert page.read_text() == f"before\n{table._BEGIN}\n{made}\n{table._END}after\n"
    lines = {line.split(" | ")[0].strip("| "): line for line in made.splitlines()[2:]}
    assert len(lines) == len(ROWS)
    assert lines["ops beside their reference"].endswith(" cases right |")
    assert "needs the package flash_attn_interface" in lines["attention of 14B at 480p and 720p, flash_attn3"]
    assert lines["our time to diffusers', layers of 14B at 480p"].endswith("| not run |")
    assert "TINY SHAPES" in made.splitlines()[0]


def test_the_page_has_the_table_of_the_results():
    assert table.table() in table.PAGE.read_text(encoding="utf-8")


def test_names_of_folders():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_json_can_be_read(results):
    assert all(json.loads(path.read_text())["row"] == path.stem for path in results.iterdir())
