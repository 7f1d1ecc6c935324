"""Our caches beside cache-dit's, on the same weights, texts, noise and solver: python -m benchmarks.peers cache

cache-dit (github.com/vipshop/cache-dit) caches the blocks of diffusers' transformers: DBCache probes the first block,
as FBCache does, and may extrapolate by TaylorSeer. It gets diffusers' transformer with the weights of the embedded
models, our policies get our own, in the same sampling loop. By row:

    compute  blocks that ran, of those of a run without a cache: counted by hooks on the blocks, the same for both
    PSNR     of the frames to those of the same network without a cache; mean over the clips

`at_equal_compute`: the PSNR of each family at given shares of the compute, on the straight lines between the rows of
its Pareto front. `overhead`: what a cache takes for itself in a forward that it computes (thresholds of 0): the
processor's time outside of the blocks, with the cache less without; two layers of the released 1.3B shape, 192 tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from wan.cache import NoCache, StepContext
from wan.cache.options import check_options, make_manager

from benchmarks.cache_cases import TASKS, tiny_cases
from benchmarks.cache_quality import Maker, pareto, policies
from benchmarks.common import machine, report
from benchmarks.peers import DIT, build_theirs
from benchmarks.tiny_world import CASES_PER_HALF
from benchmarks.tiny_world_gguf import psnr
from wan.command import Parser, run_command
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.options import Request
from wan.pipeline import WanPipeline
from wan.solvers import make_solver
from wan.tasks import load_task
from wan.weights.names import official_names

SHARES = (0.4, 0.45, 0.5, 0.6)  # of the compute
OURS, PREDICTOR = ("teacache polynomial", "fbcache residual_rel_l1", "easycache"), "damped"
THRESHOLDS = (0.08, 0.12, 0.18, 0.25, 0.35, 0.5)  # of DBCache; its default is 0.08
WARM_UP = 1  # as ours; its default is 8, of runs of 28 steps and more
TAYLOR_ORDERS = {"DBCache": None, "DBCache, TaylorSeer": 1}
SHAPE, SIZE, RUNS = DIT | {"num_layers": 2}, (3, 16, 16), 3  # of the overhead; latent (192 tokens); steps measured


class Theirs(nn.Module):
    """diffusers' transformer in the place of a `WanModel`, with its weights or, where it has none, random ones."""

    def __init__(self, config: dict[str, Any], ours: WanModel | None = None):
        super().__init__()
        self.text_len = config["text_len"]
        self.transformer = build_theirs("dit", {**config, "model_type": "t2v"})  # the embedded ones have no CLIP
        if ours is not None:
            weights, names = ours.state_dict(), official_names(self.transformer.state_dict(), "dit")
            self.transformer.load_state_dict({theirs: weights[name] for name, theirs in names.items()})

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    def forward(
        self, x: Tensor, times: Any, texts: Sequence[Tensor], *, ctx: StepContext, cache: NoCache, y=None, clip_fea=None
    ) -> Tensor:
        """What `WanModel` computes; the step is told by `ctx`."""
        context = torch.stack([nn.functional.pad(text, (0, 0, 0, self.text_len - len(text))) for text in texts])
        x = x if y is None else torch.cat([x, y], 1)
        return self.transformer(x, torch.tensor([ctx.timestep]), context, return_dict=False)[0]


class DBCache(NoCache):
    """cache-dit around networks, by expert; begins anew with every run. taylor_order: None: without it."""

    def __init__(self, networks: dict[str, Theirs], threshold: float, taylor_order: int | None):
        self.peer, self.networks = cache_dit(), networks
        self.threshold, self.taylor_order = threshold, taylor_order
        for network in networks.values():
            adapter = self.peer.BlockAdapter(
                transformer=network.transformer,
                blocks=network.blocks,
                forward_pattern=self.peer.ForwardPattern.Pattern_2,
                has_separate_cfg=True,
            )
            self.peer.enable_cache(adapter, **self._settings(1))

    @contextmanager
    def run(self, steps: Sequence[StepContext]) -> Iterator[None]:
        for expert, count in Counter(step.expert for step in steps).items():
            self.peer.refresh_context(self.networks[expert].transformer, **self._settings(count))
        yield

    def _settings(self, steps: int) -> dict[str, Any]:
        cache = self.peer.DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=WARM_UP,
            enable_separate_cfg=True,
            num_inference_steps=steps,
        )
        order = self.taylor_order
        taylor = None if order is None else self.peer.TaylorSeerCalibratorConfig(taylorseer_order=order)
        return {"cache_config": cache, "calibrator_config": taylor}


def cache_dit() -> Any:
    """The package. Raises SwanError, one line, where there is none."""
    try:
        import cache_dit
    except ImportError as error:
        raise SwanError(f"cache-dit cannot be imported ({error}): pip install cache-dit, for this alone") from error
    cache_dit.disable_print()
    return cache_dit


# Quality


class Clip(NamedTuple):
    """frames: uint8 [T, H, W, 3]; blocks: how many ran."""

    frames: np.ndarray
    blocks: int


class Side(WanPipeline):
    """Makes clips with its own networks, or with `networks`, by expert, in their place, and counts their blocks."""

    networks: dict[str, nn.Module] | None = None
    ran = 0

    def _expert(self, ctx: StepContext, *args: Any) -> nn.Module:
        return self.networks[ctx.expert] if self.networks else super()._expert(ctx, *args)

    def watch(self, networks: dict[str, nn.Module]) -> None:
        for block in (block for network in networks.values() for block in network.blocks):
            block.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.ran += 1

    def make(self, request: Request, cache: NoCache | None = None) -> Clip:
        self.ran = 0
        return Clip(self(request, cache=cache).frames, self.ran)


def our_side(task: str, request: Request) -> Side:
    side = Side.from_request(request, load_task(task))
    side.make(request)  # loads its networks
    side.watch({name: side.experts[name] for name in side.spec.get("experts", ["model"])})
    return side


def their_side(ours: Side, request: Request) -> Side:
    side = Side.from_request(request, ours.spec)
    names = ours.spec.get("experts", ["model"])
    side.networks = {name: Theirs(dict(ours.spec.dit), ours.experts[name]).eval() for name in names}
    side.watch(side.networks)
    return side


def measure(task: str, count: int) -> dict[str, Any]:
    """One task, as JSON data."""
    with tempfile.TemporaryDirectory() as folder:
        maker, cases = Maker(task, None, None, folder), tiny_cases(task, 0, count, folder)
        requests = [maker.request(case, {}) for case in cases]
        ours = our_side(task, requests[0])
        plain, rows = [ours.make(request) for request in requests], []
        for setting in policies(OURS, len(THRESHOLDS), [PREDICTOR]):
            made = [ours.make(maker.request(case, setting.flags)) for case in cases]
            rows.append(_row(f"ours, {setting.name}", setting.threshold, made, plain))
        bare = their_side(ours, requests[0])
        plain, agreed = [bare.make(request, NoCache()) for request in requests], plain
        for family, order in TAYLOR_ORDERS.items():
            for threshold in THRESHOLDS:
                side = their_side(ours, requests[0])
                cache = DBCache(side.networks, threshold, order)
                made = [side.make(request, cache) for request in requests]
                rows.append(_row(f"cache-dit, {family}", threshold, made, plain))
    return {
        "task": task,
        "clips": count,
        "steps": requests[0].sample.steps,
        "solver": requests[0].sample.solver,
        "uncached_psnr_db": round(mean(psnr(one.frames, other.frames) for one, other in zip(plain, agreed)), 2),
        "at_equal_compute": at_equal_compute(rows),
        "rows": rows,
    }


def _row(family: str, threshold: float, made: Sequence[Clip], plain: Sequence[Clip]) -> dict[str, Any]:
    row = {
        "family": family,
        "threshold": threshold,
        "compute": round(mean(one.blocks / whole.blocks for one, whole in zip(made, plain)), 4),
        "psnr_db": round(mean(psnr(one.frames, whole.frames) for one, whole in zip(made, plain)), 2),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def at_equal_compute(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Family -> share of the compute -> PSNR; None beyond the rows of the family."""
    found: dict[str, dict[str, float | None]] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        front = pareto([row for row in rows if row["family"] == family])
        compute, db = [row["compute"] for row in front], [row["psnr_db"] for row in front]
        found[family] = {
            f"{share:g}": round(float(np.interp(share, compute, db)), 2) if compute[0] <= share <= compute[-1] else None
            for share in SHARES
        }
    return found


# Overhead


class Timer:
    """Seconds of the processor that forwards of a network take, and how many of them outside of its blocks."""

    def __init__(self, network: nn.Module):
        self.network, self.inside, self._begun = network, 0.0, 0.0
        for block in network.blocks:  # by hooks: cache-dit looks at what `forward` takes
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._begun = time.process_time()

    def _end(self, *_: Any) -> None:
        self.inside += time.process_time() - self._begun

    def medians(self, cache: NoCache, steps: Sequence[StepContext], x: Tensor, text: Tensor) -> tuple[float, float]:
        """(a forward, outside of its blocks): medians over both branches of all steps but the first."""
        rows = []
        with cache.run(steps):
            for ctx in steps:
                for branch in ("cond", "uncond"):
                    self.inside, here = 0.0, replace(ctx, branch=branch)
                    moved, when = x * (1 + ctx.sigma), torch.tensor([ctx.timestep])
                    start = time.process_time()
                    self.network(moved, when, [text], ctx=here, cache=cache)
                    seconds = time.process_time() - start
                    rows.append((seconds, seconds - self.inside))
        whole, outside = zip(*rows[2:])
        return median(whole), median(outside)


@torch.inference_mode()
def overhead(config: dict[str, Any] = SHAPE, size: tuple[int, int, int] = SIZE, runs: int = RUNS) -> dict[str, Any]:
    """By cache: seconds for itself in a forward that it computes, and their share of it. fp32, random weights."""
    torch.manual_seed(0)
    x, text = torch.randn(1, config["in_dim"], *size), torch.randn(config["text_len"], config["text_dim"])
    solver = make_solver("unipc", steps=runs + 2, shift=5.0)  # nothing is kept of the last one
    times = zip(solver.timesteps.tolist(), solver.sigmas.tolist())
    steps = [StepContext(index, runs + 2, *pair) for index, pair in enumerate(times)]
    flags = {"fbcache": True, "fb_thresh": 0, "fb_metric": "residual_rel_l1", "cache_force": True}
    found = {}

    def compare(name: str, network: nn.Module, cached: Callable[[], NoCache]) -> None:
        print(f"overhead: {name}", file=sys.stderr, flush=True)
        timer = Timer(network.eval())
        whole, without = timer.medians(NoCache(), steps, x, text)
        own = timer.medians(cached(), steps, x, text)[1] - without
        found[name] = {"step_seconds": whole, "own_seconds": own, "share_of_step": own / whole}

    compare("ours, fbcache residual_rel_l1", WanModel(**config), lambda: make_manager(check_options(flags, 99)[0], {}))
    for family, order in TAYLOR_ORDERS.items():
        network = Theirs(config)
        compare(f"cache-dit, {family}", network, lambda: DBCache({"model": network}, 0.0, order))  # noqa: B023
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.peers cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--clips", type=int, default=4, choices=range(1, CASES_PER_HALF + 1), metavar="N", help="of each; default 4")
    add("--out", metavar="FILE", help="also write the JSON there, e.g. benchmarks/results/cpu/peers_cache.json")
    args = parser.parse_args(argv)
    import diffusers

    versions = {"diffusers": diffusers.__version__, "cache_dit": cache_dit().__version__}
    found = {"machine": machine() | versions, "tasks": [measure(task, args.clips) for task in args.tasks]}
    report(found | {"overhead": overhead()}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
