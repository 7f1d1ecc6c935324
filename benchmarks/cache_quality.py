"""What each cache policy costs in quality: python -m benchmarks.cache_quality --task t2v-tiny

Every policy makes the same clips as the uncached run, over a sweep of thresholds, with every predictor; beside them
stand runs of fewer steps without a cache, which is what any cache has to beat. Prompts and seeds are fixed, everything
else is the task's default. By row:

    computed    predictions that were computed, of all
    compute     the same in blocks: a skip after the first block costs one
    speed-up    of the denoising stage, by wall clock; median over the clips, each beside its own uncached run
    PSNR, SSIM  of the frames to the uncached run of the same seed; mean over the clips
    margin      PSNR over that of fewer steps at equal compute, on the straight line between whole numbers of steps
    color ...   share of the clips in which the judge sees what was asked

Thresholds are not tuned; the best row at half the compute or less is chosen on these clips, so it is run again on as
many others, from which its figures are reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from wan.cache.options import MIN_STEPS, PREDICTORS, policy_of

from benchmarks.cache_cases import TASKS, Case, tiny_cases
from benchmarks.common import machine
from benchmarks.judge import judge
from benchmarks.tiny_world import CASES_PER_HALF, WORDS, Outcome, rates
from benchmarks.tiny_world_gguf import SAME_DB, psnr
from wan.command import Parser, run_command
from wan.engine import Engine
from wan.errors import UsageError
from wan.options import Request, build_request, check_device
from wan.tasks import load_task

HALF = 0.5  # of the compute: where the best policy is looked for
TARGET_DB, TARGET_MARGIN_DB = 30.0, 3.0  # there

# Name -> (flags, flag of the threshold, thresholds; the policy's default is among them).
SERIES: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "teacache linear": ({"teacache": True}, "teacache_thresh", (0.08, 0.15, 0.25, 0.35, 0.5, 0.8)),
    "teacache polynomial": (
        {"teacache": True, "teacache_policy": "polynomial"},
        "teacache_thresh",
        (0.08, 0.12, 0.18, 0.25, 0.35, 0.5),
    ),
    "teacache polynomial_projection": (
        {"teacache": True, "teacache_policy": "polynomial_projection"},
        "teacache_thresh",
        (0.08, 0.12, 0.18, 0.25, 0.35, 0.5),
    ),
    "fbcache hidden_rel_l1": ({"fbcache": True}, "fb_thresh", (0.05, 0.08, 0.12, 0.18, 0.25, 0.35)),
    "fbcache residual_rel_l1": (
        {"fbcache": True, "fb_metric": "residual_rel_l1"},
        "fb_thresh",
        (0.05, 0.08, 0.12, 0.18, 0.25, 0.35),
    ),
    "fbcache hidden_rel_l2": (
        {"fbcache": True, "fb_metric": "hidden_rel_l2"},
        "fb_thresh",
        (0.05, 0.08, 0.12, 0.18, 0.25, 0.35),
    ),
    "magcache K=2": ({"magcache": True, "mag_K": 2}, "mag_thresh", (0.01, 0.02, 0.04, 0.08, 0.12, 0.24)),
    "magcache K=4": ({"magcache": True, "mag_K": 4}, "mag_thresh", (0.01, 0.02, 0.04, 0.08, 0.12, 0.24)),
    "easycache": ({"easycache": True}, "easy_thresh", (0.025, 0.05, 0.1, 0.15, 0.25, 0.4)),
}


class Setting(NamedTuple):
    """One row of the table: a policy at a threshold (`flags`), or fewer steps. threshold, predictor: of a policy."""

    name: str
    flags: dict[str, Any]
    threshold: float | None = None
    predictor: str | None = None


class Made(NamedTuple):
    """One clip by one setting, compared with the uncached one."""

    outcome: Outcome
    speedup: float
    psnr_db: float
    ssim: float
    computed: float
    compute: float


def policies(names: Sequence[str], per_series: int, predictors: Sequence[str] = PREDICTORS) -> list[Setting]:
    """Every series of these by each predictor, at the first of its thresholds."""
    return [
        Setting(name, {**flags, flag: threshold, "cache_predictor": predictor}, threshold, predictor)
        for name, (flags, flag, thresholds) in SERIES.items()
        for predictor in predictors
        for threshold in thresholds[:per_series]
        if name in names
    ]


def fewer_steps(counts: Iterable[int]) -> list[Setting]:
    return [Setting(f"{n} steps", {"sample_steps": n}) for n in counts]


class Maker:
    """Makes clips of a task with one engine, whose models stay in memory."""

    def __init__(self, task: str, steps: int | None, ckpt_dir: str | None, folder: str):
        self.spec, self.engine, self.cache = load_task(task), None, None
        self.options = {"task": task, "sample_steps": steps or self.spec.sampling.steps, "ckpt_dir": ckpt_dir}
        self.options |= {"offload_model": False, "device": check_device("auto")}
        self.options |= {"save_file": str(Path(folder, "unused.mp4"))}
        self.steps = int(self.options["sample_steps"])

    def request(self, case: Case, flags: dict[str, Any]) -> Request:
        force = {"cache_force": True} if self.steps < MIN_STEPS and "sample_steps" not in flags and flags else {}
        return build_request(self.options | case.options | flags | force)

    def make(self, case: Case, flags: dict[str, Any]) -> tuple[np.ndarray, float]:
        """Frames, and seconds of the denoising stage."""
        request = self.request(case, flags)
        self.engine = self.engine or Engine.of(request.load, self.spec)
        video = self.engine.make(request)
        self.cache = video.cache
        return video.frames, video.report["seconds"]["denoise"]

    def run(self, cases: Sequence[Case], settings: Sequence[Setting]) -> tuple[list[list[Made]], list[Made]]:
        """What each setting made of each case, and the uncached clips. All settings of a case run one after another,
        between two uncached runs, so that a machine that grows slower or faster is the same for all."""
        made: dict[int, list[Made]] = {index: [] for index in range(len(settings))}
        uncached = []
        for number, case in enumerate(cases, 1):
            started = time.perf_counter()
            if number == 1:
                self.make(case, {})  # warms up
            reference, before = self.make(case, {})
            mine = [(*self.make(case, setting.flags), *self._compute(setting)) for setting in settings]
            after = self.make(case, {})[1]
            plain = (before + after) / 2
            uncached.append(_made(case, reference, plain, reference, plain, 1.0, 1.0))
            for index, (frames, seconds, computed, compute) in enumerate(mine):
                made[index].append(_made(case, frames, seconds, reference, plain, computed, compute))
            spent = time.perf_counter() - started
            print(f"{number}/{len(cases)} {spent:.0f} s {case.options['prompt']}", file=sys.stderr, flush=True)
        return [made[index] for index in range(len(settings))], uncached

    def _compute(self, setting: Setting) -> tuple[float, float]:
        """Of the last run: predictions computed, and blocks computed, each of those of an uncached run."""
        if "sample_steps" in setting.flags:
            return (setting.flags["sample_steps"] / self.steps,) * 2
        sums = [sums for expert in self.cache.report().values() for sums in expert.values()]
        total, computed = (sum(one[key] for one in sums) for key in ("total", "computed"))
        probed = policy_of(setting.flags).probe_blocks / self.spec.dit.num_layers
        return computed / total, (computed + probed * (total - computed)) / total


def _made(
    case: Case,
    frames: np.ndarray,
    seconds: float,
    reference: np.ndarray,
    plain_seconds: float,
    computed: float,
    compute: float,
) -> Made:
    outcome = Outcome(
        case.clip, judge(frames), seconds, frames[:0]
    )  # the frames of a whole sweep would fill the memory
    return Made(
        outcome, plain_seconds / seconds, psnr(frames, reference), ssim(frames, reference), computed, compute
    )  # fmt: skip


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of uint8 [T, H, W, 3] (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5), by channel,
    mean over all."""
    x, y = (torch.from_numpy(one).permute(0, 3, 1, 2).flatten(0, 1)[:, None].float() for one in (frames, reference))
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


# Figures


def row(setting: Setting, made: Sequence[Made]) -> dict[str, Any]:
    found = rates([one.outcome for one in made])
    return {
        "name": setting.name,
        **({} if setting.threshold is None else {"predictor": setting.predictor, "threshold": setting.threshold}),
        "computed": round(mean(one.computed for one in made), 4),
        "compute": round(mean(one.compute for one in made), 4),
        "speedup": round(median(one.speedup for one in made), 3),
        "psnr_db": round(mean(one.psnr_db for one in made), 2),
        "psnr_db_least": round(min(one.psnr_db for one in made), 2),
        "ssim": round(mean(one.ssim for one in made), 4),
        **{word: found[word] for word in (*WORDS, "color_shape_direction")},
    }


def margin(one: dict[str, Any], steps_rows: Sequence[dict[str, Any]]) -> float | None:
    """PSNR of a row over that of fewer steps at equal compute; None beyond the numbers of steps that were run."""
    compute = [row["compute"] for row in steps_rows]
    if not compute or not compute[0] <= one["compute"] <= compute[-1]:
        return None
    return round(one["psnr_db"] - float(np.interp(one["compute"], compute, [row["psnr_db"] for row in steps_rows])), 2)


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the highest PSNR at half the compute or less."""
    return max((one for one in rows if one["compute"] <= HALF), key=lambda one: one["psnr_db"], default=None)


def pareto(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that none beats in both compute and PSNR, by compute."""
    front: list[dict[str, Any]] = []
    for one in sorted(rows, key=lambda one: (one["compute"], -one["psnr_db"])):
        if not front or one["psnr_db"] > front[-1]["psnr_db"]:
            front.append(one)
    return front


def measure(
    task: str,
    count: int,
    cached: Sequence[Setting],
    steps: int | None = None,
    fewer: Sequence[int] | None = None,
    ckpt_dir: str | None = None,
) -> dict[str, Any]:
    """The JSON, of these settings. fewer: numbers of steps without a cache; None: all from a quarter of `steps` on."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(task, steps, ckpt_dir, folder)
        plain = fewer_steps(fewer or range(max(1, maker.steps // 4), maker.steps))
        cases = tiny_cases(task, 0, count, folder)
        made, uncached = maker.run(cases, [*cached, *plain])
        rows = [row(setting, clips) for setting, clips in zip([*cached, *plain], made)]
        rows, baseline = rows[: len(cached)], rows[len(cached) :]
        for one in rows:
            one["margin_db"] = margin(one, baseline)
        best = best_of(rows)
        if best is not None:
            others = tiny_cases(task, count, count, folder)
            best = _again(maker, others, cached[rows.index(best)], plain) | {"on_these_clips": best}
        request = maker.request(cases[0], {})
    return {
        "task": task,
        "clips": count,
        "size": f"{request.sample.width}x{request.sample.height}",
        "frames": request.sample.frame_num,
        "steps": request.sample.steps,
        "solver": request.sample.solver,
        "guide_scale": list(request.sample.guide_scale),
        "dtype": request.load.dtype,
        "device": request.load.device,
        "machine": machine(),
        "best_at_half_the_compute": best,
        "uncached": row(Setting("uncached", {}), uncached),
        "fewer_steps": baseline,
        "pareto": [f"{_label(one)}, threshold {one['threshold']:g}" for one in pareto(rows)],
        "policies": rows,
    }


def _again(maker: Maker, cases: Sequence[Case], setting: Setting, plain: Sequence[Setting]) -> dict[str, Any]:
    """One setting, and fewer steps, on other clips; with whether it reaches the target."""
    made, _ = maker.run(cases, [setting, *plain])
    one, *baseline = (row(*pair) for pair in zip([setting, *plain], made))
    one["margin_db"] = margin(one, baseline)
    one["reaches_target"] = {
        f"compute at most {HALF}": one["compute"] <= HALF,
        f"PSNR at least {TARGET_DB:g} dB": one["psnr_db"] >= TARGET_DB,
        f"margin at least {TARGET_MARGIN_DB:g} dB": one["margin_db"] is not None
        and one["margin_db"] >= TARGET_MARGIN_DB,
    }
    return one


def _label(one: dict[str, Any]) -> str:
    return f"{one['name']}, {one['predictor']}"


# What is shown


def table(result: dict[str, Any]) -> str:
    columns = ["computed", "compute", "speedup", "psnr_db", "psnr_db_least", "ssim", "margin_db"]
    head = ["policy", "threshold", "computed", "compute", "speed-up", "PSNR dB", "least", "SSIM", "margin", *WORDS]
    lines = [head]
    for one in (result["uncached"], *result["fewer_steps"], *result["policies"]):
        numbers = [one.get(column) for column in columns]
        texts = ["-" if number is None else f"{number:.3f}" for number in numbers]
        for index in (3, 4, 6):
            texts[index] = "-" if numbers[index] is None else f"{numbers[index]:.1f}"
        name = _label(one) if "threshold" in one else one["name"]
        limit = f"{one['threshold']:g}" if "threshold" in one else ""
        lines.append([name, limit, *texts, *(f"{one[word]:.0%}" for word in WORDS)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
    made = f"{result['clips']} clips of {result['frames']} frames {result['size']}, {result['steps']} steps"
    return "\n".join(
        [f"{result['task']}: {made}, {result['dtype']} on {result['device']}", *aligned, *_verdict(result)]
    )


def _verdict(result: dict[str, Any]) -> Iterator[str]:
    best = result["best_at_half_the_compute"]
    if best is None:
        yield f"no setting computes {HALF:.0%} or less"
        return
    yield (
        f"best at {HALF:.0%} of the compute or less: {_label(best)}, threshold {best['threshold']:g}; on"
        f" {result['clips']} other clips: compute {best['compute']:.3f}, speed-up {best['speedup']:.2f}, PSNR"
        f" {best['psnr_db']:.1f} dB, {best['margin_db']} dB over fewer steps"
    )
    missed = [what for what, reached in best["reaches_target"].items() if not reached]
    yield f"target missed: {', '.join(missed)}" if missed else "target reached"


def draw(result: dict[str, Any], out: str) -> None:
    """PSNR over compute: a line a policy and predictor, fewer steps, the Pareto front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    shown = [one for one in result["policies"] if one["psnr_db"] < SAME_DB]  # 99 dB: nothing was skipped
    names = list(dict.fromkeys(one["name"] for one in shown))
    for name in names:
        for predictor, style in zip(PREDICTORS, ("-", "--", ":", "-.")):
            ours = [one for one in shown if (one["name"], one["predictor"]) == (name, predictor)]
            ours.sort(key=lambda one: one["compute"])
            points = [one["compute"] for one in ours], [one["psnr_db"] for one in ours]
            given = {"color": f"C{names.index(name)}", "linestyle": style, "marker": "o", "markersize": 4}
            axes.plot(*points, **given, linewidth=1.2, label=f"{name}, {predictor}")
    steps = result["fewer_steps"]
    line = [one["compute"] for one in steps], [one["psnr_db"] for one in steps]
    axes.plot(*line, color="black", linewidth=2.5, marker="s", markersize=4, label="fewer steps, no cache")
    front = pareto(shown)
    line = [one["compute"] for one in front], [one["psnr_db"] for one in front]
    axes.plot(*line, "o", markersize=11, fillstyle="none", color="red", label="Pareto front of the policies")
    axes.axvline(HALF, color="gray", linewidth=0.8)
    axes.axhline(TARGET_DB, color="gray", linewidth=0.8)
    axes.set_xlabel("compute, of the uncached run's blocks")
    axes.set_ylabel("PSNR to the uncached run, dB")
    axes.set_title(
        f"{result['task']}, {result['steps']} steps {result['solver']}, {result['clips']} clips", fontsize=10
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    canvas.print_figure(out, format="png", dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.cache_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    most = max(len(thresholds) for _, _, thresholds in SERIES.values())
    add("--task", choices=TASKS, default=TASKS[0], help=f"default {TASKS[0]}")
    add("--prompts", type=int, default=16, choices=range(1, CASES_PER_HALF + 1), metavar="N", help="clips; default 16")
    add("--series", action="append", metavar="NAME", help=f"only these; may be repeated; of: {', '.join(SERIES)}")
    add("--predictors", nargs="+", choices=PREDICTORS, default=PREDICTORS, help="only these; default: all")
    add(
        "--thresholds", type=int, default=most, choices=range(1, most + 1), metavar="N", help="only the first N of each"
    )
    add("--steps", type=int, metavar="N", help="sampling steps of the uncached run; default: the task's")
    add("--fewer", nargs="+", type=int, metavar="N", help="steps without a cache; default: all from a quarter of it on")
    add("--ckpt_dir", metavar="DIR", help="other weights of the same shape; default: the embedded ones")
    add("--out", metavar="FILE", help="write the JSON here")
    add("--picture", metavar="FILE", help="write a picture (PNG): PSNR over compute")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.series or () if name not in SERIES]:
        raise UsageError(f"--series: no series {unknown[0]!r}; series: {', '.join(SERIES)}")
    for path in filter(None, (args.out, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"no folder {Path(path).absolute().parent}")
    settings = policies(args.series or list(SERIES), args.thresholds, args.predictors)
    fewer = sorted(set(args.fewer)) if args.fewer else None
    result = measure(args.task, args.prompts, settings, args.steps, fewer, args.ckpt_dir)
    print(table(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(result, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
