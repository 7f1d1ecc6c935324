"""What converting takes: python -m benchmarks.converting [--gb 0.27] [--runs 2]

A random transformer of so many GB in bf16 is converted by `python -m wan.convert` in fresh processes, by turns with
compiled quantisers and without (SWAN_NATIVE=0: libgguf's; for folders there are none). By format: seconds of the best
run, and processor seconds with all that a start takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, report
from benchmarks.loading import write
from wan.command import Parser, run_command

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS")
FOLDERS = {"fp8": ["--to", "fp8"], "int8": ["--to", "int8"], "mlx4": ["--to", "mlx", "--quantize"]}
# The process tells what it took when it has ended.
_MEASURED = """
import resource, sys
from wan.convert import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def convert(flags: Sequence[str], native: bool) -> dict[str, float]:
    environment = os.environ | {"SWAN_NATIVE": "1" if native else "0"}
    command = [sys.executable, "-c", _MEASURED, "--quiet", "--overwrite", *flags]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    return {"seconds": json.loads(lines[-2])["seconds"], "processor_seconds": round(float(lines[-1]), 2)}


def measure(gigabytes: float, runs: int, types: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, _ = write("safetensors", gigabytes, folder)
        flags = {one: ["--type", one, "--output", str(folder / "out.gguf")] for one in types if one not in FOLDERS}
        flags |= {one: [*FOLDERS[one], "--output-dir", str(folder / one)] for one in types if one in FOLDERS}
        rows: dict[str, Any] = {}
        for one, asked in flags.items():
            ways = {"compiled": True} | ({} if one in FOLDERS else {"libgguf": False})
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(runs):
                for way, native in ways.items():
                    found[way].append(convert([*asked, "--checkpoint-dir", str(path)], native))
            rows[one] = {way: min(done, key=lambda row: row["seconds"]) for way, done in found.items()}
        return {"file_bytes": path.stat().st_size, "types": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.converting", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    every = (*TYPES, *FOLDERS)
    parser.add_argument("--gb", type=float, default=0.27, help="size of the checkpoint; default 0.27")
    parser.add_argument("--runs", type=int, default=2, help="each way, by turns; default 2")
    parser.add_argument("--types", nargs="+", choices=every, default=every)
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    report({"machine": machine(), **measure(args.gb, args.runs, args.types)}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
