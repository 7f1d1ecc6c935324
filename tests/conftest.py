import atexit
import gc
import os
import signal
import sys

# One thread in each process: networks and frames are tiny, and threads of tests side by side would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # where torch came before

# Kernels run on a CPU by Triton's interpreter, which is asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts what it runs in the background with interrupts ignored, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def cluster():
    """One Ray for all tests, of two CPUs."""
    from tests.serve.clusters import Cluster

    made = Cluster()
    yield made
    made.stop()


@pytest.fixture
def two_threads():
    """For code of ours that shares its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
