"""generate.py as one of several processes: flags, the plan, one video, and the ways a run can fail."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.dist.processes import Program, environments
from wan.cli import main
from wan.errors import UsageError
from wan.options import build_request
from wan.options.alike import file_fact, request_facts
from wan.tasks import load_task

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "wan/assets/tiny"
STRIPES = TINY / "loras/stripes.safetensors"
LIMIT_S = 150  # for what takes some seconds on a machine that does nothing else


# Flags


@pytest.mark.parametrize(
    "world, options, message",
    [
        (1, {"ulysses_size": 8}, "--ulysses_size 8 needs 8 processes, there is 1: torchrun --nproc_per_node=8"),
        (
            4,
            {"ring_size": 3},
            "--ring_size 3 cannot be made of 4 processes; choose one of: --ulysses_size 4, --ring_si",
        ),
        (
            3,
            {"cfg_parallel": True},
            "--cfg_parallel cannot be made of 3 processes; choose one of: --ulysses_size 3, --r",
        ),
        (2, {"cfg_parallel": True, "sample_guide_scale": 1}, "--cfg_parallel shares out the two branches of guidance"),
        (
            1,
            {"dit_fsdp": True},
            "--dit_fsdp shares weights out over several processes, there is 1: start with torchrun",
        ),
        (
            2,
            {"t5_fsdp": True, "device": "cuda:1"},
            "--device cuda:1 is one device, for 2 processes; choose auto, cpu or",
        ),
        (2, {"dist_timeout": 0}, "--dist_timeout must be a whole number from 1 to 86400, not 0"),
        (2, {"ulysses_size": "two"}, "--ulysses_size must be a whole number from 1 to 4096, not 'two'"),
        (128, {}, "80 tokens cannot be shared by 128 processes: make a larger video"),
    ],
)
def test_what_cannot_be_shared_is_one_line(world, options, message):
    with pytest.raises(UsageError) as error:
        build_request(options, world)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, grid",
    [
        ({}, (1, 1, 8)),
        ({"cfg_parallel": True}, (2, 1, 4)),
        ({"ring_size": 4}, (1, 4, 2)),
        ({"ulysses_size": 2}, (1, 4, 2)),
        ({"ulysses_size": 2, "cfg_parallel": True}, (2, 2, 2)),
    ],
)
def test_an_axis_that_is_not_given_takes_what_is_left(options, grid):
    request = build_request(options, 8)
    assert request.load.grid == grid and request.load.offload == "none"
    assert build_request({}).load.offload == "auto"


def test_more_ulysses_ranks_than_heads_are_warned_of():
    assert "5 of these processes have no attention to do" in " ".join(build_request({}, 8).warnings)


def test_a_video_does_not_store_how_it_was_shared():
    stored = build_request({"ulysses_size": 4, "dit_fsdp": True, "dist_timeout": 9}, 4).settings()
    assert not {"ulysses_size", "dit_fsdp", "dist_timeout", "offload_model"} & stored.keys()


# What all must have been given alike


@pytest.mark.parametrize(
    "options, flags",
    [
        ({"sample_guide_scale": 9}, ["--sample_guide_scale"]),
        ({"sample_solver": "euler", "sample_steps": 12}, ["--sample_solver", "--sample_steps"]),
        ({"seed": 2}, ["--seed"]),
        ({"size": "32*64"}, ["--size"]),
        ({"prompt": "a circle"}, ["--prompt"]),
        ({"lora": f"{STRIPES}:0.5"}, ["--lora"]),
        ({"ring_size": 2}, ["--ulysses_size, --ring_size or --cfg_parallel"]),
        ({"offload": "block"}, ["--offload"]),
        # These may differ from machine to machine.
        ({"save_file": "other.mp4", "dist_timeout": 9, "ram_gb": 3, "ckpt_dir": str(TINY)}, []),
    ],
)
def test_facts_that_ranks_compare(options, flags):
    spec = load_task("t2v-tiny")

    def facts(**more):
        given = {"seed": 1, "offload": "none"} | more
        return request_facts(build_request(given, 2), spec, "cpu", seeded=True)

    usual, other = facts(), facts(**options)
    assert sorted(name for name in usual | other if usual.get(name) != other.get(name)) == flags


def test_a_random_seed_may_differ():
    first, second = (request_facts(build_request({}, 2), load_task("t2v-tiny"), "cpu", seeded=False) for _ in range(2))
    assert first == second


def test_files_are_compared_by_what_is_in_them(tmp_path):
    data = np.random.default_rng(0).bytes(5 << 20)
    for name, contents in (("a", data), ("same", data), ("longer", data + b"\0"), ("other", data[:-1] + b"\0")):
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "header").write_bytes(b"\0" + data[1:])
    facts = {name: file_fact([tmp_path / name]) for name in ("a", "same", "longer", "other", "header")}
    assert facts["a"] == facts["same"] and len(set(facts.values())) == 4
    assert file_fact([tmp_path / "a", tmp_path / "other"]) == file_fact([tmp_path / "other", tmp_path / "same"])


# The plan


def environment(rank, world, port=29400):
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in named.items()}}


def test_the_first_rank_prints_the_plan(monkeypatch, capsys):
    flags = ["--task", "t2v-tiny", "--dry_run", "--json", "--dit_fsdp", "--ring_size", "2", "--quiet"]
    for name, value in environment(0, 8).items():
        monkeypatch.setenv(name, value)
    assert main(flags) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert ranks["grid"] == {"cfg": 1, "ring": 2, "ulysses": 4} and ranks["tokens"] == [10] * 8
    assert ranks["heads"] == [1, 1, 1, 0] and ranks["weights_shared"] == ["dit"]
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(flags) == 0 and capsys.readouterr() == ("", "")


def test_nonsense_in_the_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--dry_run"]) == 2
    assert capsys.readouterr().err == "error: RANK is 4, but WORLD_SIZE is 2\n"


def test_a_wrong_flag_is_told_once(monkeypatch, capsys):
    for rank, told in ((0, 1), (1, 0)):
        for name, value in environment(rank, 2).items():
            monkeypatch.setenv(name, value)
        assert main(["--ring_size", "3"]) == 2
        assert capsys.readouterr().err.count("error: --ring_size 3 cannot be made of 2 processes") == told


# Real processes


class Ranks:
    """Processes that make one video, each with flags of its own; what they say is in files."""

    def __init__(self, folder, flags, count=None):
        self.folder, envs = folder, environments(count or len(flags), range(len(flags)))
        self.processes = [
            Program([REPO / "generate.py", *own], folder, env, f"stdout-{rank}", f"stderr-{rank}")
            for rank, (own, env) in enumerate(zip(flags, envs))
        ]

    def said(self, rank, where="stderr"):
        path = self.folder / f"{where}-{rank}"
        return path.read_text() if path.exists() else ""

    def end(self):
        """Wait for all: their exit codes, and what they said on stderr."""
        until(lambda: all(process.poll() is not None for process in self.processes))
        return [process.returncode for process in self.processes], "".join(map(self.said, range(len(self.processes))))


def until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """start(flags of each rank, how many there should be) -> Ranks, of which nothing is left afterwards."""
    started = []

    def run(*args):
        started.append(Ranks(tmp_path, *args))
        return started[-1]

    yield run
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.wait()


def ours(text):
    """Lines about the failure."""
    return [line for line in text.splitlines() if line.startswith(("error:", "internal error:"))]


@pytest.mark.dist
def test_four_processes_make_one_video(start, tmp_path):
    flags = ["--cfg_parallel", "--dit_fsdp", "--t5_fsdp", "--fbcache", "--seed", "-1", "--frame_num", "5"]
    ranks = start(4 * [[*flags, "--sample_steps", "10", "--save_file", "a.mp4", "--quiet"]])
    codes, err = ranks.end()
    assert codes == [0] * 4, err
    report = json.loads(ranks.said(0, "stdout"))  # one line, of one rank
    assert not any(ranks.said(rank, "stdout") for rank in (1, 2, 3))
    assert report["grid"] == {"cfg": 2, "ring": 1, "ulysses": 2} and len(report["peak_by_rank"]) == 4
    assert report["peak_memory_bytes"] == max(peak["peak_memory_bytes"] for peak in report["peak_by_rank"])
    assert report["cache"]["model"]["uncond"]["total"] == 10
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["a.mp4"]
    assert "Warning" not in err and not ours(err), err


@pytest.mark.dist
def test_a_damaged_file_on_one_rank_ends_all(start, tmp_path):
    for rank in range(3):
        shutil.copytree(REPO / "wan/assets/tiny", tmp_path / str(rank))
    path = tmp_path / "1/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    codes, err = start([["--ckpt_dir", str(rank), "--quiet"] for rank in range(3)]).end()
    assert codes == [1, 1, 1]
    [line] = ours(err)
    assert line.startswith("error: rank 1, ") and "truncated" in line


@pytest.mark.dist
def test_a_rank_killed_in_the_loop_ends_all(start):
    ranks = start(3 * [["--sample_steps", "1000", "--save_file", "a.mp4"]])
    until(lambda: "denoise" in ranks.said(0))
    ranks.processes[2].kill()
    codes, err = ranks.end()
    [line] = ours(err)
    assert codes == [1, 1, -signal.SIGKILL] and "lost rank 2" in line


@pytest.mark.dist
def test_a_rank_that_never_comes_is_named(start):
    codes, err = start(2 * [["--dist_timeout", "8", "--quiet"]], 3).end()
    assert codes == [1, 1]
    [line] = ours(err)
    assert "rank 2 did not come within 8 s" in line
