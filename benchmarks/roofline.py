"""What one rank does, counted, and the seconds that this predicts for a step on many GPUs, beside published figures.

    step = forwards x (products / rate + passes over memory / bandwidth) / efficiency + transfers that nothing hides

Rank 0 is taken, which has the most tokens and heads. In its count is all that ranks do not share out: embeddings, the
text's keys and values in each layer, uneven heads. Passes over memory are those of eager PyTorch. Transfers along
ulysses, of the prediction and between the branches hide behind nothing; a part on its way round the ring hides behind
the attention to the part at hand, and shared weights behind all that is computed. Bytes inside a machine go over
NVLink, others over InfiniBand, at the same time; a ring is as fast as its slowest hop.

Not in it: latency, launches, waiting for each other, encoders, VAE. So a real step is slower, but where passes over
memory are fused. The efficiency is 1; beside a published pair it is what makes its 1-GPU half come out, and the only
number that is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from wan.distributed.grid import Grid
from wan.distributed.parallel import Parallel

from wan.plan import tally as counting
from wan.plan.tally import FLASH

# Collectives and what they are for. No step has an all-reduce but the votes of a cache.
AXES = {
    "alltoall_base_": "ulysses",
    "send": "ring",
    "_allgather_base_": "gather",
    "allgather_": "guidance",
    "allreduce_": "vote",
}

CONSTANTS: dict[str, tuple[float, str]] = {
    "matmul": (790e12, "FLOP/s of bf16 products, measured on an H200; an H100 has the same arithmetic units"),
    "attention": (648e12, "FLOP/s of FlashAttention 3 in bf16, measured on a Hopper GPU"),
    "memory H100": (3.35e12, "bytes/s, data sheet of the H100 SXM"),
    "memory H200": (4.8e12, "bytes/s, data sheet of the H200 SXM"),
    "nvlink": (450e9, "bytes/s a GPU each way, data sheet of both: 900 GB/s both ways"),
    "infiniband": (50e9, "bytes/s a GPU each way: one 400 Gb/s port for each GPU, data sheet of the DGX H100 and H200"),
    "gpus a machine": (8, "DGX H100 and H200"),
}
MATMUL, ATTENTION, NVLINK, INFINIBAND = (CONSTANTS[name][0] for name in ("matmul", "attention", "nvlink", "infiniband"))
PER_MACHINE = int(CONSTANTS["gpus a machine"][0])
GPUS = ("H100", "H200")
SAME = 1.02  # grids so near the fastest are as good: each turn of a ring costs launches and latency, not counted here


class Published(NamedTuple):
    """Seconds on one H100 and on eight. steps: of the figure; grid: None where it is not known, then the best."""

    name: str
    case: str
    one: float
    eight: float
    steps: int = 1
    grid: Grid | None = None
    shares_weights: bool = False


# 81 frames, two forwards a step. The first four: seconds of a step of Wan2.1 I2V-14B, all from LightX2V's README. The
# official ones: Wan2.2 T2V-A14B, 40 steps from start to end, text encoder and VAE with them; its README's command for 8
# is --ulysses_size 8 --dit_fsdp. An expert of it has the shape of "14B".
PUBLISHED = [
    Published("LightX2V", "i2v-14B 480p", 5.18, 0.75),
    Published("SGLang", "i2v-14B 480p", 6.13, 1.19),
    Published("FastVideo", "i2v-14B 480p", 7.35, 2.94),
    Published("xDiT", "i2v-14B 480p", 8.93, 2.70),
    Published("official", "14B 720p", 1041, 155, 40, Grid(ulysses=8), True),
    Published("official", "14B 480p", 327, 51, 40, Grid(ulysses=8), True),
]


# One rank


@contextmanager
def fake_rank(grid: Grid, rank: int = 0) -> Iterator[Parallel]:
    """The `Parallel` of a rank whose group sends nothing anywhere. This process must be in no group."""
    if grid.size == 1:
        yield Parallel()
        return
    devices = dist.Backend.backend_capability["fake"]
    devices.append("meta")  # or isend refuses its tensors
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=grid.size)
        try:
            yield Parallel(*grid)
        finally:
            dist.destroy_process_group()
    finally:
        devices.remove("meta")


@dataclass
class Transfer:
    """A collective, or one turn of a ring, among `ranks`. sent, received: bytes by the other rank.

    behind: FLOPs of the attention that is computed while it travels.
    """

    axis: str
    ranks: list[int]
    sent: dict[int, int]
    received: dict[int, int]
    behind: int = 0


class Tally(counting.Tally):
    """What one rank does: `flops`, `passes` and `transfers[place]`. place: "layer", or "rest" for all that is not in a
    block."""

    def __init__(self, grid: Grid, rank: int):
        super().__init__()
        self.grid, self.rank = grid, rank
        self.transfers: dict[str, list[Transfer]] = {"layer": [], "rest": []}
        self._leaving: Transfer | None = None

    def sent(self, axis: str) -> int:
        """Bytes along an axis, of one layer or outside of layers."""
        return sum(sum(one.sent.values()) for part in self.transfers.values() for one in part if one.axis == axis)

    def count(self, func, args, kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace == "c10d":
            return self._transfer(func.overloadpacket.__name__, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):  # timesteps, the table of rotations
            return None
        before = self.flops.total()
        super().count(func, args, kwargs, out)
        packet, flops = func.overloadpacket, self.flops.total() - before
        if packet is FLASH and self._leaving is not None:
            self._leaving.behind, self._leaving = flops, None
        return None

    def _transfer(self, name: str, args: Sequence[Any]) -> None:
        if name == "recv_":  # counted where it is sent
            return
        if name not in AXES:
            raise NotImplementedError(f"c10d.{name} is not counted")
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(group)
        tensor = tree_leaves(args[1] if "gather" in name else args[0])[0]  # what is sent, or as long
        if name == "send":
            sent, received = {ranks[args[2]]: tensor.nbytes}, {}
        elif name == "alltoall_base_":
            sent, received = (dict(zip(ranks, (n * tensor.itemsize for n in sizes))) for sizes in (args[4], args[3]))
        else:
            sent, received = dict.fromkeys(ranks, tensor.nbytes), dict.fromkeys(ranks, tensor.nbytes)
        for sizes in (sent, received):
            sizes.pop(self.rank, None)
        transfer = Transfer(AXES[name], ranks, sent, received)
        self.transfers[self.place].append(transfer)
        self._leaving = transfer if name == "send" else None


# Seconds


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
        products, attention = (tally.flops[place, kind] for kind in ("matmul", "attention"))
        compute += times * (products / MATMUL + attention / ATTENTION)
        memory += times * tally.passes[place] / CONSTANTS[f"memory {gpu}"][0]
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


Tallies = Mapping[str, Mapping[Grid, Tally]]  # by case and grid, of rank 0


def predict(tallies: Tallies, layers: Mapping[str, int], weights: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """The best grid of each number of GPUs, and the published figures, as JSON data.

    weights: bytes received in a forward when they are shared, by network and ranks of one machine.
    """
    rows = []
    for case, by_grid in tallies.items():
        network, sizes = case.split()[0], sorted({grid.size for grid in by_grid})
        for gpu in GPUS if (network, PER_MACHINE) in weights else ():
            alone = step_seconds(by_grid[Grid()], layers[case], gpu)
            for size in sizes:
                grid, step = best(by_grid, size, layers[case], gpu)
                received = weights.get((network, min(size, PER_MACHINE)), 0.0)
                shared = step_seconds(by_grid[grid], layers[case], gpu, weights=received)
                row = {"case": case, "gpu": gpu, "gpus": size, "grid": grid._asdict(), **step._asdict()}
                row |= {"predicted_seconds": step.total, "predicted_speedup": alone.total / step.total}
                row |= {"compute_floor": alone.compute / size, "predicted_seconds_shared_weights": shared.total}
                rows.append(row)
    constants = {name: {"value": value, "what": what} for name, (value, what) in CONSTANTS.items()}
    checks = [check(one, tallies[one.case], layers[one.case], weights) for one in PUBLISHED]
    return {"constants": constants, "steps": rows, "published": checks}


def best(by_grid: Mapping[Grid, Tally], size: int, layers: int, gpu: str, efficiency: float = 1.0) -> tuple[Grid, Step]:
    """The fastest grid, or one that is as good and has a shorter ring."""
    steps = {grid: step_seconds(one, layers, gpu, efficiency) for grid, one in by_grid.items() if grid.size == size}
    limit = SAME * min(step.total for step in steps.values())
    good = [(grid, step) for grid, step in steps.items() if step.total <= limit]
    return min(good, key=lambda one: (one[0].ring, one[1].total))


def check(
    figure: Published, by_grid: Mapping[Grid, Tally], layers: int, weights: Mapping[tuple[str, int], float]
) -> dict[str, Any]:
    """A published pair beside the prediction that knows only its 1-GPU half."""
    efficiency = figure.steps * step_seconds(by_grid[Grid()], layers, "H100").total / figure.one
    grid = figure.grid or best(by_grid, 8, layers, "H100", efficiency)[0]
    received = weights[figure.case.split()[0], 8] if figure.shares_weights else 0.0
    predicted = figure.steps * step_seconds(by_grid[grid], layers, "H100", efficiency, received).total
    row = {**figure._asdict(), "grid": grid._asdict(), "efficiency": efficiency, "predicted_eight": predicted}
    row |= {"speedup": figure.one / figure.eight, "predicted_speedup": figure.one / predicted}
    return row | {"error": predicted / figure.eight - 1}


# Text and picture


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The cells of a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def format_roofline(result: Mapping[str, Any]) -> Iterator[str]:
    yield "\nConstants of the predictions"
    yield from aligned([[name, f"{one['value']:.4g}", one["what"]] for name, one in result["constants"].items()])
    yield "\nPredicted seconds of a step with guidance, two forwards; best grid (cfg x ring x ulysses) of H100"
    parts = ("compute_floor", "compute", "memory", "exposed", "hidden", "predicted_seconds")
    rows = [["case", "GPUs", "grid", "floor", *parts[1:-1], "H100", "speed-up", "weights shared", "H200"]]
    steps = {(row["case"], row["gpus"], row["gpu"]): row for row in result["steps"]}
    for case, size in dict.fromkeys((case, size) for case, size, _ in steps):
        row, newer = steps[case, size, "H100"], steps[case, size, "H200"]
        numbers = [f"{row[part]:.4f}" for part in parts]
        numbers += [f"{row['predicted_speedup']:.2f}", f"{row['predicted_seconds_shared_weights']:.4f}"]
        rows.append([case, f"{size}", _grid(row), *numbers, f"{newer['predicted_seconds']:.4f}"])
    yield from aligned(rows)
    yield "\nPublished seconds on 1 and 8 H100, and predicted from those on 1"
    rows = [["", "case", "1", "8", "predicted", "error", "speed-up", "predicted", "efficiency", "grid"]]
    for row in result["published"]:
        numbers = [f"{row[key]:.4g}" for key in ("one", "eight", "predicted_eight")]
        scaling = [f"{row[key]:.2f}" for key in ("speedup", "predicted_speedup", "efficiency")]
        rows.append([row["name"], row["case"], *numbers, f"{row['error']:+.1%}", *scaling, _grid(row)])
    yield from aligned(rows)


def _grid(row: Mapping[str, Any]) -> str:
    return " x ".join(map(str, row["grid"].values()))


def draw(result: Mapping[str, Any], out: str) -> None:
    """Seconds of a step over GPUs with the published ones, and bytes of a layer over ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    canvas, (left, right) = FigureCanvasAgg(figure), figure.subplots(1, 2)
    _draw_seconds(left, result["roofline"])
    _draw_bytes(right, result["attention"])
    for axes in (left, right):
        ticks = sorted({row["gpus"] for row in result["roofline"]["steps"]})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    canvas.print_figure(out, format="png", dpi=100)


def _draw_seconds(axes, roofline: Mapping[str, Any]) -> None:
    rows = [row for row in roofline["steps"] if row["gpu"] == "H100"]
    for number, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        ours = [row for row in rows if row["case"] == case]
        sizes, style = [row["gpus"] for row in ours], {"color": f"C{number}", "linewidth": 1.3}
        axes.plot(sizes, [row["predicted_seconds"] for row in ours], **style, label=f"{case}, predicted")
        axes.plot(sizes, [row["compute_floor"] for row in ours], **style | {"linewidth": 0.7}, linestyle=":")
    for row, marker in zip(roofline["published"], "os^Dv*"):
        points = [row["one"] / row["steps"], row["eight"] / row["steps"]]
        style = {"color": "black", "linestyle": "--", "linewidth": 0.6, "marker": marker, "markersize": 6}
        axes.plot([1, 8], points, **style, fillstyle="none", label=f"{row['name']}, {row['case']}, published")
    axes.set_xlabel("H100")
    axes.set_ylabel("seconds of a step (dotted: its products alone, shared evenly)")
    axes.set_title("Step with guidance: predicted, and published", fontsize=10)


def _draw_bytes(axes, rows: Sequence[Mapping[str, Any]]) -> None:
    case = rows[-1]["case"]  # the largest
    ours = [row for row in rows if row["case"] == case]
    kinds = {
        "ulysses": [row for row in ours if row["ring"] == 1],
        "ring": [row for row in ours if row["ulysses"] == 1],
        "ring over ulysses of 8": [row for row in ours if row["ulysses"] == 8],
    }
    for number, (name, some) in enumerate(kinds.items()):
        ranks = [row["ranks"] for row in some]
        formula, counted = ([sum(row[key].values()) / 1e6 for row in some] for key in ("formula", "counted"))
        axes.plot(ranks, formula, color=f"C{number}", linewidth=1, label=f"{name}, formula")
        axes.plot(ranks, counted, "x", color=f"C{number}", markersize=8, label=f"{name}, counted")
    axes.set_xlabel("ranks")
    axes.set_ylabel("MB that a rank sends for one layer")
    axes.set_title(f"{case}, bf16", fontsize=10)
