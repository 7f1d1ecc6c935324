"""The command line: flags -> Request -> run -> exit code. `--help` and refusals of wrong options import no torch.

Exit codes: see `command.py`. Progress and messages go to stderr; stdout gets one JSON line (or the plan).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from wan import __version__, media
from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.command import Parser, put, run_command
from wan.distributed.launch import Disagreement, World
from wan.distributed.signals import Signals, listening
from wan.errors import SwanError, UsageError, one_line
from wan.request import Request, build_request, check_device, replay_options
from wan.request.alike import file_fact, request_facts
from wan.request.options import (
    DEFAULT_TASK,
    DTYPE_NAMES,
    GGUF_FLAGS,
    OPTIONS,
    SOLVER_NAMES,
    T5_DTYPE_NAMES,
    VAE_DTYPE_NAMES,
)
from wan.tasks import load_task, preset_names, task_names
from wan.weights.locate import TOKENIZER_FILES, CheckpointFiles

if TYPE_CHECKING:
    import torch

MAX_NAME_BYTES = 255  # of a file, on usual file systems


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return words[text.lower()]


def make_parser() -> argparse.ArgumentParser:
    """All flags. Every default is None: what it stands for depends on the task, and replay must see what was given."""
    parser = Parser(prog="generate.py", description="Make a video with a Wan 2.1 or 2.2 model.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"swan-video {__version__}")
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add(
        "--task",
        metavar="NAME",
        help=f"one of: {', '.join(task_names())}; default {DEFAULT_TASK}, which needs no download",
    )
    add("--prompt", metavar="TEXT", help="what the video shows")
    add("--negative_prompt", metavar="TEXT", help="what it must not show; default: the task's official text")
    add("--image", metavar="FILE", help="image to start from (i2v, flf2v, ti2v)")
    add("--first_frame", metavar="FILE", help="first frame (flf2v); the same as --image")
    add("--last_frame", metavar="FILE", help="last frame (flf2v)")
    add(
        "--size",
        metavar="W*H",
        help="pixels, as 832*480 or 832x480; with an image its area, in the image's aspect ratio",
    )
    add("--frame_num", metavar="N", help="frames, 4n+1")
    add("--trim_first_frames", metavar="N", help="leave out the first N frames, which distilled models can spoil")
    add("--fps", metavar="N", help="frames per second of the file")
    add("--seed", "--base_seed", dest="seed", metavar="N", help="default -1: random, and printed")
    add("--save_file", metavar="FILE", help=".mp4, or .png for one frame; default: a new name in this folder")
    add("--replay", metavar="FILE", help="make the video of this file again; flags given beside it override")
    add(
        "--replay_files",
        action="store_true",
        help="use the checkpoint and the other files that the video names: for videos of your own",
    )

    add = parser.add_argument_group("sampling (defaults: the task's official ones)").add_argument
    add("--sample_solver", metavar="NAME", help=f"one of: {', '.join(SOLVER_NAMES)}")
    add("--sample_steps", metavar="N", help="number of steps")
    add("--sample_shift", metavar="X", help="shift of the noise schedule")
    add(
        "--sample_guide_scale", metavar="X", help="guidance; LOW,HIGH for the two experts of A14B tasks; 1 turns it off"
    )
    add("--preset", metavar="NAME", help=f"settings of a kind of model, one of: {', '.join(preset_names())}")
    add("--boundary_step_index", metavar="N", help="first step of the low-noise expert; default: by the noise level")
    add("--denoising_step_list", metavar="T,T,...", help="timesteps of a step-distilled model, as 1000,750,500,250")

    add = parser.add_argument_group("weights").add_argument
    add("--ckpt_dir", metavar="DIR", help="checkpoint folder, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B")
    for flag, what in (
        ("dit", "the DiT"),
        ("high", "the high-noise expert"),
        ("low", "the low-noise expert"),
        ("vae", "the VAE"),
        ("t5", "the text encoder"),
        ("clip", "the image encoder"),
    ):
        add(f"--{flag}", metavar="FILE", help=f"take {what} from this file")
    add("--tokenizer", metavar="DIR", help="take the tokenizer from this folder")
    for flag, part in GGUF_FLAGS.items():
        add(f"--{flag}", metavar="FILE", help=f"the same as --{part}, for a GGUF file")
    for flag, what in (
        ("lora", "the DiT"),
        ("lora_high", "the high-noise expert alone"),
        ("lora_low", "the low-noise expert alone"),
    ):
        add(f"--{flag}", metavar="FILE[:X]", action="append", help=f"a LoRA for {what}, of strength X; may be repeated")
    add(
        "--gguf_mode",
        metavar="NAME",
        help="quantised weights: resident (dequantised once), stream (at each use, in little memory) or auto (default:"
        " resident where the memory is free)",
    )

    add = parser.add_argument_group("cache: skip what changes little from step to step").add_argument
    for flag, option in CACHE_OPTIONS.items():
        given = {
            "flag": {"action": "store_true", "default": None},
            "bool": {"metavar": "BOOL", "type": _boolean},
            "whole": {"metavar": "N"},
            "number": {"metavar": "X"},
            "name": {"metavar": "NAME"},
            "file": {"metavar": "FILE"},
        }[option.kind]
        add(f"--{flag}", help=option.help, **given)

    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N or mps")
    add(
        "--dtype",
        metavar="NAME",
        help=f"compute type: {', '.join(DTYPE_NAMES)}; auto is the task's, usually bf16, or"
        " fp32 on a CPU without units for bf16",
    )
    add("--convert_model_dtype", action="store_true", default=None, help="the same as --dtype bf16")
    add(
        "--t5_dtype",
        metavar="NAME",
        help=f"compute type of the text encoder: {', '.join(T5_DTYPE_NAMES)}; auto is the task's, whatever --dtype is",
    )
    add("--vae_dtype", metavar="NAME", help=f"compute type of the VAE: {', '.join(VAE_DTYPE_NAMES)}; default fp32")
    add("--attention", metavar="NAME", help="attention back end; default sdpa")
    add(
        "--offload",
        metavar="NAME",
        help="none: all models stay on the device; model: each is released after its stage; block, phase: and the DiT's"
        " blocks, or the three parts of each, come as they are used; auto: the fastest of the last three that fits",
    )
    add(
        "--offload_model",
        metavar="BOOL",
        type=_boolean,
        help="true: --offload auto; false: --offload none; default true, with several processes false where that fits",
    )
    add("--resident_blocks", metavar="N", help="blocks that stay on the device with block and phase; default auto")
    add("--vae_offload", metavar="BOOL", type=_boolean, help="release the VAE after use; default: as the other models")
    add("--t5_cpu", action="store_true", default=None, help="run the text encoder on the CPU")
    add("--vram_gb", metavar="X", help="GPU memory that the plan may use, in GB; default: what is free")
    add("--ram_gb", metavar="X", help="memory of the machine that it may use, in GB; default: what is free")
    add(
        "--vae_tile_px", metavar="N", help="decode in tiles of this many pixels; 0: whole frames; default: 0 if it fits"
    )

    add = parser.add_argument_group("several processes, started by torchrun").add_argument
    add("--ulysses_size", metavar="N", help="share tokens and heads among N (default: all processes that are left)")
    add("--ring_size", metavar="N", help="share tokens among N groups, keys and values going round; default 1")
    add("--cfg_parallel", action="store_true", default=None, help="the two branches of guidance on half of them each")
    add("--dit_fsdp", action="store_true", default=None, help="share the weights of the DiT out among all (FSDP)")
    add("--t5_fsdp", action="store_true", default=None, help="share the weights of the text encoder out among all")
    add("--dist_timeout", metavar="S", help="give up when a process has not answered for S seconds; default 600")

    add = parser.add_argument_group("output").add_argument
    add("--dry_run", action="store_true", help="check the files, print the plan (work, memory, time) and stop")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--quiet", action="store_true", help="no progress and no notes on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit code. Never raises for a failed run.

    Started by torchrun, this is one of several processes that make one video.
    """
    world = World()
    with listening():
        try:
            try:
                world = World.from_environment()
            except ValueError as error:
                return run_command(partial(_refuse, str(error)))
            return run_command(partial(_main, argv, world), world.report)
        finally:
            world.close()


def _refuse(message: str) -> int:
    raise UsageError(message)


def _main(argv: Sequence[str] | None, world: World) -> int:
    args = make_parser().parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}
    notes: list[str] = []
    if args.replay:
        options = replay_options(
            media.read_settings(args.replay), options, files=bool(args.replay_files), warnings=notes
        )
    elif args.replay_files:
        raise UsageError("--replay_files is for --replay FILE")
    request = build_request(options, world.size, args.replay)
    spec = load_task(request.task)
    quiet = args.quiet or world.rank > 0
    if not quiet:
        for warning in (*notes, *request.warnings):
            print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        if world.rank == 0:
            from wan.dry_run import dry_run

            dry_run(request, spec, args.json, world.local_size)
        return 0
    if not quiet:
        print(f"{request.task}, seed {request.seed}", file=sys.stderr)
    seeded = str(options.get("seed")).strip() == str(request.seed)
    report = run(request, spec, quiet=quiet, world=world, seeded=seeded)
    if world.rank == 0:
        print_report(report)
    return 0


def print_report(report: dict[str, Any]) -> None:
    """The one line on stdout."""
    try:
        put(json.dumps(report))
    except SwanError as error:
        raise SwanError(f"{error}; the video is in {report['file']}") from error


def run(
    request: Request, spec: EasyDict, *, quiet: bool = False, world: World | None = None, seeded: bool = False
) -> dict[str, Any]:
    """Make the video and write it to request.save_file. Returns the report that is printed as JSON.

    Once denoising is done, a failure keeps the latents in a file and names it in the SwanError. Of several processes
    each calls this; the first one writes. seeded: the seed is no random one, so all ranks must have the same.
    """
    started = time.perf_counter()
    world = world or World()
    with listening() as signals, signals.held():  # an import that is interrupted may go on half done
        device = check_device(request.device)
        from wan.distributed.parallel import Parallel
        from wan.pipeline import WanPipeline
    if request.cache:
        check_device(request.cache["cache_device"], "cache_device")
    device_type = "cuda" if device.startswith("cuda") else "cpu"
    _start(world, device_type, request, spec, seeded)
    parallel = Parallel(*request.grid, device_type=device_type, local_size=world.local_size)
    if world.size > 1:
        device = f"cuda:{world.local_rank}" if device == "cuda" else device
        request = replace(request, seed=parallel.gather_objects(request.seed)[0])  # a random one: of the first rank
    with listening() as signals, _Progress(quiet, world, signals) as progress:
        pipe = WanPipeline.from_request(replace(request, device=device), spec, parallel)
        request = replace(request, **pipe.decided())
        if world.size > 1:
            _compare_files(world, pipe.files, request)
        progress.expect(pipe.plan)
        if not quiet:
            for note in pipe.notes:
                print(note, file=sys.stderr)
        if world.rank == 0:
            world.at_failure = lambda: None if pipe.latents is None else _keep_latents(pipe.latents, request.save_file)
        try:
            result = pipe(request, progress=progress)
            peaks = parallel.gather_objects(_peak_memory(pipe.device))
            if world.rank > 0:
                return {}
            saving = time.perf_counter()
            world.stage = "save"
            media.write_video(request.save_file, result.frames, request.fps, request.settings())
        except Exception as error:
            latents = getattr(pipe, "latents", None)
            if latents is None or world.rank > 0:
                raise
            world.at_failure = None
            raise SwanError(f"{_describe(error)}; {_keep_latents(latents, request.save_file)}") from error
    cached = {}
    if request.cache:
        cached = {"cache": pipe.cache.telemetry.report()}
        _report_cache(request, pipe.cache, quiet)
    ended = time.perf_counter()
    packed = pipe.placement.packed
    seconds = dict(result.seconds) | {"save": ended - saving, "total": ended - started}
    frames, height, width, _ = result.frames.shape
    return {
        "task": request.task,
        "seed": request.seed,
        "size": f"{width}x{height}",
        "frames": frames,
        "fps": request.fps,
        "steps": request.steps,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "offload": pipe.placement.offload,
        **({"gguf_mode": modes} if (modes := {name: mode for name, mode in packed.items() if mode}) else {}),
        **cached,
        **({"grid": request.grid._asdict(), "peak_by_rank": peaks} if world.size > 1 else {}),
        **{name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]},
        "file": request.save_file,
        "sha256": hashlib.sha256(result.frames.tobytes()).hexdigest(),
    }


def _start(world: World, device_type: str, request: Request, spec: EasyDict, seeded: bool) -> None:
    """Meet the other processes, all of which must have been given the same."""
    try:
        world.start(device_type, request.dist_timeout, request_facts(request, spec, device_type, seeded))
    except Disagreement as error:
        raise UsageError(f"{error}; give all processes the same options") from error
    except RuntimeError as error:
        raise SwanError(one_line(error)) from error


def _compare_files(world: World, files: CheckpointFiles, request: Request) -> None:
    """That all processes have the same checkpoint and LoRAs, before any of it is loaded."""
    from wan.weights.source import open_source

    found = {f"the DiT ({part})": open_source(paths).paths for part, paths in files.dit.items()}
    found |= {"the VAE": open_source(files.vae).paths, "the text encoder": open_source(files.t5).paths}
    found["the tokenizer"] = [path for name in TOKENIZER_FILES if (path := files.tokenizer / name).is_file()]
    if files.clip:
        found["the image encoder"] = open_source(files.clip).paths
    for flag, chosen in request.loras.items():
        found |= {f"--{flag} number {number}": [Path(path)] for number, (path, _) in enumerate(chosen, 1)}
    try:
        world.agree({name: file_fact(paths) for name, paths in found.items()})
    except Disagreement as error:
        raise SwanError(f"{error}; give all processes the same files") from error
    except OSError as error:
        raise SwanError(f"{error.filename}: cannot be read: {error.strerror or one_line(error)}") from error


def _report_cache(request: Request, cache: Any, quiet: bool) -> None:
    """The summary on stderr, and the trace where one is asked for."""
    if not quiet:
        for line in cache.telemetry.summary():
            print(line, file=sys.stderr)
    if trace := request.cache["cache_trace"]:
        header = {"task": request.task, "seed": request.seed, "steps": request.steps, "cache": request.cache}
        try:
            cache.telemetry.write(trace, header)
        except OSError as error:
            raise SwanError(f"--cache_trace: cannot write {trace}: {error.strerror or error}") from error


def _describe(error: Exception) -> str:
    message = one_line(error)
    return message if isinstance(error, SwanError) else f"{type(error).__name__}: {message}"


def _keep_latents(latents: torch.Tensor, save_file: str) -> str:
    """Save what the denoising made, beside the output or in the temporary folder; says where, for the message."""
    for find in (lambda: Path(save_file).parent, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(SwanError, OSError):  # OSError: no temporary folder
            path = _free_name(find(), Path(save_file).name)
            media.save_latents(path, latents)
            return f"the latents are kept in {path}"
    return "the latents could not be saved either"


def _free_name(folder: Path, video: str) -> Path:
    """Where nothing lies yet: the latents of an earlier run stay. A long name is cut, to MAX_NAME_BYTES."""
    for number in itertools.count(1):
        ending = f"{f'-{number}' if number > 1 else ''}.latents.safetensors"
        while len(os.fsencode(video + ending)) > MAX_NAME_BYTES:
            video = video[:-1]
        if not os.path.lexists(folder / (video + ending)):
            return folder / (video + ending)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process so far (resident), and of what torch held on `device`, where that is a GPU."""
    peak = {}
    try:  # Linux; its ru_maxrss would count what the parent process held when it started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        peak["peak_memory_bytes"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        with contextlib.suppress(ImportError):  # Windows has no resource module
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            peak["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


class _Progress:
    """One bar a stage on stderr, of the first rank. The pipeline calls it with (stage, done, total).

    A bar counts from where it begins, so that its rate and what is left are of the stage itself; until the first step
    has ended it shows what the plan expects.
    """

    def __init__(self, quiet: bool, world: World, signals: Signals):
        self.quiet, self.world, self.signals, self.stage, self.bar = quiet, world, signals, None, None
        self.expected: dict[str, float] = {}  # seconds by stage

    def expect(self, plan: Mapping[str, Any]) -> None:
        """By its stages: "encode" is of texts and images, "load" of one expert."""
        seconds = dict(plan.get("seconds", {}))
        if seconds:
            seconds["encode"] = seconds["encode_text"] + seconds.get("encode_image", 0)
            seconds["load"] /= len(plan.get("steps_by_expert", "1"))
        self.expected = seconds

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.signals.check()  # one may have been swallowed
        self.world.stage = stage
        if self.quiet:
            return
        if stage != self.stage:
            self._close()
            self.stage, self.bar = stage, self._begin(stage, done, total)
        self.bar.n = done
        if done > self.bar.initial:
            self.bar.postfix = None
        self.bar.refresh()

    def _begin(self, stage: str, done: int, total: int) -> Any:
        from tqdm import tqdm

        from wan.plan import duration

        left = self.expected.get(stage, 0) * (total - done) / total
        told = f"about {duration(left)} left, by the plan" if left else None
        return tqdm(total=total, initial=done, desc=stage, file=sys.stderr, leave=True, postfix=told)

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
