"""All that is to be known of a GPU, checked and measured in order of value within a time.

    python -m benchmarks.gpu [--minutes 9] [--out DIR]     # benchmarks/results/<gpu>
    python -m benchmarks.gpu --resume DIR                  # what is not done there yet
    python -m benchmarks.gpu --table                       # docs/gpu.md, from all results
    python -m benchmarks.gpu --device cpu --tiny --out DIR # every row on tiny shapes: does it run?

Each row is a JSON file, written as soon as the row has ended: done, failed or not run, with a line that says why.
Weights are random and made on the device. Needs torch, and for some rows the packages of requirements.txt; diffusers
and attention packages are measured where they are installed, golden cases where SWAN_GOLDEN names their folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.results import DONE, RESULTS, has_files, has_rows, read_row, slug
from benchmarks.gpu.rows import NAMES
from benchmarks.gpu.run import rows_named, supervise, work
from benchmarks.gpu.table import write_table
from wan.command import Parser, put, run_command
from wan.errors import SwanError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; default 9")
    parser.add_argument("--out", metavar="DIR", help="a folder without results; default benchmarks/results/<gpu>")
    parser.add_argument("--resume", metavar="DIR", help="go on in a folder: rows that are not done")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these; rows: {', '.join(NAMES)}")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu, which is for --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, whose times mean nothing")
    parser.add_argument("--table", action="store_true", help="write the table of docs/gpu.md from all results")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "DEADLINE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        put(write_table(), end="")
        return 0
    _check(args)
    if args.worker:
        from benchmarks.gpu.bench import Bench

        bench = Bench(args.device, args.tiny, float(args.worker[1]))
        return work(rows_named(args.rows), Path(args.out), bench, args.worker[0])
    folder = _folder(args)
    rows = [row for row in rows_named(args.rows or NAMES) if read_row(folder, row.name).get("state") != DONE]
    given = ["--device", args.device, *(["--tiny"] if args.tiny else [])]

    def start(names: list[str], run: str, deadline: float) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *given]
        return subprocess.Popen([*command, "--worker", run, str(deadline), "--rows", *names], cwd=ROOT)

    supervise(rows, folder, args.minutes, start)
    for name in NAMES:
        if found := read_row(folder, name):
            put(f"{name:32} {found['state']:8} {found['reason']}".rstrip())
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in args.rows or ():
        if name not in NAMES:
            raise UsageError(f"--rows {name}: no such row; rows: {', '.join(NAMES)}")
    if not args.minutes > 0:
        raise UsageError(f"--minutes must be more than 0, not {args.minutes:g}")
    if args.out and args.resume:
        raise UsageError("--resume names the folder: leave --out out")
    if args.device.partition(":")[0] not in ("cuda", "cpu"):
        raise UsageError(f"--device must be cuda, cuda:N or cpu, not {args.device}")
    if args.device == "cpu" and not args.tiny:
        raise UsageError("--device cpu is for --tiny alone: the full shapes take days there")
    if args.tiny and not (args.out or args.resume):
        raise UsageError("--tiny wants --out DIR: its times are no results")


def _folder(args: argparse.Namespace) -> Path:
    if args.resume:
        folder = Path(args.resume).absolute()
        if not has_rows(folder, NAMES):
            raise UsageError(f"--resume {args.resume}: there are no results of this benchmark")
        return folder
    if args.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise SwanError("there is no CUDA device; --device cpu --tiny --out DIR tries all rows on a CPU")
    folder = Path(args.out).absolute() if args.out else RESULTS / slug(torch.cuda.get_device_name(args.device))
    if has_files(folder, NAMES):
        raise UsageError(f"{folder} has results: go on with --resume, or give another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
