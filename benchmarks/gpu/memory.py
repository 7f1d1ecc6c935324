"""Rows about weights that do not lie on the device: streamed, loaded, swapped."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import timed
from benchmarks.gpu.bench import BF16, SPARE_BYTES, Bench, Skip, weight_bytes
from benchmarks.random_weights import RandomSource, on_meta

_SLOTS = 2  # of streamed blocks on the device


def offload(bench: Bench) -> dict[str, Any]:
    """Blocks from RAM, as many resident as a budget of device memory holds, beside all of them resident: 14B at 480p,
    as many layers as fit whole."""
    from benchmarks.offload import load, measure, streamed_bytes

    bench.clear()
    config, latent = bench.config("14B"), bench.shapes.latents["480p"]
    args = bench.inputs(config, latent)
    working = _working_bytes(bench, config, args)
    block = streamed_bytes(config | {"num_layers": 1}, {"granularity": "block"})
    if bench.is_cuda:
        fit = int((torch.cuda.mem_get_info(bench.device)[0] - working - SPARE_BYTES) // block)
        if fit < 4:
            raise Skip("not even four layers fit on the device")
        config = bench.config("14B", fit)
    if (free := _free_ram()) < 1.2 * weight_bytes(config):
        raise Skip(f"{weight_bytes(config) / 1e9:.0f} GB of blocks in RAM, {free / 1e9:.0f} GB are free")
    whole = bench.config("14B")
    outside = weight_bytes(whole) - whole["num_layers"] * block
    ways: dict[str, dict[str, Any]] = {"resident": {}}
    for budget in bench.shapes.budgets_gb:
        fit = int((budget * 1e9 - SPARE_BYTES - working - outside) // block) - _SLOTS
        share = min(1.0, max(0, fit) / whole["num_layers"])
        ways[f"{budget} GB"] = {"granularity": "block", "resident": share}
    source = RandomSource(on_meta(config))
    found = measure(lambda way: load(source, config, way, bench.device), args, bench.device, 1, 2, ways)
    for name, row in found.items():
        row["resident_blocks"] = round(ways[name].get("resident", 1) * config["num_layers"])
    return {"layers": config["num_layers"], "working_bytes": working, "ways": found}


@torch.inference_mode()
def _working_bytes(bench: Bench, config: dict[str, Any], args: tuple) -> int:
    """What a forward takes beside weights: of two layers, for all are alike."""
    few = config | {"num_layers": 2}
    model = bench.model(few)
    with bench.peak() as peak:
        model(*args)
    del model
    bench.clear()
    return max(0, round(peak.get("peak_bytes", 0) - weight_bytes(few)))


def _free_ram() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def loading(bench: Bench) -> dict[str, Any]:
    """A random file of some layers of 14B to the device, with the file in the system's cache and without; then the swap
    of two experts, the second of which was read into RAM meanwhile, or not."""
    from safetensors.torch import save_file

    from benchmarks.offload import load, read_all
    from wan.memory.experts import Experts
    from wan.weights.source import open_source

    bench.clear()
    config = bench.config("14B", bench.shapes.few)
    source = RandomSource(on_meta(config))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.safetensors")
        save_file({name: source.read(name) for name in source.keys()}, path)
        size, rates = path.stat().st_size, {}
        for what, prepare in (("cold", _drop), ("warm", read_all)):
            prepare(path)
            rates[f"plain read, {what}"] = size / timed(lambda: read_all(path))[0]
            prepare(path)
            seconds, model = timed(lambda: load(open_source(path), config, {}, bench.device), bench.device)
            rates[f"load, {what}"] = size / seconds
            del model
            bench.clear()
        swaps = {}
        for what in ("from the file", "read ahead"):
            experts = Experts(
                lambda name, device, check: _read(path, config, device), lambda: bench.device, keep_all=False
            )
            experts["high"]
            if what == "read ahead":
                experts.prepare("low")
                experts._coming["low"].result()
            swaps[what] = timed(lambda experts=experts: experts["low"], bench.device)[0]
            experts.release()
            del experts
            bench.clear()
    return {"file_bytes": size, "bytes_per_second": rates, "swap_seconds": swaps}


def _read(path: Path, config: dict[str, Any], device: torch.device):
    from wan.weights.assign import load_weights
    from wan.weights.source import open_source

    return load_weights(on_meta(config), open_source(path), "dit", device=device, dtype=BF16)


def _drop(path: Path) -> None:
    """Have the system forget what it has of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
