"""python -m wan.batch --ray: many videos by many machines."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import psutil
import pytest
from PIL import Image

from tests.serve.clusters import ENV, PATIENCE_S, free_port
from wan import engine
from wan.batch.__main__ import main as batch
from wan.command import run_command
from wan.remote import group

# Ray reads its environment when it is imported, which the cluster's token is in by then: not here.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install swan-video[ray]")
pytestmark = [pytest.mark.slow, needs_ray]
QUICK = ["--frame_num", "1", "--sample_steps", "1", "--device", "cpu"]


def run(*argv):
    return run_command(lambda: batch([str(one) for one in argv]))


def lines(path, *jobs):
    path.write_text("\n".join(map(json.dumps, jobs)), encoding="utf-8")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".png")}


def seats(process):
    """The actors' processes below one."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [one] if "ray::Seat" in "".join(one.cmdline()) else []
        except psutil.Error:
            pass
    return found


def test_the_same_bytes_as_without_ray(tmp_path, capsys, cluster, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    common = {"frame_num": 5, "sample_steps": 1, "seed": 1}
    jobs = [
        {"task": "i2v-tiny", "image": "first.png", **common, "name": "from a picture"},
        {"task": "t2v-tiny", **common},
        {"task": "t2v-tiny", "frame_num": 6, "name": "wrong"},
        {"task": "i2v-tiny", "image": "none.png", **common, "name": "none"},
        {"task": "t2v-tiny", "ckpt_dir": "nowhere", "name": "nothing_to_load"},
        {"task": "i2v-tiny", "image": "/dev/null", **common, "name": "no_file"},
    ]
    jobs = lines(tmp_path / "j.jsonl", *jobs)
    assert run(jobs, "--out", tmp_path / "here", "--device", "cpu", "--quiet") == 1
    here = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "make", None)  # nothing is made in this process
        argv = (jobs, "--out", tmp_path / "there", "--device", "cpu", "--ray", cluster.address, "--workers", 3)
        assert run(*argv) == 1
        there = capsys.readouterr().err
        assert run(*argv) == 1 and "job/s" not in capsys.readouterr().err  # nothing is left to make
    assert "the cluster has room for 2 of 3 workers; the others wait" in there
    assert contents(tmp_path / "there") == contents(tmp_path / "here") and len(contents(tmp_path / "here")) == 2
    failures = re.findall(r"^failed: (.*) \(on [^)]+\)$", there, flags=re.M)  # which name the machine
    assert {f"failed: {one}" for one in failures} == {one for one in here.splitlines() if "/dev/null" not in one}
    assert len(set(failures)) == 3
    assert "failed: no_file: /dev/null: not a plain file" in there  # which does not travel
    records = [json.loads((tmp_path / folder / "0002.json").read_text()) for folder in ("here", "there")]
    for record in records:
        record["report"].pop("seconds")
    assert records[0] == records[1]


def test_a_worker_is_killed_at_work(tmp_path, capsys):
    jobs = lines(tmp_path / "j.jsonl", *({"seed": seed} for seed in range(40)))
    command = [sys.executable, "-m", "wan.batch", str(jobs), "--out", str(tmp_path / "there"), *QUICK]
    command += ["--ray", "local", "--workers", "2"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=ENV, text=True)
        deadline = time.monotonic() + PATIENCE_S
        while len(contents(tmp_path / "there") if (tmp_path / "there").exists() else {}) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        workers = seats(process)
        assert len(workers) == 2
        workers[0].kill()
        out, _ = process.communicate(timeout=PATIENCE_S)
        told = (tmp_path / "log").read_text()
    assert process.returncode == 0, told
    assert json.loads(out) | {"seconds": 0, "out": ""} == {
        **{"jobs": 40, "made": 40, "done": 40, "failed": []},
        **{"seconds": 0, "out": ""},
    }
    assert told.count("it is made again") <= 1
    assert run(jobs, "--out", tmp_path / "here", *QUICK, "--quiet") == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here") and len(contents(tmp_path / "here")) == 40


def test_interrupted_nothing_stays_behind(tmp_path):
    jobs = lines(tmp_path / "j.jsonl", *({"seed": seed, "sample_steps": 900} for seed in range(2)))
    command = [sys.executable, "-m", "wan.batch", str(jobs), "--out", str(tmp_path / "o"), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--ray", "local", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, text=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not seats(process):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, told) == (130, "", "interrupted\n")
    assert list((tmp_path / "o").iterdir()) == []
    gone, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert not alive


def test_no_cluster_is_one_line(tmp_path, capsys):
    argv = ("--grid", "seed=1..2", "--out", tmp_path / "o", *QUICK)
    for address, code, told in [
        (f"127.0.0.1:{free_port()}", 1, "nobody answers there"),
        (f"ray://127.0.0.1:{free_port()}", 1, "nobody answers there"),
        ("somewhere", 2, "--ray must be local, auto, HOST:PORT or ray://HOST:PORT"),
    ]:
        assert run(*argv, "--ray", address) == code
        error = capsys.readouterr().err
        assert error.startswith("error: --ray") and told in error and error.count("\n") == 1
    assert run(*argv, "--workers", 2) == 2
    assert "--workers is for --ray" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wan.remote.cluster.find_spec", lambda name: None)
    assert run("--grid", "seed=1", "--out", tmp_path / "o", "--ray", "local") == 1
    assert "Ray is not installed: pip install swan-video[ray]" in capsys.readouterr().err


def test_another_swan_is_refused(tmp_path, capsys, cluster, monkeypatch):
    monkeypatch.setattr(group, "__version__", "99.0")
    assert run("--grid", "seed=1", "--out", tmp_path / "o", *QUICK, "--quiet", "--ray", cluster.address) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: --ray: no worker is left: .* has Swan .*, and this machine 99.0", error)
    assert error.count("\n") == 1
