"""Light VAEs beside the full one: time, memory and PSNR of decoding 33 frames of 416x240.

`trained`: Tiny World's TAE beside its VAE: of rendered clips that the VAE encoded (PSNR to what the VAE decodes, and of
both to the clips), and of small videos that the DiT made. Fp32.
`real_size`: the layouts of the released files with random weights: seconds, TFLOP and the most memory that decoding
takes beside the weights. Each decodes alone, in a process of its own.
`seconds` is of the clock, of the trained pair the least of --repeats; `cpu_seconds` of all threads, which other work
disturbs less.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DTYPES, in_fresh_process, machine, peak_bytes, report
from tools.tiny.train_tae import FILE
from tools.tiny.world import NUM_FRAMES, combinations, held_out, render, sample
from wan.command import Parser, run_command
from wan.engine import Engine
from wan.models.vae import empty_vae
from wan.models.vae_base import VideoVAE
from wan.plan.runs import decoding
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.assign import load_weights
from wan.weights.infer import vae_config
from wan.weights.source import open_source

FRAMES, WIDTH, HEIGHT = 33, 416, 240
TAE_2_1 = {"z_dim": 16, "patch_size": 1, "widths": (256, 128, 64, 64)}
LAYOUTS = {  # by the files that have them; those of one group make the same latents
    "Wan2.1": {
        "Wan2.1_VAE": dict(load_task("t2v-1.3B").vae),
        "lightvaew2_1": dict(load_task("t2v-1.3B").vae) | {"dim": 24},
        "taew2_1, lighttaew2_1": TAE_2_1,
    },
    "Wan2.2": {
        "Wan2.2_VAE": dict(load_task("ti2v-5B").vae),
        "taew2_2, lighttaew2_2": TAE_2_1 | {"z_dim": 48, "patch_size": 2},
    },
}


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of videos in [-1, 1]."""
    return 10 * math.log10(4 / (one - other).square().mean().item())


def decode_time(vae: VideoVAE, z: Tensor, repeats: int) -> dict[str, float]:
    runs = []
    for _ in range(repeats):
        before = time.perf_counter(), time.process_time()
        vae.decode(z)
        runs.append([now - then for now, then in zip((time.perf_counter(), time.process_time()), before)])
    seconds, cpu_seconds = map(min, zip(*runs))
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}


def load(path: Path) -> VideoVAE:
    source = open_source(path)
    return load_weights(empty_vae(vae_config(source, load_task("t2v-tiny"))), source, "vae", dtype=torch.float32)


def trained(clips: int, repeats: int) -> dict[str, Any]:
    folder = embedded_checkpoint(load_task("t2v-tiny"))
    vae, tae = load(folder / "Wan2.1_VAE.pth"), load(folder / FILE)
    rng, found = random.Random(0), []
    times = [frame * (NUM_FRAMES - 1) / (FRAMES - 1) for frame in range(FRAMES)]
    for number in range(clips):
        video = render(sample(rng, sorted(held_out())), WIDTH, HEIGHT, times)[None]
        z = vae.encode(video)
        full, light = vae.decode(z), tae.decode(z)
        psnrs = {"tae_to_vae": (light, full), "vae_to_clip": (full, video), "tae_to_clip": (light, video)}
        found.append({name: psnr(*pair) for name, pair in psnrs.items()})
        print(f"clip {number + 1}/{clips}", file=sys.stderr)
    rendered = {f"{name}_db": round(sum(one[name] for one in found) / clips, 2) for name in found[0]}
    return {
        "clips": clips,
        "psnr": rendered,
        "psnr_of_made_64x64": {"tae_to_vae_db": round(made(vae, tae, clips), 2)},
        "file_bytes": {"vae": (folder / "Wan2.1_VAE.pth").stat().st_size, "tae": (folder / FILE).stat().st_size},
        "decode": {name: decode_time(one, z, repeats) for name, one in {"vae": vae, "tae": tae}.items()},
    }


def made(vae: VideoVAE, tae: VideoVAE, clips: int) -> float:
    """PSNR of the TAE to the VAE, of videos that t2v-tiny made."""
    rng, found = random.Random(1), []
    with Engine(task="t2v-tiny", device="cpu") as engine:
        for seed in range(clips):
            latents = engine.generate(prompt=sample(rng, combinations()).prompt, seed=seed).latents[None]
            found.append(psnr(tae.decode(latents), vae.decode(latents)))
    return sum(found) / clips


def alone(config: Mapping[str, Any], latent: Sequence[int], dtype: str) -> dict[str, Any]:
    """In a process of its own."""
    vae = empty_vae(config).to_empty(device="cpu").to(DTYPES[dtype]).eval()
    for weight in vae.parameters():
        weight.data.normal_(0, 1 / math.sqrt(weight[0].numel()))
    with torch.inference_mode():
        z = torch.randn(1, *latent)
        vae.decode(z[:, :, :1])  # the libraries are awake
        found: dict[str, Any] = {}
        peak = peak_bytes(lambda: found.update(decode_time(vae, z, repeats=1)))
        return found | {"peak_bytes": peak}


def real_size(dtypes: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for family, layouts in LAYOUTS.items():
        for name, config in layouts.items():
            stride = 16 if family == "Wan2.2" else 8
            latent = (config["z_dim"], (FRAMES + 3) // 4, HEIGHT // stride, WIDTH // stride)
            count = sum(one.numel() for one in empty_vae(config).parameters())
            for dtype in dtypes:
                row = {"family": family, "layout": name, "dtype": dtype, "parameters": count}
                row["tflop"] = round(decoding(config, latent, dtype, "cpu").flops / 1e12, 3)
                row |= in_fresh_process(alone, config, latent, dtype)
                rows.append(row)
                print(row, file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8, help="of Tiny World; 0: leave the trained pair out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--dtypes", nargs="*", choices=DTYPES, default=["bf16"], help="of the real sizes; none: leave out"
    )
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"machine": machine(), "frames": FRAMES, "size": f"{WIDTH}x{HEIGHT}"}
    with torch.inference_mode():
        result |= {"trained": trained(args.clips, args.repeats)} if args.clips else {}
    result |= {"real_size": real_size(args.dtypes)} if args.dtypes else {}
    report(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
