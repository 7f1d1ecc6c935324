"""Runs a function on several processes of a gloo group."""

import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def run(ranks, work, folder, *args):
    """`work(*args)` on each rank -> what each returned: tensors, numbers and text, in lists and dicts.

    The function is one of a module, for it travels by its name. AssertionError with the trace of one that failed.
    """
    mp.start_processes(_main, (ranks, work, str(folder), args), nprocs=ranks, start_method="spawn")
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _main(rank, ranks, work, folder, args):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, ranks, rank)
    try:
        torch.save(work(*args), Path(folder, f"{rank}.pt"))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
