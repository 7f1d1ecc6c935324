"""Runs a function on several processes of a gloo group."""

import gc
import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
# Processes are forked from one that has these and has computed nothing: importing them takes longer than most tests.
PRELOADED = ["torch.distributed.fsdp", "transformers.models.umt5.modeling_umt5", "wan.pipeline", "wan.distributed.launch"]
mp.set_forkserver_preload(PRELOADED)


def run(ranks, work, folder, *args):
    """`work(*args)` on each rank -> what each returned: tensors, numbers and text, in lists and dicts.

    The function is one of a module, for it travels by its name. AssertionError with the trace of one that failed.
    """
    fork(ranks, _main, ranks, work, str(folder), args)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def fork(ranks, work, *args):
    """`work(rank, *args)` in a process for each rank, all of which it waits for."""
    mp.start_processes(work, args, nprocs=ranks, start_method="forkserver")


class Forked:
    """`work(*args)` in a process of its own, with what subprocess.Popen has."""

    def __init__(self, work, *args):
        self._process = mp.get_context("forkserver").Process(target=work, args=args)
        self._process.start()
        self.pid, self.wait, self.kill = self._process.pid, self._process.join, self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode


def _main(rank, ranks, work, folder, args):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    gc.freeze()  # a pipeline collects garbage after its stages: spare it the imports
    dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, ranks, rank)
    try:
        torch.save(work(*args), Path(folder, f"{rank}.pt"))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
