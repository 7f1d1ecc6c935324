"""Compiled kernels are kept between runs, and nothing that is damaged or another's is ever loaded."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from wan.models.ops import OPS
from wan.quant import native
from wan.quant.dequantize import dequantize_scheme
from wan.quant.ggml import BY_NAME, random_blocks
from wan.quant.schemes import Scheme, dequantize_rows, random_rows

REPO = Path(__file__).parents[2]
CC = shutil.which("cc")
EVIL = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen("%s", "w")); }
int dequantize(void) { return 0; }
"""
pytestmark = [
    pytest.mark.skipif(CC is None or not hasattr(os, "geteuid"), reason="needs a C compiler, and POSIX"),
    pytest.mark.usefixtures("two_threads"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler makes of the kernels, by the names of the files."""
    folder = tmp_path_factory.mktemp("compiled")
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\n{CC} "$@" || exit 1\nfor out; do :; done\ncp "$out" {folder}\n')
    script.chmod(0o755)
    openmp = native._openmp_runtime() is not None
    native._compile([str(script)], [*native._FLAGS, *(["-fopenmp"] if openmp else [])], native.SOURCE)
    return folder


@pytest.fixture
def place(tmp_path, compiled, monkeypatch):
    """A cache and a temporary folder of the test's own, and a compiler that answers at once and counts its calls."""
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "cc"
    script.write_text(
        f'#!/bin/sh\nfor out; do :; done\ncp {compiled}/$(basename "$out") "$out"\necho >> {tmp_path}/calls\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def first_use():
    """Whether there are kernels, in what is a new process as far as they know."""
    native._library.cache_clear()
    return native._library() is not None


def compilations(place):
    calls = place / "calls"
    return len(calls.read_text()) // 2 if calls.exists() else 0  # to compile, to link


def kept(place):
    return list((place / "cache" / "swan").iterdir())


def evil_library(place):
    (place / "evil.c").write_text(EVIL % (place / "EVIL"))
    subprocess.run([CC, "-shared", "-fPIC", place / "evil.c", "-o", place / "evil.so"], check=True)
    return (place / "evil.so").read_bytes()


def test_kernels_are_compiled_once(place):
    assert first_use() and compilations(place) == 1
    assert first_use() and compilations(place) == 1
    [file] = kept(place)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not list((place / "tmp").iterdir())


def cut(file, place):
    os.truncate(file, 5000)


def empty(file, place):
    os.truncate(file, 0)


def replace(file, place):
    file.write_bytes(evil_library(place))


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def link(file, place):
    shutil.move(file, place / "elsewhere.so")
    file.symlink_to(place / "elsewhere.so")


def pipe(file, place):
    file.unlink()
    os.mkfifo(file)


def open_to_all(file, place):
    file.chmod(0o666)


def swollen(file, place):
    os.truncate(file, 1 << 40)


def foreign(file, place):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(file, 65534, 65534)


DAMAGES = [cut, empty, replace, flip, link, pipe, open_to_all, swollen, foreign]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_anothers_is_made_anew_and_never_loaded(place, damage):
    assert first_use()
    [file] = kept(place)
    whole = file.read_bytes()
    try:
        damage(file, place)
    except OSError as error:
        pytest.skip(f"this file system cannot do that: {error}")
    assert first_use() and compilations(place) == 2
    assert not (place / "EVIL").exists()
    assert [one.read_bytes() for one in kept(place)] == [whole]
    assert first_use() and compilations(place) == 2


def test_a_folder_that_all_may_write_to_is_closed(place):
    assert first_use()
    folder = kept(place)[0].parent
    folder.chmod(0o777)
    (folder / "kernels-planted.so").write_bytes(evil_library(place))
    assert first_use() and not (place / "EVIL").exists()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize("whose", ["swan", "its parent"])
def test_a_folder_of_another_user_is_not_used(place, whose):
    assert first_use()
    folder = kept(place)[0].parent
    if whose == "swan":
        kept(place)[0].write_bytes(evil_library(place))
        os.chown(folder, 65534, 65534)
    else:  # as with sudo, where HOME may be the caller's: nothing of root's is put there
        shutil.rmtree(folder)
        os.chown(folder.parent, 65534, 65534)
    assert first_use() and compilations(place) == 2 and not (place / "EVIL").exists()
    assert not list((place / "tmp").iterdir()) and folder.exists() == (whose == "swan")


def test_a_folder_that_is_a_link_is_not_used(place):
    (place / "cache").mkdir()
    (place / "elsewhere").mkdir(mode=0o755)
    (place / "cache" / "swan").symlink_to(place / "elsewhere")
    assert first_use() and not list((place / "elsewhere").iterdir())
    assert stat.S_IMODE((place / "elsewhere").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "home", ["no HOME", "HOME is a file", "HOME is gone", "HOME is empty", "relative", "a file in the way"]
)
def test_without_a_cache_folder_there_are_kernels_all_the_same(place, home, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("XDG_CACHE_HOME")
    (place / "file").touch()
    if home == "no HOME":
        monkeypatch.delenv("HOME", raising=False)
        import pwd

        def unknown(uid):
            raise KeyError(uid)

        monkeypatch.setattr(pwd, "getpwuid", unknown)
    elif home in ("relative", "a file in the way"):
        monkeypatch.setenv("HOME", str(place / "gone"))
        monkeypatch.setenv("XDG_CACHE_HOME", "cache" if home == "relative" else str(place / "file"))
    else:
        monkeypatch.setenv("HOME", {"file": str(place / "file"), "gone": str(place / "gone")}.get(home.split()[-1], ""))
    before = sorted(place.iterdir())
    assert first_use() and compilations(place) == 1
    assert not list((place / "tmp").iterdir())
    assert sorted(one for one in place.iterdir() if one.name != "calls") == before


def test_without_memory_files(place, monkeypatch):
    """As on a Mac."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert first_use() and first_use() and compilations(place) == 1
    assert not list((place / "tmp").iterdir())


COMPILERS = {
    "garbage": "for out; do :; done\nhead -c 3000 /dev/urandom | tee $out",
    "nothing": "exit 0",
    "fails": "echo no; exit 3",
    "something else": f"for out; do :; done\necho 'int x;' | {CC} -x c - -shared -fPIC -o $out",
    "hangs": "sleep 600 &\necho $! > CHILD\nwait",
}


@pytest.mark.parametrize("what", COMPILERS)
def test_a_compiler_that_is_broken(place, what, monkeypatch):
    monkeypatch.setattr(native, "_COMPILE_SECONDS", 1 if what == "hangs" else 30)
    (place / "cc").write_text(f"#!/bin/bash\n{COMPILERS[what]}\n".replace("CHILD", str(place / "child")))
    with pytest.warns(UserWarning, match=r"no compiled kernels: .*; packed weights are dequantised by torch, slower"):
        assert not first_use()
    assert not list((place / "tmp").iterdir()) and not list((place / "cache").rglob("*.*"))
    if what == "hangs":
        child, until = int((place / "child").read_text()), time.monotonic() + 30
        while is_running(child) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_running(child)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_compiler_with_arguments(place, monkeypatch):
    monkeypatch.setenv("CC", f"{place}/cc -w -O1")
    assert first_use()
    monkeypatch.setenv("CC", "cc 'unfinished")
    with pytest.warns(UserWarning, match="is no command"):
        assert not first_use()


def test_first_uses_at_once(place):
    """By threads of one process, and by two processes with the real compiler."""
    found = []
    barrier = threading.Barrier(4)

    def use():
        barrier.wait()
        blocks, out = random_blocks(BY_NAME["Q8_0"], 9), torch.empty(9, 32)
        found.append(native.dequantize_native(blocks, BY_NAME["Q8_0"], out))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [True] * 4 and len(kept(place)) == 1
    env = {**os.environ, "CC": CC, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(place / "new")}
    code = "from wan.quant import native; print(native._library() is not None)"
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [one.communicate(timeout=120)[0] for one in both] == ["True\n"] * 2
    assert len(list((place / "new" / "swan").iterdir())) == 1


@pytest.mark.parametrize("scheme", native._SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_schemes_are_dequantised_by_a_kernel(scheme, dtype):
    """Bit for bit as schemes.py has it, for rows of one number and of several chunks."""
    for columns in {max(scheme.rotation, 64), 3 * max(scheme.rotation, 192)}:
        rows = random_rows(scheme, 5, columns, seed=1)
        wanted, out = dequantize_rows(rows, scheme, columns, dtype), torch.empty(5, columns, dtype=dtype)
        assert native.dequantize_rows_native(rows, scheme, columns, out)
        assert torch.allclose(out, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_no_kernel_reads_is_left_to_torch():
    scheme = Scheme("int8", torch.int8, 1 << 40, rotation=16384)
    rows = random_rows(scheme, 1, 16384)
    assert not native.dequantize_rows_native(rows, scheme, 16384, torch.empty(1, 16384))
    assert not native.dequantize_rows_native(rows, scheme, 16384, torch.empty(1, 16384, dtype=torch.float16))
    assert dequantize_scheme(rows, scheme, 16384).isfinite().all()


@pytest.mark.parametrize("channels", [1, 24, 384, 700])
@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_of_a_vae_in_bf16(channels, silu):
    """To the last place of bf16, of rows of zeros too; what is not finite stays so. fp32 is left to torch."""
    x, gamma = torch.randn(50, channels).mul(20).bfloat16(), torch.randn(channels) * channels**0.5
    x[7] = 0
    wanted, out = x.new_empty(1, 1, 1, *x.shape), torch.empty_like(x)
    OPS["reference"].rms_norm(x[None, None, None], gamma / channels**0.5, wanted, silu)
    assert native.norm_silu_native(x, gamma, out, silu)
    assert torch.allclose(out.float(), wanted[0, 0, 0].float(), rtol=2**-7, atol=1e-30)
    x[3, 0] = float("nan")
    assert native.norm_silu_native(x, gamma, out, silu) and out[3].isnan().all() and out[4:].isfinite().all()
    assert not native.norm_silu_native(x.float(), gamma, out.float(), silu)
    assert not native.norm_silu_native(x, gamma, torch.empty(channels, 50, dtype=x.dtype).t(), silu) or channels == 1
