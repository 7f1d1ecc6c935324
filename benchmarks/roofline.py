"""Predicted seconds of a step on many GPUs, from what `comm` counted for one rank, beside published figures.

    step = forwards x (products / rate + passes over memory / bandwidth) / efficiency + transfers that nothing hides

Rank 0 is taken, which has the most tokens and heads. Within it is all that ranks do not share out: embeddings, the
text's keys and values in each layer, uneven heads. Transfers along ulysses, of the prediction and between the branches
wait for nothing and hide behind nothing; a part on its way round the ring hides behind the attention to the part at
hand, and shared weights on their way behind everything else. Inside a machine bytes go over NVLink, else over
InfiniBand, both at the same time; a ring is as fast as its slowest hop. The efficiency is 1, but for published figures,
where it is that of the 1-GPU figure. Not in it: latency, launches, waiting for each other, text encoder, VAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed.grid import Grid

if TYPE_CHECKING:
    from benchmarks.comm import Tally, Transfer

CONSTANTS: dict[str, tuple[float, str]] = {
    "matmul": (790e12, "FLOP/s of bf16 products, measured on an H200; an H100 has the same arithmetic units"),
    "attention": (648e12, "FLOP/s of FlashAttention 3 in bf16, measured on an H200"),
    "memory H100": (3.35e12, "bytes/s, data sheet of the H100 SXM"),
    "memory H200": (4.8e12, "bytes/s, data sheet of the H200 SXM"),
    "nvlink": (450e9, "bytes/s a GPU each way, data sheet of both: 900 GB/s both ways"),
    "infiniband": (50e9, "bytes/s a GPU each way: one 400 Gb/s port for each GPU, data sheet of the DGX H100 and H200"),
    "gpus a machine": (8, "DGX H100 and H200"),
}
MATMUL, ATTENTION, NVLINK, INFINIBAND, PER_MACHINE = (
    CONSTANTS[name][0] for name in ("matmul", "attention", "nvlink", "infiniband", "gpus a machine")
)
GPUS = ("H100", "H200")


class Published(NamedTuple):
    """Seconds on one H100 and on eight. steps: of the figure; grid: None where it is not known, then the best."""

    name: str
    case: str
    one: float
    eight: float
    steps: int = 1
    grid: Grid | None = None


# 81 frames, two forwards a step. The first four: Wan2.1 I2V-14B, seconds of a step, as LightX2V measured and published
# them. The official ones: Wan2.2 T2V-A14B, 40 steps from start to end with text encoder and VAE, weights shared (FSDP).
PUBLISHED = [
    Published("LightX2V", "i2v-14B 480p", 5.18, 0.75),
    Published("SGLang", "i2v-14B 480p", 6.13, 1.19),
    Published("FastVideo", "i2v-14B 480p", 7.35, 2.94),
    Published("xDiT", "i2v-14B 480p", 8.93, 2.70),
    Published("official", "14B 720p", 1041, 155, 40, Grid(ulysses=8)),
    Published("official", "14B 480p", 327, 51, 40, Grid(ulysses=8)),
]


class Step(NamedTuple):
    """Seconds of one step. exposed: transfers that nothing hides; hidden: those that something does."""

    compute: float
    memory: float
    exposed: float
    hidden: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.exposed


def step_seconds(tally: Tally, layers: int, gpu: str, efficiency: float = 1.0, weights: float = 0.0) -> Step:
    """The step of a rank that does `tally`. weights: bytes of shared ones that it receives in a forward."""
    forwards = 1 if tally.grid.cfg == 2 else 2
    compute = memory = exposed = hidden = 0.0
    for place, times in (("layer", layers * forwards), ("rest", forwards)):
        work = tally.work[place]
        compute += times * (work["matmul"] / MATMUL + work["attention"] / ATTENTION)
        memory += times * work["memory"] / CONSTANTS[f"memory {gpu}"][0]
        for transfer in tally.transfers[place]:
            seconds = transfer_seconds(transfer, tally.rank)
            covered = min(seconds, transfer.behind / ATTENTION / efficiency)
            exposed, hidden = exposed + times * (seconds - covered), hidden + times * covered
    compute, memory, gathering = compute / efficiency, memory / efficiency, forwards * weights / NVLINK
    bare = max(0.0, gathering - compute - memory)
    return Step(compute, memory, exposed + bare, hidden + gathering - bare)


def transfer_seconds(transfer: Transfer, rank: int) -> float:
    if transfer.axis == "ring":
        hops = zip(transfer.ranks, (*transfer.ranks[1:], transfer.ranks[0]))
        return sum(transfer.sent.values()) / (NVLINK if all(_near(*hop) for hop in hops) else INFINIBAND)
    return max(_seconds(transfer.sent, rank), _seconds(transfer.received, rank))


def _seconds(by_rank: Mapping[int, int], rank: int) -> float:
    near = sum(size for other, size in by_rank.items() if _near(rank, other))
    return max(near / NVLINK, (sum(by_rank.values()) - near) / INFINIBAND)


def _near(rank: int, other: int) -> bool:
    return rank // PER_MACHINE == other // PER_MACHINE


# From here on: tallies are {case: {grid: Tally of rank 0}}, weights {(network, ranks on one machine): bytes received}

Tallies = Mapping[str, Mapping[Grid, Any]]


def predict(tallies: Tallies, layers: Mapping[str, int], weights: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """The best grid of each size and case, and the published figures, as JSON data."""
    rows = []
    for case, by_grid in tallies.items():
        alone = {gpu: step_seconds(by_grid[Grid()], layers[case], gpu) for gpu in GPUS}
        for size in dict.fromkeys(grid.size for grid in by_grid):
            for gpu in GPUS if not case.startswith("i2v") else ():
                grid, step = best(by_grid, size, layers[case], gpu)
                received = weights[case.split()[0], min(size, int(PER_MACHINE))] if size > 1 else 0.0
                shared = step_seconds(by_grid[grid], layers[case], gpu, weights=received)
                rows.append(
                    {"case": case, "gpu": gpu, "gpus": size, "grid": grid._asdict()}
                    | step._asdict()
                    | {
                        "predicted_seconds": step.total,
                        "predicted_speedup": alone[gpu].total / step.total,
                        "compute_if_all_were_shared": alone[gpu].compute / size,
                        "predicted_seconds_with_shared_weights": shared.total,
                    }
                )
    constants = {name: {"value": value, "what": what} for name, (value, what) in CONSTANTS.items()}
    checks = [check(one, tallies[one.case], layers[one.case], weights) for one in PUBLISHED]
    return {"constants": constants, "steps": rows, "published": checks}


def best(by_grid: Mapping[Grid, Any], size: int, layers: int, gpu: str, efficiency: float = 1.0) -> tuple[Grid, Step]:
    steps = {grid: step_seconds(one, layers, gpu, efficiency) for grid, one in by_grid.items() if grid.size == size}
    return min(steps.items(), key=lambda item: item[1].total)


def check(figure: Published, by_grid: Mapping[Grid, Any], layers: int, weights: Mapping) -> dict[str, Any]:
    """A published pair beside the prediction that knows only its 1-GPU half."""
    efficiency = figure.steps * step_seconds(by_grid[Grid()], layers, "H100").total / figure.one
    grid = figure.grid or best(by_grid, 8, layers, "H100", efficiency)[0]
    received = weights[figure.case.split()[0], 8] if figure.name == "official" else 0.0
    predicted = figure.steps * step_seconds(by_grid[grid], layers, "H100", efficiency, received).total
    return {
        "name": figure.name,
        "case": figure.case,
        "steps": figure.steps,
        "efficiency": efficiency,
        "grid": grid._asdict(),
        "seconds_1": figure.one,
        "seconds_8": figure.eight,
        "predicted_seconds_8": predicted,
        "speedup": figure.one / figure.eight,
        "predicted_speedup": figure.one / predicted,
        "error": predicted / figure.eight - 1,
    }
