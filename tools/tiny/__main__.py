"""Trains the embedded model from nothing and writes it: `WAN_INFERENCE_ONLY=0 python -m tools.tiny`.

About an hour on two cores with AMX, by the sum of its stages. Each stage logs JSON lines to the folder `--out`.
The logs of the committed weights lie in tools/tiny/log. These were made in three runs: images, clips
(`--image_steps 0`); a DiT with timestep shift 3 (train_dit_first.jsonl, 3,000 steps, directions not learned), and from
there the present one (`--resume_dit`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tools.tiny import export, train_dit, train_vae
from wan.tasks import embedded_checkpoint, load_task


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder for weights in training and logs")
    parser.add_argument("--to", type=Path, default=embedded_checkpoint(load_task("t2v-tiny")), help="checkpoint folder")
    parser.add_argument("--stages", nargs="+", choices=("vae", "dit", "export"), default=["vae", "dit", "export"])
    parser.add_argument("--image_steps", type=int, default=1500, help="0: go on from the images of an earlier run")
    parser.add_argument("--clip_steps", type=int, default=1000)
    parser.add_argument("--dit_steps", type=int, default=7500)
    parser.add_argument("--resume_dit", action="store_true", help="begin with the DiT of an earlier run")
    args = parser.parse_args()
    if os.environ.get("WAN_INFERENCE_ONLY", "1") != "0":
        print("error: training needs WAN_INFERENCE_ONLY=0", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if "vae" in args.stages:
        train_vae.train(args.out, args.image_steps, args.clip_steps)
    if "dit" in args.stages:
        train_dit.train(args.out, args.dit_steps, resume=args.resume_dit)
    if "export" in args.stages:
        export.export(args.out, args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
