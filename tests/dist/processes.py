"""Runs a function on several processes of a gloo group, or a program. All are forked, see tests/conftest.py."""

import atexit
import gc
import os
import runpy
import socket
import sys
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


class Program(Forked):
    """`python *arguments` in a folder. What it says goes to the ends of files."""

    def __init__(self, arguments, folder, env, stdout=os.devnull, stderr="stderr"):
        super().__init__(_run, list(map(str, arguments)), folder, env, folder / stdout, folder / stderr)


def environments(ranks, only=None, port=None, **more):
    """What torchrun tells each of so many processes, or `only` some, on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = port or free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "SWAN_DEBUG"}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **more}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (range(ranks) if only is None else only)]


def _run(arguments, folder, env, stdout, stderr):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    gc.freeze()
    sys.argv = arguments
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


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
