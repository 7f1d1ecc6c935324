"""python -m tests.golden DIR: replays every golden case of a folder and prints one line for each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.golden import runners
from tests.golden.cases import Case, load_cases

HEADER = f"{'case':32} {'max abs':>9} {'relative':>9} {'tolerance':>9}  result"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with NAME.json + NAME.safetensors and tokenizer folders")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    print(HEADER)
    counts = {"passed": 0, "failed": 0, "without runner": 0}
    for case in load_cases(folder):
        with torch.no_grad():
            outcome, line = replay(case)
        counts[outcome] += 1
        print(line, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


def replay(case: Case) -> tuple[str, str]:
    """(outcome, line) of one case; the line shows the check that came nearest to failing."""
    try:
        checks = runners.run(case)
    except Exception as error:  # whatever a case does wrong is its own failure, and the next one still runs
        message = " ".join(str(error).split())
        return "failed", f"{case.name:32} {'-':>9} {'-':>9} {'-':>9}  FAIL {type(error).__name__}: {message}"
    if checks is None:
        return "without runner", f"{case.name:32} {'-':>9} {'-':>9} {'-':>9}  no runner"
    if not checks:
        return "failed", f"{case.name:32} {'-':>9} {'-':>9} {'-':>9}  FAIL nothing in this case was compared"
    worst = max(checks, key=lambda check: (check.badness, check.tolerance))
    numbers = f"{worst.error:9.2e} {worst.relative:9.2e} {worst.tolerance:9.0e}"
    if worst.ok:
        return "passed", f"{case.name:32} {numbers}  ok ({len(checks)} checks, worst {worst.label})"
    failed = sum(not check.ok for check in checks)
    return "failed", f"{case.name:32} {numbers}  FAIL {failed} of {len(checks)} checks, worst {worst.label}"


if __name__ == "__main__":
    sys.exit(main())
