import atexit
import ctypes
import gc
import multiprocessing
import os
import platform
import signal
import sys
import time

# One thread in each process: networks and frames are tiny, and threads of tests side by side would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # where torch came before

# Kernels run on a CPU by Triton's interpreter, which is asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts what it runs in the background with interrupts ignored, nohup with hangups, and so would all processes
# that tests start.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Processes are forked from one that has these and has computed nothing: importing them takes longer than most tests.
PRELOADED = [
    "torch.distributed.fsdp",
    "transformers.models.umt5.modeling_umt5",
    "wan.pipeline",
    "wan.distributed.launch",
]
multiprocessing.set_forkserver_preload(PRELOADED)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

_frozen_at = 0
atexit.register(gc.unfreeze)  # or Triton tells of all that it still has, behind the last line of a run


@pytest.fixture(autouse=True)
def quick_collection():
    """A pipeline collects garbage after its stages, which takes longer than tiny models do: spare it the imports."""
    global _frozen_at
    if len(sys.modules) > _frozen_at + 50:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)


@pytest.fixture(autouse=True)
def kept_memory():
    """What is freed serves the next tensor: glibc would give it back, and the system zero it anew. A pipeline undoes
    that, and processes of their own have what is usual."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@pytest.fixture(scope="session")
def cluster():
    """One Ray for all tests, of two CPUs."""
    from tests.serve.clusters import Cluster

    made = Cluster()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory):
    """The path of a Python that has imported torch already."""
    from tests.dist.processes import Forked
    from tests.quick_python import serve, write_client

    folder = tmp_path_factory.mktemp("python")
    write_client(folder / "python", folder / "socket")
    server = Forked(serve, str(folder / "socket"))
    while not (folder / "socket").exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield str(folder / "python")
    server.kill()


@pytest.fixture
def two_threads():
    """For code of ours that shares its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
