"""What streaming blocks costs beside having all of them on the device.

    python -m benchmarks.offload [--device cuda] [--out FILE]

On a GPU: random weights of the 14B shape at 832x480, 81 frames; blocks come from RAM. On a CPU: a random checkpoint of
`--gb` GB at `--tokens` tokens; blocks come from the file, which the system has in its cache. All ways predict in the
same run, on a CPU in turns; the prediction must have the same bits. By way:

    seconds          median of one forward
    ratio            to everything resident, in the same run
    transfer_floor   bytes that are streamed / the rate of one copy (GPU) or of plain reads of the file (CPU)
    peak_bytes       device memory (GPU: allocated by torch; CPU: anonymous) over what was there before loading
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import machine, report, timed
from benchmarks.loading import anonymous_bytes, peak_anonymous, write
from benchmarks.random_weights import RandomSource, inputs, on_meta
from wan.command import Parser, run_command
from wan.memory.experts import load_expert
from wan.models.dit import WanModel
from wan.options import check_device
from wan.plan import resident_indices
from wan.quant.scratch import return_freed_memory
from wan.tasks import load_task
from wan.weights.source import Source, open_source

WAYS = {
    "resident": {},
    "block": {"granularity": "block"},
    "block, 40 % resident": {"granularity": "block", "resident": 0.4},
    "phase": {"granularity": "phase"},
}
GPU_LATENT = (16, 21, 60, 104)  # 832x480, 81 frames: 32,760 tokens


def load(source: Source, config: dict[str, Any], way: dict[str, Any], device: torch.device) -> WanModel:
    resident = round(way.get("resident", 0) * config["num_layers"])
    return load_expert(
        on_meta(config),
        source,
        device=device,
        compute_device=device,
        dtype=torch.bfloat16,
        packed=False,
        granularity=way.get("granularity"),
        resident_blocks=resident_indices(config["num_layers"], resident),
        blocks_from="ram" if device.type == "cuda" else "disk",
    )


@torch.inference_mode()
def measure(
    make: Callable[[dict[str, Any]], WanModel],
    args: tuple,
    device: torch.device,
    loads: int,
    forwards: int,
    ways: Mapping[str, dict[str, Any]] = WAYS,
) -> dict[str, dict[str, Any]]:
    """Every way by its name. Each is loaded so many times, in turns, and predicts so often each time; the first
    prediction, which finds no block on its way, does not count."""
    found: dict[str, dict[str, Any]] = {name: {"all_seconds": [], "peak_bytes": 0} for name in ways}
    wanted = None
    for _ in range(loads):
        for name, way in ways.items():
            seconds = []
            with device_memory(device) as peak:
                model = make(way)
                for _ in range(forwards):
                    taken, out = timed(lambda model=model: _finish(model(*args), device))
                    seconds.append(round(taken, 3))
                model.offload.close()
            del model
            gc.collect()
            wanted = out if wanted is None else wanted
            if not torch.equal(out, wanted):
                raise RuntimeError(f"{name}: not the bits of everything resident")
            found[name]["all_seconds"] += seconds[1:]
            found[name]["peak_bytes"] = max(found[name]["peak_bytes"], peak[0])
    for row in found.values():
        row["seconds"] = median(row["all_seconds"])
    for row in found.values():
        row["ratio"] = round(row["seconds"] / found["resident"]["seconds"], 3)
    return found


def _finish(out: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out.cpu()


@contextmanager
def device_memory(device: torch.device):
    """Yields a list that holds the peak afterwards."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    return_freed_memory()
    before = anonymous_bytes()
    with peak_anonymous() as seen:
        yield peak
    peak.append(max(seen) - before)


def streamed_bytes(config: dict[str, Any], way: dict[str, Any]) -> int:
    """By a forward."""
    if "granularity" not in way:
        return 0
    block = on_meta(config).blocks[0]
    matrices = sum(one.numel() for one in block.parameters() if one.ndim == 2) * 2
    return matrices * (config["num_layers"] - round(way.get("resident", 0) * config["num_layers"]))


def gpu(device: torch.device, runs: int) -> dict[str, Any]:
    config = dict(load_task("t2v-14B").dit)
    source = RandomSource(on_meta(config))
    args = inputs(config, GPU_LATENT, device)
    found = measure(lambda way: load(source, config, way, device), args, device, 1, runs + 1)
    rate = transfer_rate(device)
    _add_floors(found, config, rate)
    return {"shape": "14B, 832x480, 81 frames", "transfer_rate": rate, "ways": found}


def transfer_rate(device: torch.device) -> float:
    """Bytes/s of copies of pinned memory to a GPU."""
    pinned, there = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 28, device=device).byte()
    return len(pinned) / min(timed(lambda: _copied(pinned, there))[0] for _ in range(5))


def _copied(pinned: torch.Tensor, there: torch.Tensor) -> None:
    there.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize(there.device)


def cpu(gigabytes: float, tokens: int, runs: int) -> dict[str, Any]:
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path, config = write("safetensors", gigabytes, Path(folder))
        side = 2 * round((tokens / 3) ** 0.5)
        args = inputs(config, (16, 3, side, side), device)
        found = measure(lambda way: load(open_source(path), config, way, device), args, device, runs, 2)
        rate = path.stat().st_size / timed(lambda: read_all(path))[0]
        _add_floors(found, config, rate)
        size = path.stat().st_size
    return {"file_bytes": size, "layers": config["num_layers"], "read_rate": rate, "ways": found}


def _add_floors(found: dict[str, dict[str, Any]], config: dict[str, Any], rate: float) -> None:
    for name, row in found.items():
        row["streamed_bytes"] = streamed_bytes(config, WAYS[name])
        row["transfer_floor"] = round(row["streamed_bytes"] / rate, 3)


def read_all(path: Path) -> None:
    buffer = bytearray(64 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.offload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default auto")
    parser.add_argument("--runs", type=int, default=3, help="forwards of each way that count; default 3")
    parser.add_argument("--gb", type=float, default=1.0, help="on a CPU: size of the checkpoint; default 1")
    parser.add_argument("--tokens", type=int, default=768, help="on a CPU: tokens, about; default 768")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    device = torch.device(check_device(args.device))
    if device.type == "cuda":
        result = {"gpu": torch.cuda.get_device_name(device)} | gpu(device, args.runs)
    else:
        result = cpu(args.gb, args.tokens, args.runs)
    report({"machine": machine(), **result}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
