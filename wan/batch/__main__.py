"""Makes many videos with models that are loaded once.

    python -m wan.batch jobs.jsonl --out DIR --task t2v-A14B --ckpt_dir ./Wan2.2-T2V-A14B
    python -m wan.batch pictures/ --out DIR --task i2v-A14B --ckpt_dir ./Wan2.2-I2V-A14B --prompt "it comes alive"
    python -m wan.batch --out DIR --prompt "a red circle" --grid "seed=1..8 sample_guide_scale=3,4,5"

JOBS is a .jsonl file (an object of options a line, by the names of generate.py's flags, and perhaps "name"), a .csv
file (flags in the first line), or a folder of pictures (each a first frame; NAME.txt beside NAME.png is its prompt).
Flags of generate.py given here are for all jobs that do not have their own. Jobs that load the same come one after
another.

Each job makes NAME.mp4 (NAME.png where it is one frame) and NAME.json with its options and report. Run again, a batch
goes on where it stopped: jobs whose files are there, made by the same settings, are done. Failures are listed at the
end (exit code 1) and made again with --retry. With --grid or --sheet, sheet.png and sheet.html show all clips.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.batch.jobs import Job, Record, read_jobs, read_record, write_record
from wan.batch.sheet import Cell, check_sheets, write_sheets
from wan.cli import add_flags
from wan.command import Parser, put, run_process
from wan.errors import Cancelled, SwanError, UsageError, one_line, printable
from wan.options import FLAGS, PART_OF
from wan.options.values import whole
from wan.remote.cluster import add_ray_flag, check_address, joined, places, said_of

if TYPE_CHECKING:
    from wan.engine import Event
    from wan.engines import Engines

_ENDINGS = (".mp4", ".png")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MOST_LISTED = 20


@dataclass
class Batch:
    """Jobs on their way into a folder."""

    folder: Path
    jobs: Sequence[Job]
    done: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def left(self, retry: bool) -> list[tuple[Job, str]]:
        """The jobs to make and their digests, grouped by what they load; what earlier runs made is counted.

        Raises UsageError for a file of that name that no batch has made: it would be overwritten.
        """
        found = []
        for job in self.jobs:
            record, digest = read_record(self.folder, job.name), _digest(job)
            path = self.folder / record.file if record and record.file else None
            if record is None and (other := self._other(job.name)):
                raise UsageError(f"{printable(other)} is there and of no batch: give another --out")
            is_same = record is not None and record.digest == digest != ""
            if is_same and record.status == "done" and path and path.is_file():
                self.done[job.name] = path
            elif is_same and record.status == "failed" and not retry:
                self.failed[job.name] = record.error
            else:
                found.append((job, digest))
        groups: dict[str, list[tuple[Job, str]]] = {}
        for job, digest in found:
            groups.setdefault(job.load, []).append((job, digest))
        return [pair for group in groups.values() for pair in group]

    def _other(self, name: str) -> Path | None:
        return next((path for end in (*_ENDINGS, ".json") if (path := self.folder / f"{name}{end}").exists()), None)

    def make(self, engines: Engines, job: Job, digest: str, on_event: Callable[[Event], None] | None = None) -> bool:
        """One job, its files and its record. Whatever is wrong with it is kept; SwanError if nothing can be written."""
        try:
            path, report = engines.write(job.options, self.folder / job.name, on_event=on_event)
        except Cancelled:
            raise
        except Exception as error:
            line = one_line(error) if isinstance(error, SwanError) else f"{type(error).__name__}: {one_line(error)}"
            self.has_failed(job, digest, line)
            return False
        self.is_done(job, digest, path, report)
        return True

    def is_done(self, job: Job, digest: str, path: Path, report: Mapping[str, Any]) -> None:
        """Its file is there: keep its record."""
        write_record(self.folder, job.name, Record("done", digest, path.name, report=report, options=job.options))
        self.done[job.name] = path
        self.failed.pop(job.name, None)

    def has_failed(self, job: Job, digest: str, line: str) -> None:
        """Keep why. SwanError where there is no room for its file: nor is there for any other job's."""
        if any(os.strerror(code) in line for code in _NO_ROOM):
            raise SwanError(line)
        self.failed[job.name] = line
        write_record(self.folder, job.name, Record("failed", digest, error=line, options=job.options))


def _digest(job: Job) -> str:
    try:
        return job.digest()
    except SwanError:  # a file that cannot be read: the run says so
        return ""


class _Line:
    """One line on stderr that says how far the batch is."""

    def __init__(self, total: int, quiet: bool):
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="job", file=sys.stderr, disable=quiet, smoothing=0)
        self.name = ""

    def begin(self, name: str) -> None:
        self.name = name
        self.bar.set_postfix_str(name)

    def __call__(self, event: Event) -> None:
        self.show(self.name, event.kind, vars(event))

    def show(self, name: str, kind: str, event: Mapping[str, Any]) -> None:
        """What happens to a job."""
        if kind in ("stage", "step"):
            self.bar.set_postfix_str(f"{name}: {event['stage']} {event['done']} of {event['total']}")
        elif kind == "warning":
            self.say(f"{name}: warning: {event['text']}")

    def say(self, text: str) -> None:
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def end(self) -> None:
        self.bar.update()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()  # what is said next has a line of its own


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m wan.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("batch")
    group.add_argument("jobs", nargs="?", metavar="JOBS", help="a .jsonl or .csv file, or a folder of pictures")
    group.add_argument("--out", metavar="DIR", required=True, help="folder of the results; made where it is not there")
    group.add_argument("--grid", metavar="FLAGS", help="make each job with all combinations: FLAG=A,B,... FLAG=1..8")
    group.add_argument("--sheet", action="store_true", help="write sheet.png and sheet.html, as --grid does")
    group.add_argument("--retry", action="store_true", help="make the jobs again that failed in an earlier run")
    add_ray_flag(group.add_argument)
    group.add_argument("--workers", metavar="N", help="with --ray: how many; default: one a GPU, one without")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_flags(parser, {name: one for name, one in FLAGS.items() if PART_OF[name] != "output"})
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: all jobs are done; 1: some failed."""
    args = make_parser().parse_args(argv)
    if args.jobs is None and args.grid is None:
        raise UsageError("give JOBS, a file or folder, or --grid")
    if args.workers is not None and args.ray is None:
        raise UsageError("--workers is for --ray: without it, a batch is one process")
    workers = None if args.workers is None else whole(args.workers, 0, "workers", 1, 1000)
    if args.ray is not None:
        check_address(args.ray)
    common = {name: value for name, value in vars(args).items() if name in FLAGS and value is not None}
    jobs = read_jobs(args.jobs, common, args.grid)
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SwanError(f"--out: cannot make {printable(folder)}: {error.strerror}") from error
    if args.grid or args.sheet:
        check_sheets(folder)
    batch, started = Batch(folder, jobs), time.perf_counter()
    left = batch.left(args.retry)
    if left and args.ray is not None:
        _run_by_ray(batch, left, args.quiet, args.ray, workers)
    elif left:
        _run(batch, left, args.quiet)
    for name, error in list(batch.failed.items())[:_MOST_LISTED]:
        print(f"failed: {name}: {error}", file=sys.stderr)
    if len(batch.failed) > _MOST_LISTED:
        print(f"failed: {len(batch.failed) - _MOST_LISTED} more, see the .json files", file=sys.stderr)
    seconds = round(time.perf_counter() - started, 3)
    put(_summary(len(jobs), len(left), batch, seconds))
    if args.grid or args.sheet:
        columns = _columns(job.told for job in jobs)
        write_sheets(folder, [Cell(job.name, batch.done.get(job.name), job.told) for job in jobs], columns)
    return 1 if batch.failed else 0


def _run(batch: Batch, left: Sequence[tuple[Job, str]], quiet: bool) -> None:
    from wan.distributed.signals import listening

    with listening() as signals, signals.held():  # an import that is interrupted may go on half done
        from wan.engines import Engines
    with _Line(len(left), quiet) as line, listening() as signals, Engines() as engines:
        for job, digest in left:
            signals.check()
            line.begin(job.name)
            if not batch.make(engines, job, digest, line):
                line.say(f"failed: {job.name}: {batch.failed[job.name]}")
            line.end()


def _run_by_ray(batch: Batch, left: Sequence[tuple[Job, str]], quiet: bool, address: str, count: int | None) -> None:
    from wan.batch.pool import Pool

    digests = {job.name: digest for job, digest in left}

    with joined(address):
        seats = places(count, 1, all(job.options.get("device") == "cpu" for job, _ in left))
        with _Line(len(left), quiet) as line:

            def done(job: Job, path: Path, report: Mapping[str, Any]) -> None:
                batch.is_done(job, digests[job.name], path, report)
                line.end()

            def failed(job: Job, why: str) -> None:
                batch.has_failed(job, digests[job.name], why)
                line.say(f"failed: {job.name}: {why}")
                line.end()

            if told := said_of(seats):
                line.say(told)
            tell = lambda name, event: line.show(name, event["event"], event)  # noqa: E731
            pool = Pool(batch.folder, seats, lambda job: line.begin(job.name), tell, done, failed, line.say)
            pool.make([job for job, _ in left])


def _columns(told: Iterable[dict[str, Any]]) -> int:
    """How many values the last flag of a grid has, which varies fastest; 0 without one."""
    values = [list(one.items())[-1] for one in told if one]
    return len(dict.fromkeys(values))


def _summary(jobs: int, made: int, batch: Batch, seconds: float) -> str:
    told = {"jobs": jobs, "made": made, "done": len(batch.done), "failed": sorted(batch.failed), "seconds": seconds}
    return json.dumps({**told, "out": str(batch.folder)})


if __name__ == "__main__":
    run_process(main)
