"""Measures the coefficients that cache policies need, on any checkpoint that the pipeline loads.

    python -m wan.calibrate --task t2v-1.3B --ckpt_dir DIR --out coefficients.json
    python generate.py --task t2v-1.3B --ckpt_dir DIR --magcache --cache_coefficients coefficients.json

Videos are made without a cache, and the residual r = h_N - h_0 of the block loop is compared from step to step, in the
cond branch, which decides, and never across experts:

    TeaCache  a polynomial p(x): the relative L1 change of r over that of the time embedding or of its projection
              (arXiv 2411.19108), with the interval of x on which it was fitted
    MagCache  gamma: the mean over tokens of |r_t| / |r_t-1| (arXiv 2506.09045), the first of each expert 1

Both are means over the runs. They hold for the number of steps, the shift and the solver of the runs, best near these.
Prints a table; what OUT holds of other models is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wan.cache import NoCache, StepContext
from wan.cache.coefficients import read_coefficients, write_coefficients
from wan.command import module_parser, run_command
from wan.errors import SwanError, UsageError
from wan.options import Request, build_request, check_device
from wan.options.names import DEFAULT_TASK, FILE_FLAGS, GGUF_FLAGS
from wan.pipeline import WanPipeline
from wan.tasks import load_task

SIGNALS = ("embedding", "projection")
DEGREE = 4
MARGIN = 1e-3  # of x, by which the fitted interval is widened: types and devices round differently
PROMPTS = (
    "A cat walks along a garden wall in the afternoon sun.",
    "Waves break on a rocky shore at dusk, seen from a slowly moving camera.",
    "A woman in a red coat crosses a busy street in the rain.",
    "A paper boat drifts down a small stream through a forest.",
)
TINY_PROMPTS = (  # of the embedded models
    "a blue triangle moving left on a white background",
    "a red circle moving right on a black background",
    "a green square moving up on a gray background",
    "a yellow circle moving down on a black background",
    "a purple triangle moving right on a white background",
    "a red square moving left on a gray background",
    "a blue circle moving up on a white background",
    "a green triangle moving down on a black background",
)
PASSED_ON = (  # flags with the names and meanings that they have in generate.py
    *("ckpt_dir", *(flag for flag in FILE_FLAGS if flag != "tae"), *GGUF_FLAGS, "gguf_mode"),
    *("image", "last_frame", "size", "frame_num", "sample_shift", "sample_guide_scale", "sample_solver"),
    *("device", "dtype", "attention", "offload_model", "t5_cpu"),
)


class Change(NamedTuple):
    """From one step to the next, in the cond branch: the signals' and the residual's relative L1 change, and gamma."""

    expert: str
    step: int
    timestep: float
    embedding: float
    projection: float
    residual: float
    gamma: float


class Recorder(NoCache):
    """Computes everything and compares each step with the one before."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._last: tuple[str, dict[str, Tensor], Tensor] | None = None  # expert, signals, residual

    @contextmanager
    def run(self, steps: Sequence[StepContext]) -> Iterator[None]:
        try:
            yield
        finally:
            self._last = None

    def blocks(
        self,
        ctx: StepContext | None,
        h: Tensor,
        run: Callable[[Tensor, int, int], Tensor],
        count: int,
        embed: Callable[[float], dict[str, Tensor]] | None = None,
    ) -> Tensor:
        out = run(h, 0, count)
        if ctx is not None and embed is not None and ctx.branch == "cond":
            signals, residual = embed(ctx.timestep), out - h
            if self._last is not None and self._last[0] == ctx.expert:
                _, signals_before, before = self._last
                moved = [relative_change(signals[name], signals_before[name]) for name in SIGNALS]
                change, gamma = relative_change(residual, before), (_norms(residual) / _norms(before)).mean().item()
                self.changes.append(Change(ctx.expert, ctx.step, ctx.timestep, *moved, change, gamma))
            self._last = (ctx.expert, signals, residual)
        return out


def relative_change(now: Tensor, before: Tensor) -> float:
    now, before = now.float(), before.float()
    return ((now - before).abs().mean() / before.abs().mean()).item()


def _norms(residual: Tensor) -> Tensor:
    return torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Least squares polynomial, highest power first, and the interval of its fit.

    Of degree 4, or less where there are few points: at least two distinct x for each coefficient but one.
    """
    degree = min(DEGREE, (len(set(x)) - 1) // 2)
    interval = [round(min(x) * (1 - MARGIN), 6), round(max(x) * (1 + MARGIN), 6)]
    return [float(f"{c:.9g}") for c in np.polyfit(x, y, degree)], interval


def coefficients(runs: Sequence[Sequence[Change]], source: str) -> dict[str, Any]:
    """An entry of a coefficients file, see cache/coefficients.py."""
    by_step = list(zip(*runs, strict=True))
    experts = list(dict.fromkeys(one[0].expert for one in by_step))
    entry: dict[str, Any] = {"teacache": {}}
    for signal in SIGNALS:
        fits = {}
        for expert in experts:
            ours = [one for run in runs for one in run if one.expert == expert]
            fits[expert] = fit([getattr(one, signal) for one in ours], [one.residual for one in ours])
        polynomial, interval = ({expert: pair[index] for expert, pair in fits.items()} for index in (0, 1))
        entry["teacache"][signal] = {"polynomial": polynomial, "range": interval, "source": source}
    ratios = {
        expert: [1.0, *(round(mean(run.gamma for run in one), 5) for one in by_step if one[0].expert == expert)]
        for expert in experts
    }
    return entry | {"magcache": {"ratios": ratios, "source": source}}


def table(runs: Sequence[Sequence[Change]], entry: dict[str, Any]) -> str:
    """Means over the runs, with the standard deviation between runs, and what the polynomials make of x."""
    lines = ["expert  step      t  embedding  projection  residual (sd)    p(emb.)  p(proj.)  gamma (sd)"]
    for same in zip(*runs, strict=True):
        one = same[0]
        fitted = []
        for signal in SIGNALS:
            fitted.append(np.polyval(entry["teacache"][signal]["polynomial"][one.expert], getattr(one, signal)))
        changes, gammas = [each.residual for each in same], [each.gamma for each in same]
        lines.append(
            f"{one.expert:6}  {one.step:4}  {one.timestep:5.0f}  {one.embedding:9.5f}  {one.projection:10.5f}"
            f"  {mean(changes):.4f} ({pstdev(changes):.4f})  {fitted[0]:7.4f}   {fitted[1]:7.4f}"
            f"  {mean(gammas):.4f} ({pstdev(gammas):.4f})"
        )
    return "\n".join(lines)


def record(requests: Sequence[Request], spec: Any) -> list[list[Change]]:
    """The changes of each run. Raises UsageError where an expert has fewer than two steps."""
    pipe = WanPipeline.from_request(requests[0], spec)
    runs = []
    for index, request in enumerate(requests, 1):
        print(f"run {index} of {len(requests)}, seed {request.sample.seed}: {request.sample.prompt}", file=sys.stderr)
        recorder = Recorder()
        pipe(request, cache=recorder)
        runs.append(recorder.changes)
        if missing := set(spec.get("experts", ["model"])) - {one.expert for one in recorder.changes}:
            raise UsageError(
                f"{request.sample.steps} steps are too few: expert {min(missing)} runs in fewer than two of them;"
                " give more --sample_steps"
            )
    if not np.isfinite([one[3:] for run in runs for one in run]).all():
        raise SwanError("the network's residuals are not finite, or do not change: nothing can be measured")
    return runs


def make_requests(args: argparse.Namespace, folder: str) -> list[Request]:
    """One a run: prompts in turn, seeds counted up."""
    if args.runs < 1:
        raise UsageError(f"--runs must be at least 1, not {args.runs}")
    options = {name: getattr(args, name) for name in PASSED_ON} | {"task": args.task, "sample_steps": args.steps}
    options["device"] = check_device(args.device or "auto")
    options["offload_model"] = args.offload_model == "true"
    options["save_file"] = str(Path(folder, "unused.mp4"))
    prompts = _prompts(args.prompts, bool(load_task(args.task).get("checkpoint")))
    return [
        build_request(options | {"prompt": prompts[index % len(prompts)], "seed": args.seed + index})
        for index in range(args.runs)
    ]  # fmt: skip


def _prompts(path: str | None, is_tiny: bool) -> list[str]:
    if path is None:
        return list(TINY_PROMPTS if is_tiny else PROMPTS)
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not any(lines):
        raise UsageError(f"--prompts: no prompt in {path}; it holds one a line")
    return list(filter(None, lines))


def _others(out: Path, name: str) -> dict[str, Any]:
    """What the output file holds already, of other models."""
    if not out.parent.is_dir():
        raise UsageError(f"--out: no folder {out.parent}")
    if not out.exists():
        return {}
    try:
        return {model: entry for model, entry in read_coefficients(out).items() if model != name}
    except ValueError as error:
        raise UsageError(f"--out: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    parser = module_parser("wan.calibrate", __doc__)
    add = parser.add_argument
    add("--task", default=DEFAULT_TASK, metavar="NAME", help=f"default {DEFAULT_TASK}")
    add("--out", required=True, metavar="FILE", help="JSON file for --cache_coefficients")
    add("--name", metavar="NAME", help="name of the model in it; default: the task's")
    add("--runs", type=int, default=8, metavar="N", help="videos to make; default 8")
    add("--seed", type=int, default=0, metavar="N", help="of the first run; the others count up; default 0")
    add("--prompts", metavar="FILE", help="prompts, one a line, taken in turn; default: some of its own")
    add("--steps", "--sample_steps", dest="steps", type=int, metavar="N", help="default: the task's")
    group = parser.add_argument_group("as in generate.py")
    for name in PASSED_ON:
        if name == "t5_cpu":
            group.add_argument("--t5_cpu", action="store_true")
        elif name == "offload_model":
            group.add_argument("--offload_model", choices=["true", "false"], default="true", help="default true")
        else:
            group.add_argument(f"--{name}", metavar="X")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    spec, out = load_task(args.task), Path(args.out).absolute()
    name = args.name or spec.name
    others = _others(out, name)
    with tempfile.TemporaryDirectory() as folder:
        requests = make_requests(args, folder)
        runs = record(requests, spec)
    one = requests[0].sample
    size = f"{one.width}x{one.height}, {one.frame_num} frames"
    shift = "" if one.shift is None else f"shift {one.shift:g}, "
    how = f"{one.steps} steps, {one.solver}, {shift}{size}"
    source = f"wan.calibrate on {spec.name}: mean of {len(runs)} runs of {how}"
    entry = coefficients(runs, source)
    print(table(runs, entry))
    try:
        write_coefficients(out, others | {name: entry}, "Measured by python -m wan.calibrate.")
    except OSError as error:
        raise SwanError(f"--out: cannot write {out}: {error.strerror or error}") from error
    print(f"{source}\nwritten to {out} as {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
