"""The skip map of a run: python -m wan.cache.report TRACE [--out FILE.png]

TRACE is what `--cache_trace` wrote. Above, a row a branch: which steps were computed and which skipped. Below, the
metric of each step beside the threshold. Exit codes: 0 done, 1 the picture cannot be made, 2 TRACE is no trace.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from wan.cache.telemetry import Decision, read_trace

COLORS = {
    "skipped": "#7fc97f",
    "computed": "#386cb0",
    "warm-up or last": "#9db7dc",
    "failsafe": "#e41a1c",
}
LOG_FROM = 30.0  # largest over least metric from which the axis is logarithmic


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def kind(one: Decision) -> str:
    """The key in COLORS."""
    if one.failsafe:
        return "failsafe"
    if one.skipped:
        return "skipped"
    return "computed" if one.phase == "main" else "warm-up or last"


def draw(header: dict[str, Any], decisions: Sequence[Decision], out: Path) -> None:
    """Writes the picture. Raises ImportError without matplotlib, OSError where `out` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((one.run, one.branch) for one in decisions))
    steps = 1 + max(one.step for one in decisions)
    figure = Figure(figsize=(min(24, max(7, 0.24 * steps)), 3.2 + 0.35 * len(rows)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.35 * len(rows), 2.2])
    _draw_map(above, decisions, rows)
    _draw_metric(below, decisions, rows)
    for first, expert in _experts(decisions):
        for axes in (above, below) if first else ():
            axes.axvline(first - 0.5, color="black", linewidth=1.5)
        if expert != "model":
            above.annotate(expert, (first - 0.5, 1), (3, 3), xycoords=("data", "axes fraction"), fontsize=8,
                           textcoords="offset points")  # fmt: skip
    below.set_xlim(-0.5, steps - 0.5)
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(_title(header, decisions), fontsize=10)
    canvas.print_figure(out, format="png", dpi=110)


def _draw_map(axes, decisions: Sequence[Decision], rows: list[tuple[int, str]]) -> None:
    for name, color in COLORS.items():
        cells = [(one.step, rows.index((one.run, one.branch))) for one in decisions if kind(one) == name]
        if cells:
            axes.bar(*_corners(cells), color=color, label=name, align="edge", edgecolor="white", linewidth=0.5)
    many = len({run for run, _ in rows}) > 1
    axes.set_yticks(range(len(rows)), [f"run {run} {branch}" if many else branch for run, branch in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize=8, frameon=False)


def _corners(cells: list[tuple[int, int]]) -> tuple[list[float], list[float], float, list[float]]:
    """Arguments of `bar` for cells (step, row): x, height, width, bottom."""
    return [x - 0.5 for x, _ in cells], [0.8] * len(cells), 1.0, [y - 0.4 for _, y in cells]


def _draw_metric(axes, decisions: Sequence[Decision], rows: list[tuple[int, str]]) -> None:
    many, values = len({run for run, _ in rows}) > 1, []
    for index, (run, branch) in enumerate(rows):
        for expert in dict.fromkeys(one.expert for one in decisions):
            ours = [one for one in decisions if (one.run, one.branch, one.expert) == (run, branch, expert)]
            points = [(one.step, math.nan if one.metric is None else one.metric) for one in ours]
            if points:
                style = {"color": f"C{index % 10}", "marker": "o", "markersize": 3, "linewidth": 1}
                line = axes.plot(*zip(*points), **style)[0]
                values += [value for _, value in points if math.isfinite(value) and value > 0]
        line.set_label(f"run {run} {branch}" if many else branch)
    threshold = decisions[0].threshold
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    values += [threshold] * (threshold > 0)
    if values and max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
    axes.set_ylabel("metric")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _experts(decisions: Sequence[Decision]) -> list[tuple[int, str]]:
    """(first step, name), in the order of the steps."""
    first: dict[str, int] = {}
    for one in decisions:
        first[one.expert] = min(one.step, first.get(one.expert, one.step))
    return sorted((step, name) for name, step in first.items())


def _title(header: dict[str, Any], decisions: Sequence[Decision]) -> str:
    skipped = sum(one.skipped for one in decisions)
    parts = [str(header.get("task", "")), decisions[0].policy, f"{skipped} of {len(decisions)} predictions skipped"]
    if "seed" in header:
        parts.insert(1, f"seed {header['seed']}")
    return ", ".join(filter(None, parts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="python -m wan.cache.report", description="Draw the skip map of a cache trace.")
    parser.add_argument("trace", metavar="TRACE", help="file that --cache_trace wrote")
    parser.add_argument("--out", metavar="FILE", help="picture (PNG); default: TRACE with the suffix .png")
    args = parser.parse_args(argv)
    out = Path(args.out) if args.out else Path(args.trace).with_suffix(".png")
    try:
        header, decisions = read_trace(args.trace)
        if not isinstance(header, dict) or not decisions:
            raise ValueError(f"{args.trace}: not a cache trace (it holds no decision)")
    except OSError as error:
        return _fail(f"{args.trace}: {error.strerror or error}", 2)
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        draw(header, decisions, out)
    except ImportError:
        return _fail("a picture needs matplotlib: pip install matplotlib", 1)
    except OSError as error:
        return _fail(f"--out: cannot write {out}: {error.strerror or error}", 1)
    try:
        print(out, flush=True)
    except OSError as error:
        if sys.stdout is sys.__stdout__:  # what it still holds is written nowhere, or Python's end would try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # a reader that has gone wants no more
            return _fail(f"{out} is made, but its name cannot be written: {error.strerror or error}", 1)
    return 0


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
