"""Rows one after another in a process of their own, which is started anew where a row has ended it. Only `work` imports
torch."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.results import DONE, FAILED, NOT_RUN, RUNNING, read_row, write_row
from benchmarks.gpu.rows import ROWS, Row
from wan.errors import SwanError, one_line

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

_BROKEN = 3  # exit code of a process whose device is of no more use
_LONG, _LEAST_LONG = 8, 60.0  # of the seconds that a row is thought to take; whatever it is
NO_TIME = "time"


Start = Callable[[list[str], str, float], subprocess.Popen]


def supervise(rows: Sequence[Row], folder: Path, minutes: float, start: Start) -> None:
    """Run rows until all have ended or time is up.

    start(names, run, deadline): a process that calls `work`. A row in whose middle it dies, or stays for long, has
    failed; the next process goes on behind it. Raises SwanError where one dies before its first row.
    """
    run, deadline = uuid.uuid4().hex, time.time() + 60 * minutes
    left = list(rows)
    while left and time.time() < deadline:
        process = start([row.name for row in left], run, deadline)
        try:
            reason = _wait(process, left, folder, run, deadline)
        finally:
            process.kill()
            code = process.wait()
        begun = {row: found for row in left if (found := read_row(folder, row.name)).get("run") == run}
        for row, found in begun.items():
            if found["state"] == RUNNING:
                ended = reason or f"its process ended with exit code {code}"
                write_row(folder, row.name, NOT_RUN if reason == NO_TIME else FAILED, ended, run=run)
        if not begun and not reason:
            raise SwanError(f"the process that measures ended with exit code {code}")
        left = [row for row in left if row not in begun]
    for row in left:
        write_row(folder, row.name, NOT_RUN, NO_TIME, run=run)


def _wait(process: subprocess.Popen, rows: Sequence[Row], folder: Path, run: str, deadline: float) -> str:
    """Until a process ends: "". Else why it must be ended."""
    while True:
        try:
            process.wait(0.5)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if time.time() > deadline:
            return NO_TIME
        for row in rows:
            found, limit = read_row(folder, row.name), _LONG * row.seconds + _LEAST_LONG
            if found.get("run") == run and found["state"] == RUNNING and time.time() > found["started"] + limit:
                return f"it had not ended after {limit:.0f} s"


def work(rows: Sequence[Row], folder: Path, bench: Bench, run: str = "") -> int:
    """Measures rows in this process, each written as soon as it has ended. Returns the exit code."""
    import torch

    from benchmarks.gpu.bench import Skip

    machine = bench.machine()
    bench.product_tflops = read_row(folder, "rates").get("result", {}).get("product_tflops")
    for row in rows:
        if bench.expected(row.seconds) > bench.left():
            write_row(folder, row.name, NOT_RUN, NO_TIME, run=run)
            continue
        print(f"{row.name} ...", file=sys.stderr, flush=True)
        write_row(folder, row.name, RUNNING, run=run, started=time.time())
        started, result, state, reason = time.time(), None, DONE, ""
        try:
            result = row.measure(bench)
            if wrong := result.get("wrong"):
                state, reason = FAILED, one_line(f"wrong: {'; '.join(wrong)}")
        except Skip as skip:
            state, reason = NOT_RUN, one_line(skip)
        except ModuleNotFoundError as error:
            state, reason = NOT_RUN, f"needs the package {(error.name or '').partition('.')[0]}"
        except torch.OutOfMemoryError:
            state, reason = FAILED, "out of memory"
        except Exception as error:  # whatever a driver or a package can say: the next row still runs
            state, reason = FAILED, one_line(f"{type(error).__name__}: {error}")
        seconds = round(time.time() - started, 1)
        write_row(folder, row.name, state, reason, run=run, seconds=seconds, machine=machine, result=result)
        if state == FAILED and not _recovers(bench):
            return _BROKEN
    return 0


def _recovers(bench: Bench) -> bool:
    """Whether the device still computes, its memory given back; after an illegal access it does not."""
    import torch

    try:
        bench.clear()
        return torch.ones(2, device=bench.device).sum().item() == 2
    except Exception:
        return False


def rows_named(names: Sequence[str]) -> list[Row]:
    return [row for row in ROWS if row.name in names]
