"""Jobs of real processes: all of them end, in bounded time, and one says why."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.dist.processes import Program, environments
from wan.distributed.launch import World
from wan.distributed.watchdog import Failure

pytestmark = pytest.mark.dist
REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 60  # an upper bound for whatever must happen; nothing here takes so long

# What a rank of a job does, as the command line does it. It reads: case, timeout, and a mark to find it by.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from wan.distributed.launch import World
from wan.distributed.signals import listening

def touch(name):
    path = Path(f"{name}-{world.rank}")
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").replace(path)

def import_together():
    import torch.distributed
    touch("imported")
    while len(list(Path(".").glob("imported-?"))) < int(os.environ["PRESENT"]):
        time.sleep(0.02)

def loop(seconds):
    import torch
    import torch.distributed as dist
    world.stage, until, count = "denoise", time.monotonic() + seconds, 0
    if case == "stuck":
        touch("looping")
        if world.rank == 0:
            time.sleep(100)
    while True:
        left = torch.tensor([until - time.monotonic()])
        dist.all_reduce(left, dist.ReduceOp.MIN)  # all leave in the same round
        if left < 0:
            return
        count += 1
        if count == 5:
            touch("looping")
            if world.rank == 2 and case in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, case))
        time.sleep(0.02)

def main():
    world.at_failure = lambda: "note: kept" if world.rank == 0 else None
    if case == "flags":
        raise ValueError("bad flag")
    if timeout_s < 30:
        import_together()  # which takes longer on a busy machine than the timeout may be
    world.start("cpu", timeout_s, {"--steps": str(2 + world.rank // 2) if case == "differ" else "2", "--size": "3"})
    world.stage = "load"
    world.agree({"the weights": str(world.rank if case == "differ in files" else 0)})
    if case == "all fail":
        raise ValueError("no such file")
    if case == "load":
        if world.rank == 2:
            raise ValueError("no such file")
        if world.rank == 0:
            time.sleep(100)  # far from any collective
    loop(0.3 if case in ("first last", "first early") else 100.0)
    if (world.rank == 0) == (case == "first last"):
        time.sleep(2)

case, timeout_s = sys.argv[1], float(sys.argv[2])
world = World.from_environment()
code = 0
with listening() as signals:
    try:
        main()
    except KeyboardInterrupt:
        code = world.report(signals.word, signals.exit_code)
    except Exception as error:
        code = world.report(f"error: {error}".splitlines()[0], 1)
    finally:
        world.close()
sys.exit(code)
"""


class Job:
    """Processes that run WORKER in a folder: started by torchrun, or one by one, as by srun, but for their imports."""

    def __init__(self, folder, case, ranks=3, torchrun=False, timeout_s=PATIENCE_S, absent=(), named=None, port=None):
        self.folder, self.ranks, self.mark = folder, ranks, f"mark-{os.getpid()}-{folder.name}"
        self.torchrun = torchrun
        (folder / "worker.py").write_text(WORKER)
        command = ["worker.py", case, str(timeout_s), self.mark]
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            self.processes = [Program(launcher + command, folder, env | {"PYTHONPATH": str(REPO)})]
            return
        numbers = named or [rank for rank in range(ranks) if rank not in absent]
        by_rank = environments(ranks, numbers, port, PRESENT=str(len(numbers)))
        self.processes = [Program(command, folder, env) for env in by_rank]

    def kill(self):
        for process in self.orphans() + [process for process in self.processes if process.poll() is None]:
            process.kill()
        for process in self.processes:
            process.wait()

    def pids(self):
        """Of the ranks, once all are in the loop."""
        files = [self.folder / f"looping-{rank}" for rank in range(self.ranks)]
        wait_for(lambda: all(file.exists() for file in files), self.stderr)
        return [int(file.read_text()) for file in files]

    def stderr(self):
        return (self.folder / "stderr").read_text()

    def orphans(self):
        found = [
            process for process in psutil.process_iter(["cmdline"]) if self.mark in (process.info["cmdline"] or [])
        ]
        return [process for process in found if process.pid not in [p.pid for p in self.processes]]

    def end(self, but=()):
        """Wait for all, `but` these: exit codes (of the launcher, if there is one) and the lines meant for the user."""
        waited = [process for process in self.processes if process.pid not in but]
        wait_for(lambda: all(process.poll() is not None for process in waited), self.stderr)
        wait_for(lambda: not [process for process in self.orphans() if process.pid not in but], self.stderr)
        assert "destroy_process_group" not in self.stderr()
        assert self.torchrun or "Traceback" not in self.stderr(), self.stderr()  # torchrun has some of its own
        starts = ("error:", "internal error:", "interrupted", "terminated", "note:", "warning:")
        return [p.returncode for p in waited], [line for line in self.stderr().splitlines() if line.startswith(starts)]


def wait_for(condition, describe):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, describe()
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*args, **kwargs):
        jobs.append(Job(tmp_path, *args, **kwargs))
        return jobs[-1]

    yield start
    for each in jobs:
        each.kill()


@pytest.mark.parametrize("case", ["first last", "first early"])
def test_good_end(job, case):
    codes, lines = job(case).end()
    assert (codes, lines) == ([0, 0, 0], [])


def test_good_end_with_a_launcher(job):
    work = job("first early", ranks=2, torchrun=True)
    codes, lines = work.end()
    assert (codes, lines) == ([0], []), work.stderr()


@pytest.mark.parametrize("torchrun", [False, True])
def test_error_on_one_rank(job, torchrun):
    codes, lines = job("load", torchrun=torchrun).end()
    assert codes == ([1] if torchrun else [1, 1, 1])
    assert lines == ["error: rank 2, load: no such file", "note: kept"]


def test_error_on_all_ranks_is_said_once(job):
    codes, lines = job("all fail").end()
    assert codes == [1, 1, 1]
    errors = [line for line in lines if line != "note: kept"]
    assert len(errors) == 1 and errors[0].endswith(", load: no such file"), lines


def test_error_before_the_start_is_said_by_the_first(job):
    assert job("flags").end() == ([1, 1, 1], ["error: bad flag"])


@pytest.mark.parametrize("torchrun", [False, True])
def test_killed_rank(job, torchrun):
    work = job("SIGKILL", torchrun=torchrun)
    codes, lines = work.end()
    assert codes == ([1] if torchrun else [1, 1, -signal.SIGKILL])
    assert_lost_rank_2(lines)


def test_stopped_rank(job):
    work = job("SIGSTOP", timeout_s=4)
    stopped = work.pids()[2]
    codes, lines = work.end(but=[stopped])
    assert codes == [1, 1]
    assert_lost_rank_2(lines)
    os.kill(stopped, signal.SIGCONT)
    codes, _ = work.end()  # it ends too; that the others are gone is all that it can say
    assert codes == [1, 1, 1]


def assert_lost_rank_2(lines):
    errors = [line for line in lines if not line.startswith("note:")]
    assert len(errors) == 1 and errors[0].startswith("error: rank "), lines
    assert ", denoise: lost rank 2, " in errors[0] or ", denoise: rank 2 has not answered for " in errors[0]


def test_missing_rank(job):
    codes, lines = job("load", timeout_s=2, absent=[2]).end()
    assert codes == [1, 1]
    errors = [line for line in lines if line != "note: kept"]
    assert len(errors) == 1 and errors[0].endswith(", start: rank 2 did not come within 2 s"), lines


def test_missing_first_rank(job):
    codes, lines = job("load", ranks=2, timeout_s=1, absent=[0]).end()
    assert codes == [1]
    assert len(lines) == 1 and lines[0].startswith("error: rank 1, start: rank 0 did not come within 1 s ("), lines


def test_ranks_that_were_given_different_things(job):
    codes, lines = job("differ").end()
    [line] = [line for line in lines if line != "note: kept"]
    assert codes == [1, 1, 1] and line.endswith(", start: not the same as on rank 0: --steps (rank 2)")


def test_ranks_that_find_different_files(job):
    codes, lines = job("differ in files").end()
    [line] = [line for line in lines if line != "note: kept"]
    assert codes == [1, 1, 1] and line.endswith(", load: not the same as on rank 0: the weights (ranks 1, 2)")


def test_two_processes_of_one_rank(job):
    codes, lines = job("loop", named=[0, 1, 1]).end()
    errors = [line for line in lines if line != "note: kept"]
    assert codes == [1, 1, 1] and errors == ["error: rank 1, start: another process has RANK 1 too"]


def test_a_port_that_is_taken(job):
    """By something that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        codes, lines = job("loop", ranks=2, timeout_s=2, port=other.getsockname()[1]).end()
    errors = [line for line in lines if line != "note: kept"]
    assert codes == [1, 1] and len(errors) == 2, errors
    assert any(line.startswith("error: rank 0, start: MASTER_PORT ") and " is taken " in line for line in errors)
    assert any(line.startswith("error: rank 1, start: 127.0.0.1:") and " is not rank 0's" in line for line in errors)


@pytest.mark.parametrize("case, ranks", [("loop", [0, 1, 2]), ("stuck", [1])])
def test_interrupted(job, case, ranks):
    work = job(case)
    pids = work.pids()
    for rank in ranks:
        os.kill(pids[rank], signal.SIGINT)
    codes, lines = work.end()
    assert codes == [130, 130, 130]
    assert [line for line in lines if line != "note: kept"] == ["interrupted"]


@pytest.mark.parametrize(
    "signum, said",
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "terminated (hangup)"),
        (signal.SIGKILL, "lost the launcher"),
    ],
)
def test_end_of_the_launcher(job, signum, said):
    work = job("loop", ranks=2, torchrun=True)
    work.pids()
    os.kill(work.processes[0].pid, signum)
    _, lines = work.end()
    errors = [line for line in lines if line != "note: kept"]
    if signum == signal.SIGKILL:  # the ranks have lost what they would agree through on who says so
        assert 1 <= len(errors) <= 2 and all(line.endswith(f", denoise: {said}") for line in errors), lines
    else:
        assert errors == [said], work.stderr()


# Without processes


def test_one_process_alone(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.stage) == (0, 1, 0, 1, "start")
    world.start("cpu", 1.0)
    assert world.report("error: no such file", 1) == 1
    world.close()
    world.close()
    assert capsys.readouterr().err == "error: no such file\n"


GOOD = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_environment(monkeypatch):
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 8, 1, 2)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("WORLD_SIZE", None, "WORLD_SIZE is not set, but RANK is"),
        ("RANK", None, "RANK is not set, but WORLD_SIZE is"),
        ("RANK", "8", "RANK is 8, but WORLD_SIZE is 8"),
        ("RANK", "-1", "RANK must be a whole number from 0, not '-1'"),
        ("WORLD_SIZE", "9" * 12, f"WORLD_SIZE must be 4096 at most, not {'9' * 12}"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number from 1, not 'two'"),
        ("LOCAL_RANK", None, "LOCAL_RANK is not set, but RANK is"),
        ("LOCAL_RANK", "2", "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE is 9, but WORLD_SIZE is 8"),
        ("MASTER_ADDR", None, "WORLD_SIZE is set, but MASTER_ADDR is not"),
        ("MASTER_PORT", "65536", "MASTER_PORT must be below 65536, not 65536"),
    ],
)
def test_nonsense_in_the_environment(monkeypatch, name, value, message):
    for good, text in GOOD.items():
        monkeypatch.setenv(good, text)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        World.from_environment()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "message, line",
    [
        ("error: no such file", "error: rank 2, decode: no such file"),
        ("internal error: KeyError: 'x'", "internal error: rank 2, decode: KeyError: 'x'"),
        ("no such file", "rank 2, decode: no such file"),
        ("interrupted", "interrupted"),
        ("terminated", "terminated"),
    ],
)
def test_line(message, line):
    assert Failure(2, "decode", message, 1).line == line


@pytest.mark.parametrize(
    "message, secondary",
    [
        ("internal error: RuntimeError: [/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer", True),
        ("internal error: DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690", True),
        ("error: Timed out waiting 6000ms for recv operation to complete", True),
        ("error: Failed to recv, got 0 bytes. Connection was likely closed.", True),
        ("error: no such file: model.safetensors", False),
        ("internal error: OutOfMemoryError: CUDA out of memory", False),
        ("interrupted", False),
    ],
)
def test_consequences_are_told_from_causes(message, secondary):
    assert Failure(0, "denoise", message, 1).secondary is secondary


def test_import_without_torch():
    command = "import sys, wan.distributed.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=REPO).returncode == 0


def test_a_second_process_of_a_rank_takes_no_place():
    """Nor does it say that the rank is gone, when it leaves."""
    from torch.distributed import HashStore

    from wan.distributed.watchdog import Board, Watchdog

    store = HashStore()
    boards = [Board(store, 1, 2) for _ in range(2)]
    boards[0].arrive()
    with pytest.raises(RuntimeError, match="another process has RANK 1 too"):
        boards[1].arrive()
    for board, beat in ((boards[1], "0"), (boards[0], "gone")):
        Watchdog(board, False, 1.0, lambda: "start", lambda: None).farewell()
        assert store.get("beat/1").decode() == beat
