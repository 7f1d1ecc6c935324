"""python -m wan.batch: many videos by one command."""

import errno
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from wan import engine
from wan.batch.__main__ import main as batch
from wan.command import run_command
from wan.errors import SwanError
from wan.media import read_settings

QUICK = ["--frame_num", "1", "--sample_steps", "1", "--device", "cpu", "--quiet"]
RED = "a red circle moving right on a black background"


def run(*argv):
    return run_command(lambda: batch([str(one) for one in argv]))


def report(capsys):
    return json.loads(capsys.readouterr().out)


def made(folder):
    return sorted(path.name for path in folder.iterdir())


def lines(path, *jobs):
    path.write_text("\n".join(map(json.dumps, jobs)), encoding="utf-8")
    return path


@pytest.fixture
def calls(monkeypatch):
    """The requests that engines were asked for."""
    seen, make = [], engine.Engine.make

    def spy(self, request, **call):
        seen.append(request)
        return make(self, request, **call)

    monkeypatch.setattr(engine.Engine, "make", spy)
    return seen


def test_jobs_have_their_options_and_those_of_all(tmp_path, capsys, calls):
    jobs = lines(tmp_path / "j.jsonl", {"prompt": RED, "seed": 3, "name": "red"}, {"seed": 4, "frame_num": 5})
    assert run(jobs, "--out", tmp_path / "o", "--prompt", "a blue square", *QUICK) == 0
    assert made(tmp_path / "o") == ["0002.json", "0002.mp4", "red.json", "red.png"]
    assert read_settings(tmp_path / "o/red.png")["prompt"] == RED
    assert read_settings(tmp_path / "o/0002.mp4")["prompt"] == "a blue square"
    told = json.loads((tmp_path / "o/red.json").read_text())
    assert told["report"]["seed"] == 3 and told["options"]["prompt"] == RED and told["batch"]["status"] == "done"
    assert report(capsys) | {"seconds": 0} == {
        **{"jobs": 2, "made": 2, "done": 2, "failed": [], "seconds": 0},
        "out": str(tmp_path / "o"),
    }


def test_what_is_done_is_not_made_again(tmp_path, capsys, calls):
    jobs = lines(tmp_path / "j.jsonl", *({"seed": seed} for seed in range(3)))
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 0
    (tmp_path / "o/0002.png").unlink()  # and one that is gone
    lines(jobs, {"seed": 0}, {"seed": 1}, {"seed": 7})  # and one that has other settings now
    calls.clear()
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 0
    assert [one.sample.seed for one in calls] == [1, 7]
    calls.clear()
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 0 and not calls


def test_a_changed_input_file_is_another_job(tmp_path, calls):
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    jobs = lines(tmp_path / "j.jsonl", {"image": str(picture)})
    argv = (jobs, "--out", tmp_path / "o", "--task", "i2v-tiny", "--sample_steps", 1, "--frame_num", 5, "--quiet")
    assert run(*argv) == 0 and run(*argv) == 0 and len(calls) == 1
    Image.new("RGB", (64, 64), "blue").save(picture)
    assert run(*argv) == 0 and len(calls) == 2


def test_failures_are_kept_listed_and_retried(tmp_path, capsys, calls):
    jobs = lines(tmp_path / "j.jsonl", {"seed": 1}, {"seed": 2, "frame_num": 6}, {"seed": 3})
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 1
    assert "failed: 0002: --frame_num" in capsys.readouterr().err
    assert made(tmp_path / "o") == ["0001.json", "0001.png", "0002.json", "0003.json", "0003.png"]
    calls.clear()
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 1 and not calls
    assert report(capsys)["failed"] == ["0002"]
    lines(jobs, {"seed": 1}, {"seed": 2, "frame_num": 5}, {"seed": 3})
    assert run(jobs, "--out", tmp_path / "o", "--retry", *QUICK) == 0
    assert [one.sample.seed for one in calls] == [2]


def test_a_full_disk_ends_it_and_no_job_is_failed(tmp_path, capsys, monkeypatch):
    def full(path, *_):
        raise SwanError(f"cannot write {path}: Error closing file: {os.strerror(errno.ENOSPC)}")

    jobs = lines(tmp_path / "j.jsonl", {"seed": 1}, {"seed": 2})
    with monkeypatch.context() as patch:
        patch.setattr(engine.Video, "write", full)
        assert run(jobs, "--out", tmp_path / "o", *QUICK) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1 and made(tmp_path / "o") == []
    assert run(jobs, "--out", tmp_path / "o", *QUICK) == 0


def test_jobs_that_load_the_same_come_together(tmp_path, calls):
    tasks = ["t2v-tiny", "i2v-tiny", "t2v-tiny", "i2v-tiny"]
    jobs = lines(tmp_path / "j.jsonl", *({"task": task, "seed": at} for at, task in enumerate(tasks)))
    assert run(jobs, "--out", tmp_path / "o", "--sample_steps", 1, "--frame_num", 5, "--quiet") == 0
    assert [one.load.task for one in calls] == ["t2v-tiny"] * 2 + ["i2v-tiny"] * 2


def test_a_grid_makes_the_product_and_a_sheet(tmp_path, calls):
    argv = ("--out", tmp_path / "o", "--grid", "seed=1..2 sample_guide_scale=1,2.5,4", *QUICK)
    assert run(*argv) == 0
    pairs = [(one.sample.seed, one.sample.guide_scale[0]) for one in calls]
    assert pairs == [(seed, scale) for seed in (1, 2) for scale in (1, 2.5, 4)]
    sheet = Image.open(tmp_path / "o/sheet.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    page = (tmp_path / "o/sheet.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 6 and page.count("sample_guide_scale = 2.5") == 2 and "0001-006.png" in page


def test_a_csv_and_a_folder_of_pictures(tmp_path, calls):
    (tmp_path / "j.csv").write_text('name,seed,prompt\none,1,"a red circle, moving"\ntwo,2,\n', encoding="utf-8")
    assert run(tmp_path / "j.csv", "--out", tmp_path / "o", "--prompt", "blue", *QUICK) == 0
    assert [(one.sample.seed, one.sample.prompt) for one in calls] == [(1, "a red circle, moving"), (2, "blue")]
    calls.clear()
    (tmp_path / "in").mkdir()
    for name in ("b", "a c"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"in/{name}.png")
    (tmp_path / "in/b.txt").write_text("a blue circle moving left")
    argv = ("--task", "i2v-tiny", "--prompt", "it moves", "--sample_steps", 1, "--frame_num", 5, "--quiet")
    assert run(tmp_path / "in", "--out", tmp_path / "p", *argv) == 0
    assert [one.sample.prompt for one in calls] == ["it moves", "a blue circle moving left"]
    assert made(tmp_path / "p") == ["a_c.json", "a_c.mp4", "b.json", "b.mp4"]


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"seed": 1', "line 1: not JSON"),
        ('{"seed": 1}\n[]', "line 2: a job must be an object"),
        ('{"sede": 1}', "line 1: unknown option sede"),
        ('{"save_file": "a.mp4"}', "unknown option save_file"),
        ('{"easycache": true, "cache_trace": "t.jsonl"}', "unknown option cache_trace"),
        ('{"name": "../a"}', "name must be a file name"),
        ('{"name": "a"}\n{"name": "a"}', "two jobs are called a"),
        ('{"seed": [1]}', "line 1: --seed must be a number"),
        ('{"seed": 1, "seed": 2}', "duplicate name seed"),
        ("", "has no jobs"),
        ('{"name": "sheet"}', "but not sheet"),
        ('{"name": "%s"}' % ("字" * 70), "at most 200 bytes"),
    ],
)
def test_wrong_jobs_are_one_line_before_any_work(tmp_path, capsys, calls, text, told):
    (tmp_path / "j.jsonl").write_text(text)
    assert run(tmp_path / "j.jsonl", "--out", tmp_path / "o", *QUICK) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not calls and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "give JOBS"),
        (["--grid", "seed"], "must be FLAG=VALUE"),
        (["--grid", "seed=1..x"], "failed: 0001-001: --seed must be a whole number"),
        (["--grid", "seed=3..1"], "no range"),
        (["--grid", "seed=1 seed=2"], "seed is there twice"),
        (["--grid", "out=1"], "with a flag of generate.py"),
        (["nothing.jsonl"], "no file or folder nothing.jsonl"),
        (["setup.py"], "must be a .jsonl or .csv file"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, argv, told):
    assert run(*argv, "--out", tmp_path / "o", *QUICK) in (1, 2)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_files_of_others_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "0001.mp4").write_bytes(b"a holiday")
    jobs = lines(tmp_path / "j.jsonl", {"seed": 1})
    assert run(jobs, "--out", tmp_path, *QUICK) == 2
    assert "0001.mp4 is there and of no batch" in capsys.readouterr().err
    assert (tmp_path / "0001.mp4").read_bytes() == b"a holiday"


def test_a_sheet_takes_the_place_of_a_sheet_alone(tmp_path, capsys):
    (tmp_path / "sheet.html").write_text("<title>Invoices</title>")
    argv = ("--grid", "seed=1..2", "--out", tmp_path, *QUICK)
    assert run(*argv) == 2 and "sheet.html is there and of no batch" in capsys.readouterr().err
    (tmp_path / "sheet.html").unlink()
    assert run(*argv) == 0 and run(*argv) == 0


def test_a_prompt_may_have_any_separator(tmp_path, calls):
    (tmp_path / "j.jsonl").write_text('{"prompt": "a red\u2028circle", "seed": 1}\r\n\n{"seed": 2}\n', encoding="utf-8")
    assert run(tmp_path / "j.jsonl", "--out", tmp_path / "o", *QUICK) == 0
    assert calls[0].sample.prompt == "a red\u2028circle" and len(calls) == 2


def test_help_imports_no_torch():
    code = "import sys; from wan.batch.__main__ import make_parser; make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
