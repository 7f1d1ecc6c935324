"""A quantised transformer: start, memory and time of this code beside diffusers' GGUF support, on one random file.

    python -m benchmarks.peers gguf [--types Q8_0 Q4_K] [--layers 30] [--runs N] [--out FILE]

The file has the shapes of the released 1.3B transformer. Three sides run in bf16 with equal threads, each in a process
of its own: `ours` keeps the weights packed, `diffusers` does too, `ours_bf16` dequantises them once while loading. They
work in turns, one at a time. `ready` is the time from the start of the process to the loaded model, the file being in
the page cache. Memory is the peak of the resident set; pages of the file that `ours` maps count too. Should the system
drop some of these, they are read again: `major_faults` counts how often that was waited for. The floor of a forward is
the time of its matrix products and attentions plus that of dequantising all layers, each measured alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, report, timed
from benchmarks.peers import DIT, Case, build_ours, build_theirs, inputs, products
from wan.command import Parser, run_command
from wan.errors import SwanError, UsageError
from wan.quant.blocks import dequantize_blocks
from wan.quant.dequantize import dequantize
from wan.quant.ggml import BY_NAME, GGMLType, random_blocks
from wan.weights.source import Source, TensorInfo, open_source
from wan.weights.write.export import ALIGNMENT, Planned, make_metadata, plan_tensors, write_header
from wan.weights.write.recipes import RECIPES

SIDES = ("ours", "diffusers", "ours_bf16")
SIZES = ((3, 32, 32), (9, 30, 52))  # of the latent: 768 and 3,510 tokens
LAYERS = 30
TYPES = ("Q8_0", "Q4_K")
KNOWN_TYPES = tuple(name for name, one in RECIPES.items() if BY_NAME.get(one.base, BY_NAME["F32"]).torch_dtype is None)
WEIGHT_STD = 0.02
SPARE_MEMORY = 4  # times the size of the file: no side needs more to load it
PAUSE_SECONDS = 0.3  # between turns: threads that have just computed spin for a while before they sleep
ROOT = Path(__file__).resolve().parents[1]


# The file


class RandomWeights(Source):
    """The names and shapes of a transformer, as a source to plan a file from."""

    def __init__(self, config: dict[str, Any]):
        state = build_ours("dit", config).state_dict()
        super().__init__([], {name: TensorInfo(tuple(one.shape), torch.float32) for name, one in state.items()})


def write_random(path: Path, config: dict[str, Any], type_name: str) -> dict[str, int]:
    """Write a transformer of random weights, one tensor in memory. Returns ggml type -> tensors."""
    source, recipe = RandomWeights(config), RECIPES[type_name]
    planned = plan_tensors(source, recipe)
    with path.open("wb") as file:
        write_header(file, make_metadata(source, recipe), planned)
        for seed, one in enumerate(planned):
            data = random_data(one, seed).numpy().data
            file.write(data)
            file.write(bytes(-data.nbytes % ALIGNMENT))
    return dict(Counter(one.type.name for one in planned).most_common())


def random_data(planned: Planned, seed: int) -> Tensor:
    """The bytes of a tensor: weights of mean about 0 that keep activations in range; norms and biases random too."""
    shape, kind = planned.shape, planned.type
    if kind.torch_dtype is None:
        blocks = random_blocks(kind, math.prod(shape) // kind.block_weights, seed)
        for offset, scale in zip(kind.scale_offsets, block_scales(kind)):
            _set_half(blocks, offset, scale)
        return blocks.flatten()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 1:
        values = 0.1 * values + float("norm" in planned.name and planned.name.endswith("weight"))
    else:
        fan_in = shape[-1] if planned.name.endswith("modulation") else math.prod(shape[1:])
        values *= fan_in**-0.5
    return values.to(kind.torch_dtype).flatten().view(torch.uint8)


def block_scales(kind: GGMLType) -> list[float]:
    """The scales with which blocks of random codes hold weights of mean 0 and of WEIGHT_STD."""
    blocks, parts = random_blocks(kind, 1000), []
    for one in kind.scale_offsets:
        for offset in kind.scale_offsets:
            _set_half(blocks, offset, float(offset == one))
        parts.append(dequantize_blocks(blocks, kind.name))
    scales = [1.0, *(-(parts[0].mean() / part.mean()).item() for part in parts[1:])]  # a second one is of the offsets
    std = sum(scale * part for scale, part in zip(scales, parts)).std().item()
    return [scale * WEIGHT_STD / std for scale in scales]


def _set_half(blocks: Tensor, offset: int, value: float) -> None:
    blocks[:, offset : offset + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)


# The sides


class Server:
    """A side in a process of its own. `ready_seconds`: from its start to the loaded model."""

    def __init__(self, side: str, file: Path, folder: Path):
        self.side = side
        command = [sys.executable, "-m", "benchmarks.gguf_server", side, str(file), str(folder)]
        command.append(str(torch.get_num_threads()))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self._line()
        self.ready_seconds = time.perf_counter() - started

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **question) -> dict[str, Any]:
        """See `gguf_server.main`."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SwanError(f"{self.side}: its process ended with exit code {self._process.wait()}")
        return line


def in_turns(run: int) -> list[str]:
    """The sides in the order of run number `run`."""
    first = run % len(SIDES)
    return [*SIDES[first:], *SIDES[:first]]


def compare(
    type_name: str,
    config: dict[str, Any] = DIT | {"num_layers": LAYERS},
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    runs: int = 3,
) -> dict[str, Any]:
    """Everything about a file of one type, as JSON data. Ratios are ours / diffusers unless they say otherwise."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, file = Path(name), Path(name, "random.gguf")
        types = write_random(file, config, type_name)
        _write_configs(folder, config)
        ready, servers = _start(file, folder, runs, stack)
        memory = {side: {"ready": server.ask()} for side, server in servers.items()}
        forwards = [_forwards(servers, config, size, runs, folder, memory) for size in sizes]
        stack.close()  # the servers end
        unpack = dequantise_all(file, runs)
        for size, forward in zip(sizes, forwards):
            _add_floor(forward, products(Case("dit", config, size), "ours").measure(torch.bfloat16), unpack)
        file_bytes = file.stat().st_size
    peaks, anonymous = (
        {side: {when: one[field] for when, one in memory[side].items()} for side in SIDES}
        for field in ("peak_bytes", "anonymous_bytes")
    )
    last = list(peaks["ours"])[-1]
    return {
        "type": type_name,
        "config": config,
        "file_bytes": file_bytes,
        "types": types,
        "ready": ready,
        "ready_ratio": _ratio(ready["median_seconds"]),
        "peak_bytes": peaks,
        "anonymous_bytes": anonymous,
        "rss_ratio": {
            name: _ratio({side: peaks[side][when] for side in SIDES})
            for name, when in (("ready", "ready"), ("after_forwards", last))
        },
        "forward_ratio": {str(one["tokens"]): _ratio(one["median_seconds"]) for one in forwards},
        "forward_over_ours_bf16": {str(one["tokens"]): _ratio(one["median_seconds"], "ours_bf16") for one in forwards},
        "dequantise_all": unpack,
        "forwards": forwards,
    }


def _write_configs(folder: Path, config: dict[str, Any]) -> None:
    (folder / "ours.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        build_theirs("dit", config).save_config(folder)


def _start(file: Path, folder: Path, runs: int, stack: ExitStack) -> tuple[dict[str, Any], dict[str, Server]]:
    """Start each side `runs` times, in turns; the last ones stay, until `stack` is closed."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    servers: dict[str, Server] = {}
    for run in range(runs):
        for side in in_turns(run):
            _settle(file)
            server = Server(side, file, folder)
            seconds[side].append(server.ready_seconds)
            if run < runs - 1:
                server.close()
            else:
                stack.callback(server.close)
                servers[side] = server
    return {"seconds": seconds, "median_seconds": _medians(seconds)}, servers


def _settle(file: Path) -> None:
    """Equal conditions for a start: `file` is in the page cache, and free memory is there at once.

    A virtual machine may have given free memory back to its host, and then the first to use it waits for it.
    """
    with file.open("rb") as opened:
        while opened.read(1 << 24):
            pass
    torch.ones(SPARE_MEMORY * file.stat().st_size, dtype=torch.uint8)


def _forwards(
    servers: dict[str, Server],
    config: dict[str, Any],
    size: tuple[int, int, int],
    runs: int,
    folder: Path,
    memory: dict[str, dict[str, dict[str, int]]],
) -> dict[str, Any]:
    """Times of one size, and whether the sides agree; adds to `memory` what was used. The first forward is no run."""
    tokens = math.prod(size) // 4
    question = str(folder / "inputs.pt")
    torch.save(inputs(Case("dit", config, size)), question)
    outputs = {side: str(folder / f"{side}.pt") for side in SIDES}
    first = {side: servers[side].ask(inputs=question, output=outputs[side])["seconds"] for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    faults: dict[str, list[int]] = {side: [] for side in SIDES}
    for run in range(runs):
        for side in in_turns(run):
            time.sleep(PAUSE_SECONDS)
            answer = servers[side].ask(inputs=question, output=None)
            seconds[side].append(answer.pop("seconds"))
            faults[side].append(answer.pop("major_faults"))
            memory[side][f"{tokens} tokens"] = answer
    results = {side: torch.load(path) for side, path in outputs.items()}
    differences = {side: (results["ours"] - results[side]).abs().max() / results[side].std() for side in SIDES[1:]}
    return {
        "size": list(size),
        "tokens": tokens,
        "first_seconds": first,
        "seconds": seconds,
        "median_seconds": _medians(seconds),
        "major_faults": faults,
        "max_difference_over_std": {side: one.item() for side, one in differences.items()},
    }


def dequantise_all(file: Path, runs: int) -> dict[str, Any]:
    """The shortest of `runs` times to dequantise all packed tensors to bf16, one after another into the same memory."""
    source = open_source(file)
    tensors = [one for one in (source.packed(name, mapped=True) for name in source.keys()) if one is not None]
    weights = [math.prod(one.shape) for one in tensors]
    out = torch.empty(max(weights), dtype=torch.bfloat16)

    def run() -> None:
        for one, count in zip(tensors, weights):
            dequantize(one.blocks, one.type, torch.bfloat16, out[:count].view(one.shape))

    seconds = min([timed(run)[0] for _ in range(1 + runs)][1:])
    moved = {"bytes_read": sum(one.blocks.numel() for one in tensors), "bytes_written": 2 * sum(weights)}
    return {"seconds": seconds, **moved, "gb_per_second": sum(moved.values()) / seconds / 1e9}


def _add_floor(forward: dict[str, Any], measured: dict[str, Any], unpack: dict[str, Any]) -> None:
    """The floor of packed weights, of dense ones, and what each side takes beyond its own."""
    floor = {side: measured["seconds"] + unpack["seconds"] * (side != "ours_bf16") for side in SIDES}
    taken = forward["median_seconds"]
    forward["floor"] = {"products": measured, "dequantise_seconds": unpack["seconds"], "seconds": floor}
    forward["gap_seconds"] = {side: taken[side] - floor[side] for side in SIDES}
    forward["seconds_over_floor"] = {side: taken[side] / floor[side] for side in SIDES}


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {side: median(one) for side, one in seconds.items()}


def _ratio(values: dict[str, float], other: str = "diffusers") -> float:
    return values["ours"] / values[other]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.peers gguf", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help="default: Q8_0 Q4_K")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help=f"default: {LAYERS}, all of them")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs of each side (default 3)")
    parser.add_argument("--out", help="also write the JSON there, e.g. benchmarks/results/cpu/peers_gguf.json")
    options = parser.parse_args(argv)
    for name in options.types:
        if name not in KNOWN_TYPES:
            raise UsageError(f"--types {name}: no such type; types: {', '.join(KNOWN_TYPES)}")
    for name in ("layers", "runs"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(options, name)}")
    import diffusers

    cases = []
    for name in options.types:
        print(f"{name}, {options.layers} layers ...", file=sys.stderr)
        cases.append(compare(name, DIT | {"num_layers": options.layers}, SIZES, options.runs))
    report({"machine": machine() | {"diffusers": diffusers.__version__}, "dtype": "bf16", "cases": cases}, options.out)
    return 0
