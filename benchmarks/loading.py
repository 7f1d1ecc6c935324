"""What loading a shared-out transformer takes in each process: python -m benchmarks.loading [--gb 2] [--ranks 4]

A random checkpoint of so many GB is written as safetensors, `.pth` and GGUF (Q8_0, whose blocks stay packed), and
loaded by so many processes that share its weights out (FSDP2 on gloo). Memory is anonymous (RssAnon, sampled every
2 ms): pages of the file do not count, nor does the code of torch, all of which is imported before. By process:

    share   bytes of the parameters that it keeps
    rise    most anonymous memory while loading, over that before
    limit   share + 15 % + the largest tensor
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from wan.distributed.fsdp import shard_model, weight_mesh
from wan.distributed.parallel import Parallel

from benchmarks.common import machine, report
from benchmarks.peers import build_ours
from benchmarks.peers_gguf import write_random
from wan.command import Parser, run_command
from wan.models.dit import WanModel
from wan.weights.assign import load_weights
from wan.weights.source import open_source

FORMATS = ("safetensors", "pth", "gguf")
MARGIN = 1.15
CONFIG = {"model_type": "t2v", "dim": 2048, "ffn_dim": 8192, "num_heads": 16, "text_dim": 512, "text_len": 64}
LAYER_BYTES = {"safetensors": 135e6, "pth": 135e6, "gguf": 72e6}  # bf16, Q8_0


def write(format: str, gigabytes: float, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of about that size, and the configuration of its network."""
    config = CONFIG | {"num_layers": max(2, round(gigabytes * 1e9 / LAYER_BYTES[format]))}
    path = folder / f"random.{format}"
    if format == "gguf":
        write_random(path, config, "Q8_0")
        return path, config
    noise = torch.randn(1 << 20).mul_(0.02)
    state = build_ours("dit", config).state_dict()
    tensors = {
        name: noise.expand(-(-one.numel() // len(noise)), -1).flatten()[: one.numel()].view(one.shape).bfloat16()
        for name, one in state.items()
    }
    save_file(tensors, path) if format == "safetensors" else torch.save(tensors, path)
    return path, config


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


def compare(format: str, gigabytes: float, ranks: int) -> dict[str, Any]:
    """Everything about one format, as JSON data."""
    with tempfile.TemporaryDirectory() as folder:
        path, config = write(format, gigabytes, Path(folder))
        mp.start_processes(_process, (ranks, folder, str(path), config), nprocs=ranks, start_method="spawn")
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]
        return {
            "format": format,
            "file_bytes": path.stat().st_size,
            "layers": config["num_layers"],
            "ranks": found,
            "worst_rise_over_share": max(one["rise_bytes"] / one["share_bytes"] for one in found),
            "within_limit": all(one["rise_bytes"] <= one["limit_bytes"] for one in found),
        }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint; default 2")
    parser.add_argument("--ranks", type=int, default=4, help="processes; default 4")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    cases = []
    for format in args.formats:
        print(f"{format} ...", file=sys.stderr, flush=True)
        cases.append(compare(format, args.gb, args.ranks))
    report({"machine": machine(), "processes": args.ranks, "cases": cases}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
