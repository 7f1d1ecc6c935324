"""Files at fault and runs cut short, through the command line and the real pipeline: one line, nothing half-written.

What a wrong request does (exit code 2) is in test_cli.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.dist.processes import Program
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.cli import main
from wan.tasks import load_task

REPO = Path(__file__).parents[2]
TASK = "t2v-tiny"
FILES = load_task(TASK).files
DIT = "diffusion_pytorch_model.safetensors"
WEIGHTS = [DIT, FILES.vae, FILES.t5]
QUICK = ("--frame_num", "1", "--sample_steps", "1", "--size", "32*32", "--prompt", "a")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("pristine"), load_task(TASK))


@pytest.fixture
def checkpoint(pristine, tmp_path):
    """A checkpoint folder to spoil. Its files are links: replace them, do not write into them."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def fails(checkpoint, out, capsys):
    """fails(*flags) runs the task on the checkpoint and returns the one line it ended with, after the exit code."""

    def run(*flags, code=1):
        args = [
            "--task",
            "t2v-tiny",
            "--ckpt_dir",
            str(checkpoint),
            *QUICK,
            "--quiet",
            "--save_file",
            str(out / "a.png"),
            *flags,
        ]
        assert main(args) == code
        printed, line = capsys.readouterr()
        assert printed == "" and line.startswith("error: ") and line.count("\n") == 1, line
        assert not list(out.iterdir())
        return line

    return run


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def test_the_checkpoint_works_when_left_alone(checkpoint, out):
    assert (
        main(
            ["--task", "t2v-tiny", "--ckpt_dir", str(checkpoint), *QUICK, "--quiet", "--save_file", str(out / "a.png")]
        )
        == 0
    )
    assert [file.name for file in out.iterdir()] == ["a.png"]


@pytest.mark.parametrize("file", [*WEIGHTS, f"{FILES.tokenizer}/tokenizer.json"])
def test_missing_file(fails, checkpoint, file):
    (checkpoint / file).unlink()
    line = fails()
    assert "missing; looked for" in line and Path(file).stem.split("_model")[0] in line


def test_empty_folder(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "missing" in fails("--ckpt_dir", str(tmp_path / "empty"))


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_truncated_file(fails, checkpoint, file, kept):
    content = (checkpoint / file).read_bytes()
    replace(checkpoint / file, content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    assert file in fails()


@pytest.mark.parametrize("file", [FILES.vae, FILES.t5])
def test_renamed_file_is_missing(fails, checkpoint, file):
    (checkpoint / file).rename(checkpoint / f"my_{file}")
    line = fails()
    assert f"looked for {file}" in line and f"my_{file}" in line  # what it wanted and what is there


def test_renamed_transformer_is_found(checkpoint, out):
    """It is the only file that can be one."""
    (checkpoint / DIT).rename(checkpoint / "my_model.safetensors")
    assert (
        main(
            ["--task", "t2v-tiny", "--ckpt_dir", str(checkpoint), *QUICK, "--quiet", "--save_file", str(out / "a.png")]
        )
        == 0
    )


def test_two_files_under_each_others_names(fails, checkpoint):
    (checkpoint / FILES.vae).rename(checkpoint / "vae")
    (checkpoint / FILES.t5).rename(checkpoint / FILES.vae)
    (checkpoint / "vae").rename(checkpoint / FILES.t5)
    assert "looks like a" in fails()


@pytest.mark.parametrize("file", WEIGHTS)
def test_file_of_another_component(fails, checkpoint, file):
    """The text encoder in place of the rest; in its own place the VAE. The containers are what the names say."""
    other = torch.load(checkpoint / (FILES.vae if file == FILES.t5 else FILES.t5))
    (checkpoint / file).unlink()
    (save_file if file == DIT else torch.save)(other, checkpoint / file)
    line = fails()
    assert file in line and ("a Wan2.1 VAE" if file == FILES.t5 else "a T5 encoder") in line


@pytest.mark.parametrize("file", WEIGHTS)
def test_file_of_another_model(fails, checkpoint, tmp_path, file):
    """The same component of a model of other dimensions."""
    other = write_checkpoint(tmp_path / "other", shrunk("ti2v-5B"))
    theirs = {DIT: DIT, FILES.vae: "Wan2.2_VAE.pth", FILES.t5: FILES.t5}[file]
    replace(checkpoint / file, (other / theirs).read_bytes())
    assert file in fails()


def test_transformer_that_lacks_a_tensor(fails, checkpoint):
    state = load_file(checkpoint / DIT)
    del state["blocks.1.ffn.0.weight"]
    (checkpoint / DIT).unlink()
    save_file(state, checkpoint / DIT)
    line = fails()
    assert DIT in line and "1 missing (blocks.1.ffn.0.weight)" in line


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1427321\n", "Git-LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>401</body></html>\n", "a web page"),
        (b'{"error": "Repository not found"}', ""),
    ],
    ids=["lfs", "html", "json"],
)
def test_not_weights(fails, checkpoint, file, content, message):
    replace(checkpoint / file, content)
    line = fails()
    assert file in line and message in line


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("container", ["pickle", "zip"])
def test_pickle_that_runs_code(fails, checkpoint, tmp_path, file, container):
    trap = tmp_path / "trap"
    content = {"conv1.weight": torch.zeros(1), "more": Payload(trap)}
    if container == "pickle":
        replace(checkpoint / file, pickle.dumps(content, protocol=2))
    else:
        (checkpoint / file).unlink()
        torch.save(content, checkpoint / file)
    assert file in fails()
    assert not trap.exists()


def test_tokenizer_of_another_encoder(fails, checkpoint):
    path = checkpoint / FILES.tokenizer / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"] += [[f"piece{index}", -1.0] for index in range(1000)]
    replace(path, json.dumps(told).encode())
    assert "has 1066 tokens, the text encoder" in fails()


def test_damaged_tokenizer(fails, checkpoint):
    replace(checkpoint / FILES.tokenizer / "tokenizer.json", b'{"model": ')
    assert "tokenizer.json: not a usable tokenizer" in fails()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "folder", "absent"])
def test_unreadable_image(fails, tmp_path, damage):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = {"truncated": path.read_bytes()[:2000], "empty": b"", "text": b"not an image"}
    path.unlink()
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "folder":
        path.mkdir()
    line = fails("--task", "i2v-14B", "--image", str(path), code=1 if damage in content else 2)
    assert str(path) in line


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_unwritable_folder(fails):
    assert "cannot write to /proc" in fails("--save_file", "/proc/a.png", code=2)


@pytest.mark.parametrize("name", ["", "a.avi", "a.mp4/b.png", "x" * 300 + ".png"])
def test_unwritable_output(fails, out, name):
    assert "--save_file" in fails("--save_file", f"{out}/{name}", code=2)


def test_full_disk_while_saving(checkpoint, out, capsys, monkeypatch):
    """The video is too large for the disk, the latents are not."""
    real = os.replace

    def full(source, target):
        if str(target).endswith(".png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr("os.replace", full)
    assert (
        main(
            ["--task", "t2v-tiny", "--ckpt_dir", str(checkpoint), *QUICK, "--quiet", "--save_file", str(out / "a.png")]
        )
        == 1
    )
    kept = out / "a.png.latents.safetensors"
    line = f"error: cannot write {out / 'a.png'}: No space left on device; the latents are kept in {kept}\n"
    assert capsys.readouterr() == ("", line)
    assert list(out.iterdir()) == [kept] and load_file(kept)["latents"].shape == (16, 1, 4, 4)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_while_denoising(checkpoint, out, tmp_path):
    flags = ("--frame_num", "5", "--size", "32*32", "--sample_steps", "1000", "--save_file", str(out / "a.mp4"))
    command = [REPO / "generate.py", "--ckpt_dir", checkpoint, *flags]
    process = Program(command, tmp_path, dict(os.environ), "printed", "said")
    while "denoise" not in (said := (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""):
        assert process.poll() is None, said
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.wait(60)
    said = (tmp_path / "said").read_text()
    assert process.returncode == 130, said
    assert (tmp_path / "printed").read_text() == "" and said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert not list(out.iterdir())
