"""Trains the embedded models from nothing and writes them: `WAN_INFERENCE_ONLY=0 python -m tools.tiny`.

An hour and a half on two cores with AMX, by the sum of its stages, and 55 minutes on one of them for the LoRAs: vae,
dit and export make t2v-tiny; i2v and export_i2v make the two experts of i2v-tiny on top of it; stripes and lora make
LoRAs for both that turn the background to stripes, and distill one that makes t2v-tiny a model of four steps. Each
stage logs JSON lines to the folder `--out`. vace, s2v (which hears by what audio makes) and animate each train a task
of that kind beside t2v-tiny.
The logs of the committed weights lie in tools/tiny/log. Those of t2v-tiny were made in three runs: images, clips
(`--image_steps 0`); a DiT with timestep shift 3 (train_dit_first.jsonl, 3,000 steps, directions not learned), and from
there the present one (`--resume_dit`). The LoRAs of i2v-tiny were trained with `--lora_steps 400`. The branch of
vace-tiny (45 minutes on one busy core) was trained in three runs, each of which planned its rate for its own last step
(`--vace_steps`, `--resume_vace`): to step 1,200 of 2,400 with a third of the batches, and four tenths of their prompts,
for references; to 2,600 with those of today, both with `SHIFTS` 7, 7, 2 and no weights in the loss; to 3,800 as it is
now. The log holds the first two. tae makes the TAE beside t2v-tiny's VAE: some 20 minutes of one core, in two runs, of
which the second was of the decoder alone (`--tae_steps 0`).
s2v-tiny took 31 minutes, its audio encoder 6, animate-tiny 29, each on a part of a busy core. Both went on once from
a run that had planned its rate for 2,400 steps: s2v from step 400, animate from 600, up to which a third of its prompts
was short, not half (`--resume_s2v`, `--resume_animate`; where its two runs overlap, the log holds both).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tools.tiny import (
    distill,
    export,
    train_animate,
    train_audio,
    train_dit,
    train_i2v,
    train_lora,
    train_s2v,
    train_stripes,
    train_tae,
    train_vace,
    train_vae,
)
from wan.tasks import embedded_checkpoint, load_task

STAGES = ("vae", "dit", "export", "i2v", "export_i2v", "stripes", "lora", "distill", "vace", "export_vace", "tae")
STAGES += ("audio", "s2v", "export_s2v", "animate", "export_animate")
TASKS = ("t2v-tiny", "i2v-tiny", "vace-tiny", "s2v-tiny", "animate-tiny")


def main() -> int:
    to, to_i2v, to_vace, to_s2v, to_animate = (embedded_checkpoint(load_task(name)) for name in TASKS)
    parser = argparse.ArgumentParser(prog="python -m tools.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder for weights in training and logs")
    parser.add_argument("--to", type=Path, default=to, help="checkpoint folder of t2v-tiny")
    parser.add_argument("--to_i2v", type=Path, default=to_i2v, help="checkpoint folder of i2v-tiny, beside it")
    parser.add_argument("--to_vace", type=Path, default=to_vace, help="checkpoint folder of vace-tiny, beside it")
    parser.add_argument("--to_s2v", type=Path, default=to_s2v, help="checkpoint folder of s2v-tiny, beside it")
    parser.add_argument("--to_animate", type=Path, default=to_animate, help="that of animate-tiny, beside it")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--image_steps", type=int, default=1500, help="0: go on from the images of an earlier run")
    parser.add_argument("--clip_steps", type=int, default=1000)
    parser.add_argument("--dit_steps", type=int, default=7500)
    parser.add_argument("--resume_dit", action="store_true", help="begin with the DiT of an earlier run")
    parser.add_argument("--i2v_steps", type=int, default=3000, help="of each expert")
    parser.add_argument("--i2v_experts", nargs="+", choices=train_i2v.EXPERTS, default=train_i2v.EXPERTS)
    parser.add_argument("--resume_i2v", action="store_true", help="go on with the experts of an interrupted run")
    parser.add_argument("--stripes_steps", type=int, default=750)
    parser.add_argument("--lora_steps", type=int, default=600, help="of each LoRA")
    parser.add_argument("--lora_tasks", nargs="+", choices=train_lora.TASKS, default=train_lora.TASKS)
    parser.add_argument("--distill_steps", type=int, default=1300)
    parser.add_argument("--vace_steps", type=int, default=3800)
    parser.add_argument("--resume_vace", action="store_true", help="go on with the branch of an interrupted run")
    parser.add_argument("--tae_steps", type=int, default=1500, help="0: go on with the decoder of an earlier run")
    parser.add_argument("--tae_decoder_steps", type=int, default=3000)
    parser.add_argument("--audio_steps", type=int, default=500)
    parser.add_argument("--s2v_steps", type=int, default=1200)
    parser.add_argument("--resume_s2v", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--animate_steps", type=int, default=1400)
    parser.add_argument("--resume_animate", action="store_true", help="go on with an interrupted run")
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
    if "i2v" in args.stages:
        train_i2v.train(args.out, args.to, args.i2v_steps, args.i2v_experts, resume=args.resume_i2v)
    if "export_i2v" in args.stages:
        export.export_i2v(args.out, args.to_i2v)
    if "stripes" in args.stages:
        train_stripes.train(args.out, args.to, args.stripes_steps)
    if "lora" in args.stages:
        folders = dict(zip(train_lora.TASKS, (args.to, args.to_i2v)))
        for name in args.lora_tasks:
            train_lora.train(args.out, name, folders[name], args.lora_steps)
    if "distill" in args.stages:
        distill.train(args.out, args.to, args.distill_steps)
    if "vace" in args.stages:
        train_vace.train(args.out, args.to, args.vace_steps, resume=args.resume_vace)
    if "export_vace" in args.stages:
        export.export_vace(args.out, args.to_vace)
    if "tae" in args.stages:
        train_tae.train(args.out, args.to, args.tae_steps, args.tae_decoder_steps)
    if "audio" in args.stages:
        train_audio.train(args.out, args.audio_steps)
    if "s2v" in args.stages:
        train_s2v.train(args.out, args.to, args.s2v_steps, resume=args.resume_s2v)
    if "export_s2v" in args.stages:
        export.export_s2v(args.out, args.to_s2v)
    if "animate" in args.stages:
        train_animate.train(args.out, args.to, args.animate_steps, resume=args.resume_animate)
    if "export_animate" in args.stages:
        export.export_animate(args.out, args.to_animate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
