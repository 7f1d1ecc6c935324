"""A transformer with weights in bf16 and products in fp32 (--dtype mixed), beside fp32, bf16 and diffusers' bf16.

    python -m benchmarks.mixed [--runs N] [--threads N] [--tokens 768 3510] [--out FILE]
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.mixed     # a CPU without units for bf16, as oneDNN sees it

Six layers of the 1.3B with random weights, in one process and in turns. Seconds are those that the processor spent:
with one thread (default), other work beside does not change them much. Memory is that of the weights, and the rise of
the resident set over one forward in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import in_fresh_process, machine, peak_bytes, report
from benchmarks.peers import DIT, WARM_UP, Case, build_ours, build_theirs, inputs
from benchmarks.peers import load as load_peer
from wan.plan.runs import DTYPES, KEPT
from wan.weights.assign import load_weights
from wan.weights.source import open_source

SIDES = ("fp32", "mixed", "bf16", "diffusers bf16")
SIZES = {768: (3, 32, 32), 3510: (9, 30, 52)}  # tokens -> frames, rows, columns of the latent


def load(side: str, case: Case, folder: str) -> tuple[Callable[..., Tensor], int]:
    """A forward pass, and the bytes of its weights."""
    if side == "diffusers bf16":
        return load_peer(case, "diffusers", folder), 0
    model = build_ours("dit", case.config)
    load_weights(model, open_source(folder), "dit", dtype=DTYPES[side], kept=KEPT.get(side))
    return model, sum(one.nbytes for one in model.parameters())


def peak(side: str, case: Case, folder: str) -> int:
    """Bytes of weights and of one forward."""
    with torch.inference_mode():
        call, weights = load(side, case, folder)
        call(*inputs(case, WARM_UP["dit"]))
        args = inputs(case)
        return weights + peak_bytes(lambda: call(*args))


def compare(case: Case, runs: int, folder: str) -> dict[str, Any]:
    """Seconds of the processor by side, memory, ratios to fp32, and how far results are from those of fp32."""
    args, seconds, results = inputs(case), {side: [] for side in SIDES}, {}
    with torch.inference_mode():
        calls = {side: load(side, case, folder)[0] for side in SIDES}
        for call in calls.values():
            call(*inputs(case, WARM_UP["dit"]))
        for run in range(runs):
            for side in SIDES if run % 2 == 0 else reversed(SIDES):
                start = time.process_time()
                results[side] = calls[side](*args).float()
                seconds[side].append(time.process_time() - start)
        del calls
    peaks = {side: in_fresh_process(peak, side, case, folder) for side in SIDES[:3]}
    medians = {side: median(times) for side, times in seconds.items()}
    return {
        "tokens": case.size[0] * case.size[1] * case.size[2] // 4,
        "processor_seconds": seconds,
        "over_fp32": {side: medians[side] / medians["fp32"] for side in SIDES},
        "over_diffusers_bf16": {side: medians[side] / medians["diffusers bf16"] for side in SIDES},
        "bytes": peaks,
        "bytes_over_fp32": {side: peaks[side] / peaks["fp32"] for side in peaks},
        "rms_error_over_fp32": {
            side: ((results[side] - results["fp32"]).norm() / results["fp32"].norm()).item() for side in SIDES[1:3]
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default 1)")
    parser.add_argument("--tokens", type=int, nargs="+", choices=SIZES, default=[*SIZES], help="default: both")
    parser.add_argument("--layers", type=int, default=DIT["num_layers"], help=f"default {DIT['num_layers']}")
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = DIT | {"num_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build_theirs("dit", config).save_pretrained(folder)
        cases = [compare(Case("dit", config, SIZES[tokens]), options.runs, folder) for tokens in options.tokens]
    about = machine() | {"ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "")}
    report({"machine": about, "layers": options.layers, "cases": cases}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
