"""What a cache costs on a step that it computes: python -m benchmarks.cache_overhead

Six layers of the released 1.3B shape with random weights, at 768 and 3,510 tokens; thresholds of 0, so that every step
is computed. Two measures, of one prediction:

    own         seconds that the manager spends outside of the network, measured inside the step
    difference  step with the cache over step without, in turns; the noise of the machine is in it

What a manager does does not grow with the number of layers, so its share of the whole model's step is own / (step of
six layers + 24 blocks more). The plan of a policy that plans is made once a run and stands apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from wan.cache import NO_CACHE, NoCache, StepContext
from wan.cache.options import check_options, make_manager

from benchmarks.common import DTYPES, machine, report, timed
from benchmarks.peers import DIT
from wan.command import Parser, run_command
from wan.models.dit import WanModel
from wan.solvers import make_solver

LAYERS = 30  # of the whole model
SIZES = [(3, 32, 32), (9, 30, 52)]  # latent frames, rows, columns: 768 and 3,510 tokens
STEPS = 50  # of the run that is planned
TARGET = 0.01
STAND_INS = {"polynomial": {"model": [1.0, 0.0]}, "ratios": {"model": [1.0] * STEPS}}  # for measured coefficients
POLICIES: dict[str, dict[str, Any]] = {
    "teacache": {"teacache": True, "teacache_thresh": 0},
    "magcache": {"magcache": True, "mag_thresh": 0},
    "fbcache hidden_rel_l1": {"fbcache": True, "fb_thresh": 0},
    "fbcache residual_rel_l1": {"fbcache": True, "fb_thresh": 0, "fb_metric": "residual_rel_l1"},
    "fbcache hidden_rel_l2": {"fbcache": True, "fb_thresh": 0, "fb_metric": "hidden_rel_l2"},
    "fbcache hidden_rel_l1, every 4th token": {"fbcache": True, "fb_thresh": 0, "fb_downsample": 4},
    "easycache": {"easycache": True, "easy_thresh": 0},
}


class Watched(NoCache):
    """A cache and the seconds it spends: `own` outside of the network since it was last set to 0, and `in_blocks` in
    the last block loop."""

    def __init__(self, cache: NoCache):
        self.cache, self.own, self.in_blocks = cache, 0.0, 0.0
        self.run = cache.run

    def blocks(self, ctx, h: Tensor, run: Callable[..., Tensor], count: int, embed=None) -> Tensor:
        out, self.in_blocks = self._watch(run, lambda run: self.cache.blocks(ctx, h, run, count, embed))
        return out

    def prediction(self, ctx, latent: Tensor, call: Callable[[], Tensor]) -> Tensor:
        return self._watch(call, lambda call: self.cache.prediction(ctx, latent, call))[0]

    def _watch(self, network: Callable[..., Tensor], use: Callable[[Callable], Tensor]) -> tuple[Tensor, float]:
        """The result of `use`, and the seconds that it spent in `network`."""
        inside = 0.0

        def watched(*args: Any) -> Tensor:
            nonlocal inside
            seconds, out = timed(lambda: network(*args))
            inside += seconds
            return out

        seconds, out = timed(lambda: use(watched))
        self.own += seconds - inside
        return out, inside


class Steps:
    """Predictions of a random model on latents that change from step to step."""

    def __init__(self, config: dict[str, Any], size: tuple[int, int, int], dtype: str):
        torch.manual_seed(0)
        self.model = WanModel(**config).eval()
        for name, parameter in self.model.named_parameters():
            if not WanModel.keep_fp32(name):
                parameter.data = parameter.data.to(DTYPES[dtype])
        self.latents = torch.randn(2, 1, config["in_dim"], *size)
        self.context = torch.randn(1, config["text_len"], config["text_dim"])
        solver = make_solver("unipc", steps=STEPS, shift=5.0)
        times = zip(solver.timesteps.tolist(), solver.sigmas.tolist())
        self.contexts = [StepContext(index, STEPS, *pair) for index, pair in enumerate(times)]

    def seconds(self, index: int, cache: Watched) -> float:
        """Of one step; `cache.own` is that of this step."""
        ctx, cache.own = self.contexts[index], 0.0
        latent, time = self.latents[index % 2], torch.tensor([ctx.timestep])

        def predict() -> Tensor:
            return self.model(latent, time, self.context, cache=cache, ctx=ctx)

        return timed(lambda: cache.prediction(ctx, latent, predict))[0]


@torch.inference_mode()
def measure(size: tuple[int, int, int], dtype: str, runs: int, config: dict[str, Any] = DIT) -> dict[str, Any]:
    """One case, as JSON data: each policy runs `runs` steps in turns with plain ones, after three to warm up."""
    steps, bare = Steps(config, size, dtype), Watched(NO_CACHE)
    plain, loops, rows = [], [], []
    steps.seconds(0, bare)
    for name, flags in POLICIES.items():
        print(f"{size} {dtype}: {name}", file=sys.stderr)
        cache = Watched(make_manager(check_options(flags, STEPS)[0], STAND_INS))
        mine, theirs, own = [], [], []
        with cache.run(steps.contexts):
            steps.seconds(0, cache)
            first = cache.own
            steps.seconds(1, cache)
            for index in range(2, 2 + runs):
                for which in (cache, bare) if index % 2 else (bare, cache):
                    (mine if which is cache else theirs).append(steps.seconds(index, which))
                own.append(cache.own)
                loops.append(bare.in_blocks)
        plain += theirs
        row = {"policy": name, "own_seconds": median(own), "difference": median(mine) / median(theirs) - 1}
        rows.append(row | {"plan_seconds": max(0.0, first - median(own))})
    step, block = median(plain), median(loops) / config["num_layers"]
    whole = step + (LAYERS - config["num_layers"]) * block
    for row in rows:
        row["share_of_step"] = row["own_seconds"] / step
        row["share_of_whole_step"] = row["own_seconds"] / whole
        row["plan_share_of_run"] = row["plan_seconds"] / (STEPS * whole)
    worst = max(row["share_of_whole_step"] for row in rows)
    return {
        "tokens": size[0] * size[1] * size[2] // 4,
        "dtype": dtype,
        "layers": config["num_layers"],
        "step_seconds": step,
        "block_seconds": block,
        "whole_layers": LAYERS,
        "whole_step_seconds": whole,
        "policies": rows,
        "worst_share_of_whole_step": worst,
        "reaches_target": worst < TARGET,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.cache_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    most = STEPS - 3  # the last step stores nothing
    parser.add_argument("--runs", type=int, default=5, choices=range(1, most + 1), metavar="N", help="steps; default 5")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default bf16")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON there")
    args = parser.parse_args(argv)
    cases = [measure(size, dtype, args.runs) for dtype in args.dtypes for size in SIZES]
    report({"machine": machine(), "target_share": TARGET, "cases": cases}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
