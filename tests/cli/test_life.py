"""A run on a real machine: signals, outputs that are closed, full or read by nobody, other encodings, no folder."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from wan.distributed.signals import listening

from wan.cli import main
from wan.command import run_command

REPO = Path(__file__).parents[2]
PATIENCE_S = 60
QUICK = ("--size", "32*32", "--frame_num", "1", "--sample_steps", "2", "--seed", "1")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and devices of POSIX")


def start(*command, cwd, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    env = {name: value for name, value in os.environ.items() if name != "SWAN_DEBUG"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, **pipes | {"env": env | {"PYTHONPATH": str(REPO)}}
    )


def wait_for(condition, process):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


# Signals


SAVE = """
from wan.command import run_process

def main():
    import numpy as np
    from wan.media import write_video
    write_video("a.mp4", np.zeros((5, 64, 64, 3), np.uint8), 16, {"task": "x"})
    return 0

run_process(main)
"""
# In place of ffmpeg: takes the pixels and never ends.
STUCK = """#!/bin/sh
trap '' INT HUP TERM
cat > /dev/null
echo $$ > new && mv new pid
while :; do sleep 1; done
"""


@pytest.fixture
def saving(tmp_path):
    """A process in the middle of saving a video, and the one that encodes it."""
    (tmp_path / "encoder").write_text(STUCK)
    (tmp_path / "encoder").chmod(0o755)
    started = []

    def run(**options):
        started.append(
            start("-c", SAVE, cwd=tmp_path, env={"IMAGEIO_FFMPEG_EXE": str(tmp_path / "encoder")}, **options)
        )
        wait_for((tmp_path / "pid").exists, started[-1])
        started.append(int((tmp_path / "pid").read_text()))
        return started[-2]

    yield run
    process, encoder = started
    with contextlib.suppress(ProcessLookupError):
        os.kill(encoder, signal.SIGKILL)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "names, code, said",
    [
        (["SIGINT", "SIGINT"], 130, "interrupted"),
        (["SIGTERM", "SIGTERM"], 143, "terminated"),
        (["SIGHUP"], 129, "terminated (hangup)"),
    ],
)
def test_a_signal_while_saving(saving, tmp_path, names, code, said):
    process = saving()
    for name in names:
        process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=PATIENCE_S) == ("", f"{said}\n") and process.returncode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "pid"]
    encoder = int((tmp_path / "pid").read_text())  # killed, and perhaps not yet reaped by the system
    assert not psutil.pid_exists(encoder) or psutil.Process(encoder).status() == psutil.STATUS_ZOMBIE


def test_nohup(saving):
    process = saving(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE_S) == ("", "terminated\n") and process.returncode == 143


def test_the_terminals_interrupt_does_not_reach_the_encoder(saving, tmp_path):
    """It goes to all processes of its group, and an encoder's error would be told in place of the interruption."""
    saving(start_new_session=True)
    encoder = int((tmp_path / "pid").read_text())
    assert os.getsid(encoder) == encoder


def test_terminated_while_loading(tmp_path):
    process = start(REPO / "generate.py", *QUICK, "--save_file", "a.png", cwd=tmp_path)
    assert process.stderr.readline() == "t2v-tiny, seed 1\n"  # torch is imported next
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143 and out == "" and err.splitlines()[-1] == "terminated", err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


class Interrupting:
    """Has a signal come where Python drops the exception."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)


def test_an_interrupt_that_python_drops_comes_again(capsys):
    def body():
        Interrupting()
        time.sleep(PATIENCE_S)  # not to its end
        return 0

    began = time.monotonic()
    assert run_command(body) == 130 and time.monotonic() - began < PATIENCE_S
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_that_a_library_swallows_is_looked_at(tmp_path, monkeypatch, capsys):
    def swallowed(path):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE_S)
        return []

    monkeypatch.setattr("wan.engine.start_lines", swallowed)
    assert main([*QUICK, "--save_file", str(tmp_path / "a.png")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted" and not list(tmp_path.iterdir())


def test_what_fails_after_a_signal_fails_because_of_it(capsys):
    def body():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(PATIENCE_S)
        raise RuntimeError("Error calling __set_name__")

    assert run_command(body) == 143
    assert capsys.readouterr().err == "terminated\n"


def test_a_signal_during_an_import_waits_for_its_end():
    with listening() as signals:
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            done = True
        assert done and signals.word == "terminated (hangup)" and signals.exit_code == 129


# Outputs


def run(*flags, shell="", cwd, code=0, python=sys.executable, **env):
    """generate.py in a shell, which redirects as `shell` says: what is printed on stdout and stderr."""
    command = ["sh", "-c", f'"$@" {shell}', "sh", python, str(REPO / "generate.py"), *flags]
    done = subprocess.run(command, cwd=cwd, capture_output=True, env={**os.environ, **env})
    assert done.returncode == code, done
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("flag", ["--help", "--dry_run"])
def test_stdout_that_takes_nothing(flag, tmp_path, quick_python):
    python = sys.executable if flag == "--help" else quick_python
    read, write = os.pipe()
    os.close(read)
    command = [python, str(REPO / "generate.py"), flag]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")  # the reader wants no more
    if flag == "--help":
        assert run(flag, shell=">&-", cwd=tmp_path) == ("", "")
    if Path("/dev/full").exists():
        said = "error: cannot write to standard output: No space left on device\n"
        assert run(flag, shell="> /dev/full", cwd=tmp_path, code=1, python=python) == ("", said)


def test_text_that_the_terminal_cannot_show(tmp_path):
    name = os.fsdecode(b"\xff\xe7.mp4")
    flags = ("--dry_run", "--prompt", "Bär 猫", "--save_file", name)
    out, err = run(*flags, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert out.isascii() and "t2v-tiny" in out and err == ""
    _, err = run("--dry_run", "--ckpt_dir", name, cwd=tmp_path, code=2, PYTHONIOENCODING="ascii")
    assert err.startswith("error: --ckpt_dir: no folder ") and err.isascii()


def test_no_working_folder(tmp_path):
    gone = 'cd "$PWD" && rmdir "$PWD" && exec "$@"'
    said = "error: the working folder is gone (No such file or directory); cd to one that is there\n"
    for flags, code in ((["--help"], 0), (["--dry_run"], 1)):
        folder = tmp_path / "gone"
        folder.mkdir()
        command = ["sh", "-c", gone, "sh", sys.executable, str(REPO / "generate.py"), *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr == said * code


class Broken:
    """stderr of which nobody reads."""

    encoding = "utf-8"

    def write(self, *text):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("stderr", [None, Broken(), open(os.devnull)], ids=["closed", "unread", "not to be written"])
def test_progress_that_cannot_be_printed_ends_no_run(stderr, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main([*QUICK, "--save_file", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.count("\n") == 1 and (tmp_path / "a.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_report_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*QUICK, "--quiet", "--save_file", str(tmp_path / "a.png")]) == 1
    said = f"error: cannot write to standard output: No space left on device; the video is in {tmp_path / 'a.png'}\n"
    assert capsys.readouterr().err == said and (tmp_path / "a.png").exists()
