"""What the calls of `distributed.Parallel` cost a single process: python -m benchmarks.parallel_overhead

A few layers of the released 1.3B shape with random weights, beside the same text with the calls taken out (`build`
says which). Two measures of one step:

    own         seconds spent in the calls, outside of the attention that one of them makes
    difference  median step with the calls over that without, in turns; the noise of the machine is in it
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from wan.distributed.parallel import Parallel, TokenShards

from benchmarks.common import DTYPES, machine, report, timed
from benchmarks.peers import DIT
from wan.command import Parser, run_command
from wan.models.dit import model, sequence

TARGET = 0.005
SIZES = [(3, 32, 32), (9, 30, 52)]  # latent frames, rows, columns: 768 and 3,510 tokens
WITHOUT = [  # calls -> what is left of them
    ("self.shards.attention(self.attention, q_BLHD, k_BLHD, v_BLHD)", "self.attention(q_BLHD, k_BLHD, v_BLHD)"),
    ("self.shards.shard(x_BLC, dim=1)", "x_BLC"),
    ("self.shards.shard(rope_table(places, head_dim, device), dim=0)", "rope_table(places, head_dim, device)"),
    ("self.shards.gather(x_BLC, dim=1)", "x_BLC"),
    ("self.shards.shard(time_BL, dim=1)", "time_BL"),
]


def build() -> type[sequence.Sequence]:
    """The transformer's `Sequence` with the calls taken out of its text. RuntimeError: the text has changed."""
    text = inspect.getsource(sequence)
    for call, rest in WITHOUT:
        if text.count(call) != 1:
            raise RuntimeError(f"{sequence.__name__} does not hold {call!r} once: bring WITHOUT up to date")
        text = text.replace(call, rest)
    module = ModuleType(sequence.__name__)
    sys.modules["without_calls"] = module
    exec(compile(text, "sequence.py without calls", "exec"), module.__dict__)
    return module.Sequence


class Clocked(Parallel):
    """Adds up the time that its calls take, that of the attention left out."""

    seconds = 0.0

    def tokens(self, count: int) -> TokenShards:
        shards, clock = super().tokens(count), self
        started = time.perf_counter()
        shards.shard, shards.gather = (clock._clocked(call) for call in (shards.shard, shards.gather))
        inner = shards.attention

        def attention(function: Callable, *qkv: torch.Tensor) -> torch.Tensor:
            spent = 0.0

            def only(*args: torch.Tensor) -> torch.Tensor:
                nonlocal spent
                seconds, out = timed(lambda: function(*args))
                spent += seconds
                return out

            seconds, out = timed(lambda: inner(only, *qkv))
            clock.seconds += seconds - spent
            return out

        shards.attention = attention
        self.seconds += time.perf_counter() - started
        return shards

    def _clocked(self, call: Callable) -> Callable:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            seconds, out = timed(lambda: call(*args, **kwargs))
            self.seconds += seconds
            return out

        return clocked


@torch.inference_mode()
def compare(size: tuple[int, int, int], layers: int, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Everything about one size, as JSON data."""
    models, sequences = {}, {"calls": sequence.Sequence, "none": build(), "clocked": sequence.Sequence}
    for name in sequences:
        torch.manual_seed(0)
        parallel = Clocked() if name == "clocked" else Parallel()
        models[name] = model.WanModel(**DIT | {"num_layers": layers}, parallel=parallel).eval()
        for key, parameter in models[name].named_parameters():
            if not model.WanModel.keep_fp32(key):
                parameter.data = parameter.data.to(dtype)
    x, text = torch.randn(1, 16, *size), torch.randn(1, 512, 4096)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    outputs = {}
    for run in range(runs + 1):
        for name in (list(models), list(reversed(models)))[run % 2]:
            with patch.object(model, "Sequence", sequences[name]):
                spent, outputs[name] = timed(lambda: models[name](x, torch.tensor([500]), text))  # noqa: B023
            if run:
                seconds[name].append(spent)
    step, own = median(seconds["none"]), models["clocked"].parallel.seconds / (runs + 1)
    if not outputs["calls"].equal(outputs["none"]):
        raise RuntimeError("the two builds do not give the same")
    return {
        "tokens": size[0] * size[1] * size[2] // 4,
        "layers": layers,
        "step_seconds": step,
        "own_seconds": own,
        "own_share": own / step,
        "difference": median(seconds["calls"]) / step - 1,
        "reaches_target": own / step <= TARGET,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.parallel_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--runs", type=int, default=15, help="steps of each build; default 15")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    cases = [compare(size, args.layers, DTYPES[args.dtype], args.runs) for size in SIZES]
    report({"machine": machine(), "dtype": args.dtype, "target_share": TARGET, "cases": cases}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
