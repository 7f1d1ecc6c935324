"""What two experts take in memory and time: python -m benchmarks.expert_swap [--gb 1.5] [--out FILE]

A random pair of experts, each of about so many GB in bf16, runs by generate.py in fresh processes: `one` lets go of the
first expert before the second is read (--offload model, whose file is read ahead meanwhile), `both` keeps them
(--offload none). Sizes are small, so that denoising needs most memory. By way:

    peak_bytes   peak resident memory of the process
    experts      (peak_bytes - floor_bytes) / bytes of one expert; floor: the peak of a run of the tiny embedded task
    swap         seconds that the run waited for the second expert, and their share of denoising
"""

from __future__ import annotations

import sys
import tempfile
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.common import machine, report
from benchmarks.plan_memory import ROOT, plain, run_generate, specs, write_checkpoint
from wan.command import Parser, run_command

BLOCK_BYTES = 94e6  # of the width of 1.3B in bf16
WAYS = {"one": ["--offload", "model"], "both": ["--offload", "none"]}
FLAGS = ["--size", "256*256", "--frame_num", "5", "--vae_dtype", "bf16", "--vae_tile_px", "128", "--sample_steps", "6"]
FLAGS += ["--prompt", "a cat on a roof", "--negative_prompt", "blurred", "--seed", "1"]


def measure(gigabytes: float, runs: int) -> dict[str, Any]:
    spec = specs()["experts"]
    spec.dit.num_layers = round(gigabytes * 1e9 / BLOCK_BYTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks").mkdir()
        (folder / "tasks" / f"{spec.name}.yaml").write_text(yaml.safe_dump(plain(spec), allow_unicode=True))
        write_checkpoint(folder / "ckpt", spec, packed=False)
        paths = [folder / "ckpt" / one / "diffusion_pytorch_model.safetensors" for one in spec.experts.values()]
        expert = max(path.stat().st_size for path in paths)
        save = ["--save_file", str(folder / "video.mp4")]
        tiny = ["--task", "t2v-tiny", "--frame_num", "5", "--sample_steps", "1", "--seed", "1"]
        floor = run_generate(ROOT / "configs", [*tiny, *save])["peak_memory_bytes"]
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(runs):
            for way, flags in WAYS.items():
                task = ["--task", spec.name, "--ckpt_dir", str(folder / "ckpt")]
                found[way].append(run_generate(folder, [*task, *FLAGS, *flags, *save]))
    rows = {way: _row(done, floor, expert) for way, done in found.items()}
    shas = {one["sha256"] for done in found.values() for one in done}
    return {
        "expert_bytes": expert,
        "block_bytes": round(expert / spec.dit.num_layers),
        "floor_bytes": floor,
        "same_video": len(shas) == 1,
        "ways": rows,
    }


def _row(done: list[dict[str, Any]], floor: int, expert: int) -> dict[str, Any]:
    peak = max(one["peak_memory_bytes"] for one in done)
    seconds = {name: median(one["seconds"][name] for one in done) for name in ("load", "swap", "denoise")}
    return {
        "peak_bytes": peak,
        "experts": round((peak - floor) / expert, 3),
        "seconds": seconds,
        "swap_share": round(seconds["swap"] / seconds["denoise"], 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.expert_swap", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5, help="of each expert; default 1.5")
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turns; default 3")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    report({"machine": machine(), **measure(args.gb, args.runs)}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
