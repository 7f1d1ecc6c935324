"""Text to video from a GGUF transformer, with the flags of CineWan: python -m wan.compat.run_gguf_t2v --help

The run is that of generate.py: the same settings give the same frames. Exit codes and output as there. `--help`
imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wan.cli import print_report, run
from wan.command import Parser, run_command, run_process
from wan.compat.config import read_fun_config
from wan.compat.request import guidance, text_request
from wan.compat.sampler import DEFAULT_SAMPLER, SAMPLERS, sampler

TILE_PX = 256
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # torch's names -> ours

# Our options -> the flags here, for messages.
_NAMES = {
    "dit": "--gguf_path",
    "ckpt_dir": "--base_model_path",
    "frame_num": "--video_length",
    "size": "--width*--height",
    "save_file": "--output_path",
    "sample_steps": "--num_inference_steps",
    "sample_guide_scale": "--guidance_scale",
    "sample_shift": "--shift",
}


def make_parser() -> argparse.ArgumentParser:
    """All flags, with CineWan's defaults where it has the flag and they do something there."""
    parser = Parser(
        prog="python -m wan.compat.run_gguf_t2v",
        description="Make a video from text with the transformer of a GGUF file.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("files").add_argument
    add("--gguf_path", metavar="FILE", required=True, help="the transformer")
    add("--base_model_path", metavar="DIR", required=True, help="folder (or hub id) with VAE, text encoder, tokenizer")
    add("--config_path", metavar="FILE", help="VideoX-Fun's YAML file; default: the official file names and settings")
    add("--output_path", metavar="FILE", default="output_gguf.mp4", help="default: %(default)s")

    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", metavar="TEXT", help="what the video shows")
    add("--negative_prompt", metavar="TEXT", default="", help="what it must not show; default: nothing")
    add("--height", metavar="PX", default="320", help="default: %(default)s")
    add("--width", metavar="PX", default="512", help="default: %(default)s")
    add("--video_length", metavar="N", default="17", help="frames, 4n+1; default: %(default)s")
    add("--fps", metavar="N", help="frames per second of the file; default: the model's")
    add("--seed", metavar="N", default="42", help="-1: random, and printed; default: %(default)s")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", metavar="N", default="30", help="default: %(default)s")
    add("--guidance_scale", metavar="X", default="7.5", help="up to 1: no guidance; default: %(default)s")
    add("--shift", metavar="X", help="shift of the noise schedule; default: scheduler_kwargs.shift, else the model's")
    add("--sampler_name", metavar="NAME", default=DEFAULT_SAMPLER, help=f"{', '.join(SAMPLERS)}; default: %(default)s")

    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--dtype", metavar="NAME", help="bf16, fp16, fp32 or torch's names of these; default: the model's")
    add(
        "--smart_memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hold one model at a time: text encoder, transformer, VAE (default)",
    )
    add("--gguf_mode", metavar="NAME", help="resident, stream or auto (default), see generate.py")
    add("--enable_vae_tiling", action="store_true", help=f"decode in tiles of {TILE_PX} pixels, in less memory")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit code. Never raises for a failed run."""
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    config = read_fun_config(args.config_path)
    solver, warning = sampler(args.sampler_name)
    options = {
        **{name: getattr(args, name) for name in ("prompt", "negative_prompt", "seed", "fps", "device", "gguf_mode")},
        "size": f"{args.width}*{args.height}",
        "frame_num": args.video_length,
        "save_file": args.output_path,
        "sample_steps": args.num_inference_steps,
        "sample_guide_scale": guidance(args.guidance_scale),
        "sample_shift": args.shift,
        "sample_solver": solver,
        "dtype": DTYPES.get(args.dtype, args.dtype),
        "offload_model": args.smart_memory,
        "vae_tile_px": TILE_PX if args.enable_vae_tiling else 0,
    }
    request, spec = text_request(args.gguf_path, args.base_model_path, config, options, _NAMES)
    for line in (warning, *request.warnings):
        if line:
            print(f"warning: {line}", file=sys.stderr)
    print(f"{request.load.task}, seed {request.sample.seed}", file=sys.stderr)
    print_report(run(request, spec))
    return 0


if __name__ == "__main__":
    run_process(main)
