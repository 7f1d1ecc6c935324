"""What loading a transformer takes beside dd, and, shared out, in each process: python -m benchmarks.loading [--gb 2]

A random checkpoint of so many GB is written as safetensors, `.pth` and GGUF (Q8_0, whose blocks stay packed), and
loaded by so many processes that share its weights out (FSDP2 on gloo). Memory is anonymous (RssAnon, sampled every
2 ms): pages of the file do not count, nor does the code of torch, all of which is imported before. By process:

    share   bytes of the parameters that it keeps
    rise    most anonymous memory while loading, over that before
    limit   share + 15 % + the largest tensor

`speed` is of one process that loads the whole file, by turns with `dd of=/dev/null bs=16M`: cold (the file is dropped
from the system's cache before each run) and warm; bytes per second of the best run, processor seconds of the median.
dd writes to 16 MB that stay in the processor's cache; a model needs memory of its own, which the system has to find and
clear: `memory` is the least that takes for as many bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from wan.distributed.fsdp import shard_model, weight_mesh
from wan.distributed.parallel import Parallel

from benchmarks.common import in_fresh_process, machine, report
from benchmarks.peers_gguf import write_random
from wan.command import Parser, run_command
from wan.models.dit import WanModel
from wan.quant.scratch import empty_bytes
from wan.tasks import load_task
from wan.weights.assign import load_weights
from wan.weights.source import open_source

FORMATS = ("safetensors", "pth", "gguf")
MARGIN = 1.15
CONFIG = {"model_type": "t2v", "dim": 2048, "ffn_dim": 8192, "num_heads": 16, "text_dim": 512, "text_len": 64}
WEIGHT_BYTES = {"safetensors": 2, "pth": 2, "gguf": 34 / 32}  # bf16, Q8_0


def write(format: str, gigabytes: float, folder: Path, task: str | None = None) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of about that size, and the configuration of its network. task: whose layers it has, so many."""
    config = dict(load_task(task).dit) if task else CONFIG
    layer_bytes = WEIGHT_BYTES[format] * (_weights(config, 3) - _weights(config, 2))
    config = config | {"num_layers": max(2, round(gigabytes * 1e9 / layer_bytes))}
    path = folder / f"random.{format}"
    if format == "gguf":
        write_random(path, config, "Q8_0")
        return path, config
    noise = torch.randn(1 << 20).mul_(0.02)
    with torch.device("meta"):
        state = WanModel(**config).state_dict()
    tensors = {
        name: noise.expand(-(-one.numel() // len(noise)), -1).flatten()[: one.numel()].view(one.shape).bfloat16()
        for name, one in state.items()
    }
    save_file(tensors, path) if format == "safetensors" else torch.save(tensors, path)
    return path, config


def _weights(config: dict[str, Any], layers: int) -> int:
    with torch.device("meta"):
        model = WanModel(**{**config, "num_layers": layers})
    return sum(one.numel() for one in model.parameters())


def load(path: Path, config: dict[str, Any], sharded: bool, parallel: Parallel | None = None) -> WanModel:
    """The checkpoint in bf16, packed blocks left packed; shared out among the processes or whole."""
    with torch.device("meta"):
        model = WanModel(**config, parallel=parallel).eval()
    mesh = weight_mesh("cpu", dist.get_world_size()) if sharded else None
    shard = (lambda model: shard_model(model, list(model.units().values()), mesh)) if sharded else None
    return load_weights(model, open_source(path), "dit", dtype=torch.bfloat16, stream=True, shard=shard)


def measure(path: Path, config: dict[str, Any]) -> dict[str, float]:
    """Of this process, in the middle of a process group."""
    import torch.distributed.fsdp  # noqa: F401 - 70 MB, whatever the checkpoint

    dist.barrier()
    before = anonymous_bytes()
    started = time.perf_counter()
    with peak_anonymous() as seen:
        model = load(path, config, sharded=True)
    seconds = time.perf_counter() - started
    parameters = list(model.parameters())
    kept = [one.to_local() for one in parameters]
    share = sum(one.numel() * one.element_size() for one in kept)
    whole = max(one.numel() * one.element_size() for one in parameters)
    return {
        "share_bytes": share,
        "rise_bytes": max(seen) - before,
        "kept_bytes": anonymous_bytes() - before,
        "limit_bytes": round(MARGIN * share + whole),
        "seconds": seconds,
    }


def speed(path: Path, config: dict[str, Any], runs: int) -> dict[str, Any]:
    """Of dd, of loading, and of taking as much memory. Linux only."""
    size_bytes = path.stat().st_size

    def memory() -> None:
        empty_bytes(size_bytes).view(-1)[::4096].fill_(0)

    calls = {"dd": lambda: _dd(path), "load": lambda: load(path, config, sharded=False), "memory": memory}
    rows: dict[str, Any] = {}
    for state in ("cold", "warm"):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(runs):
            for name, call in calls.items():
                if state == "cold":
                    forget(path)
                found[name].append(_took(call))
        rows[state] = {
            name: {
                "bytes_per_second": round(size_bytes / min(seconds for seconds, _ in took)),
                "processor_seconds": round(median(used for _, used in took), 3),
            }
            for name, took in found.items()
        }
        rows[state]["load_over_dd"] = round(
            rows[state]["load"]["bytes_per_second"] / rows[state]["dd"]["bytes_per_second"], 3
        )
    return rows


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _dd(path: Path) -> None:
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)


def _took(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, processor seconds, of processes that it waited for as well)."""
    before, started = os.times(), time.perf_counter()
    kept = call()
    seconds, after = time.perf_counter() - started, os.times()
    del kept
    return seconds, sum(after[:4]) - sum(before[:4])


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


@contextmanager
def peak_anonymous() -> Iterator[list[int]]:
    done, seen = threading.Event(), [anonymous_bytes()]

    def sample() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(anonymous_bytes())


def _process(rank: int, ranks: int, folder: str, path: str, config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=300), ranks, rank)
    try:
        torch.save(measure(Path(path), config), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def compare(format: str, gigabytes: float, ranks: int, runs: int = 0, task: str | None = None) -> dict[str, Any]:
    """Everything about one format, as JSON data. runs: of `speed`, each way; task: as for `write`."""
    with tempfile.TemporaryDirectory() as folder:
        path, config = write(format, gigabytes, Path(folder), task)
        result: dict[str, Any] = {
            "format": format,
            "file_bytes": path.stat().st_size,
            "layers": config["num_layers"],
            "dim": config["dim"],
        }
        if runs:
            result["speed"] = in_fresh_process(speed, path, config, runs)
        if ranks:
            mp.start_processes(_process, (ranks, folder, str(path), config), nprocs=ranks, start_method="forkserver")
            found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]
            result["ranks"] = found
            result["worst_rise_over_share"] = max(one["rise_bytes"] / one["share_bytes"] for one in found)
            result["within_limit"] = all(one["rise_bytes"] <= one["limit_bytes"] for one in found)
        return result


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint; default 2")
    parser.add_argument("--task", help="have layers of its transformer, e.g. t2v-14B; default: of 2,048 channels")
    parser.add_argument("--ranks", type=int, default=4, help="processes; default 4, 0: none")
    parser.add_argument("--runs", type=int, default=5, help="beside dd, each way; default 5, 0: none")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    cases = []
    for format in args.formats:
        print(f"{format} ...", file=sys.stderr, flush=True)
        cases.append(compare(format, args.gb, args.ranks, args.runs, args.task))
    report({"machine": machine(), "processes": args.ranks, "cases": cases}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
