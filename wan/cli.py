"""The command line: flags -> Request -> run -> exit code. `--help` and refusals of wrong options import no torch.

Exit codes: see `command.py`. Progress and messages go to stderr; stdout gets one JSON line (or the plan).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from wan import __version__, media
from wan.command import Parser, put, run_command
from wan.distributed.launch import Disagreement, World
from wan.distributed.signals import Signals, listening
from wan.errors import SwanError, UsageError, described, one_line
from wan.options import FLAGS, PART_OF, Option, Request, build_request, check_device
from wan.options.alike import file_fact, request_facts
from wan.options.config import config_options
from wan.options.names import LORA_FLAGS, STORED_PICTURES, VIDEO_FLAGS
from wan.options.replay import replay_options
from wan.options.schema import VALUES
from wan.tasks import load_task
from wan.tasks.kinds import kind_of
from wan.unfinished import SUFFIX, FilmFile, read_unfinished
from wan.weights.checkpoint import Checkpoint
from wan.weights.locate import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

    from wan.conditioning.film import Made
    from wan.engine import Event, Video

MAX_NAME_BYTES = 255  # of a file, on usual file systems
# What the command line alone does, beside the options that Python has too.
COMMANDS = {
    "config": Option(
        "path", "options from this JSON or YAML file; flags given beside it override them", "what to make"
    ),
    "config_json": Option(
        "path", "settings from a configuration of LightX2V; flags given beside it override them", "what to make"
    ),
    "replay": Option("path", "make the video of this file again; flags given beside it override", "what to make"),
    "resume": Option(
        "path",
        "go on with a film of several clips, from the folder that its run left",
        "what to make",
        value="NAME.unfinished",
    ),
    "replay_files": Option(
        "flag", "use the checkpoint and the other files that the video names: for videos of your own", "what to make"
    ),
    "dry_run": Option("flag", "check the files, print the plan (work, memory, time) and stop", "output"),
    "json": Option("flag", "print the plan as JSON", "output"),
    "quiet": Option("flag", "no progress and no notes on stderr", "output"),
}


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return words[text.lower()]


def _taken(one: Option) -> dict[str, Any]:
    """What argparse is told of a flag's value."""
    if one.kind == "flag":
        return {"action": "store_true", "default": None}
    value = one.value or VALUES[one.kind]
    if one.kind == "bool":
        return {"metavar": value, "type": _boolean}
    return {"metavar": value, "action": "append" if one.kind == "loras" else "store"}


def make_parser() -> argparse.ArgumentParser:
    """All flags. Every default is None: what it stands for depends on the task, and replay must see what was given."""
    parser = Parser(prog="generate.py", description="Make a video with a Wan 2.1 or 2.2 model.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"swan-video {__version__}")
    add_flags(parser, FLAGS | COMMANDS)
    return parser


def add_flags(parser: argparse.ArgumentParser, flags: Mapping[str, Option]) -> None:
    """Options as flags, in their groups; None where they are not given."""
    groups: dict[str, Any] = {}
    for flag, one in flags.items():
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        names = [f"--{name}" for name in (flag, *one.spelled)]
        groups[one.group].add_argument(*names, dest=flag, help=one.help, **_taken(one))


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
    options = {name: value for name, value in vars(args).items() if name in FLAGS}
    notes: list[str] = []
    if args.resume is not None and args.replay is not None:
        raise UsageError("--resume and --replay contradict each other: give one")
    others = [one for one in ("config", "replay", "resume") if getattr(args, one) is not None]
    if args.config_json is not None and others:
        raise UsageError(f"--config_json and --{others[0]} contradict each other: give one")
    if args.config is not None:
        options = config_options(args.config, options)
    if args.replay is not None:
        options = replay_options(
            media.read_settings(args.replay), options, files=bool(args.replay_files), warnings=notes
        )
    elif args.replay_files:
        raise UsageError("--replay_files is for --replay FILE")
    made = None
    if args.resume is not None:
        settings, made = read_unfinished(args.resume)
        options = _resumed(args.resume, settings, options, notes)
    if args.config_json is not None:
        from wan.compat.lightx2v.config import file_request

        request, found = file_request(args.config_json, options, world.size)
        notes += found
    else:
        request = build_request(options, world.size, args.replay)
    spec = load_task(request.load.task)
    quiet = args.quiet or world.rank > 0
    if not quiet:
        for warning in (*notes, *(request.warnings if args.dry_run else ())):  # else the engine tells them
            print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        if world.rank == 0:
            from wan.dry_run import dry_run

            dry_run(request, spec, args.json, world.local_size)
        return 0
    if not quiet:
        print(f"{request.load.task}, seed {request.sample.seed}", file=sys.stderr)
    seeded = str(options.get("seed")).strip() == str(request.sample.seed)
    report = run(request, spec, quiet=quiet, world=world, seeded=seeded, made=made)
    if world.rank == 0:
        print_report(report)
    return 0


def _resumed(folder: str, settings: dict[str, Any], options: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The options of a film that is gone on with; those given may say how it is computed, not what it shows."""
    given = {name: value for name, value in options.items() if value is not None}
    inputs = (*STORED_PICTURES, *VIDEO_FLAGS, "src_ref_images", *LORA_FLAGS)  # which may have moved
    if other := [name for name in given if PART_OF[name] == "sample" and name not in inputs or name == "save_file"]:
        raise UsageError(f"--resume goes on with the film as it was begun: --{other[0]} cannot be given with it")
    if "ckpt_dir" not in given and isinstance(settings.get("ckpt_dir"), str):
        given["ckpt_dir"] = settings["ckpt_dir"]  # a hub id too: the folder is the user's own
    given["save_file"] = os.path.abspath(folder).removesuffix(SUFFIX)
    return replay_options(settings, given, files=True, warnings=notes)


def print_report(report: dict[str, Any]) -> None:
    """The one line on stdout."""
    try:
        put(json.dumps(report))
    except SwanError as error:
        raise SwanError(f"{error}; the video is in {report['file']}") from error


def run(
    request: Request,
    spec: EasyDict,
    *,
    quiet: bool = False,
    world: World | None = None,
    seeded: bool = False,
    made: Made | None = None,
) -> dict[str, Any]:
    """Make the video and write it to request.output.save_file. Returns the report that is printed as JSON.

    Once denoising is done, a failure keeps the latents in a file and names it in the SwanError. Of several processes
    each calls this; the first one writes. seeded: the seed is no random one, so all ranks must have the same. A film of
    several clips is written clip by clip; made: what there is of it already.
    """
    started = time.perf_counter()
    world = world or World()
    load, output = request.load, request.output
    with listening() as signals, signals.held():  # an import that is interrupted may go on half done
        device = check_device(load.device)
        from wan.distributed.parallel import Parallel
        from wan.engine import Engine
    if request.sample.cache:
        check_device(request.sample.cache["cache_device"], "cache_device")
    device_type = "cuda" if device.startswith("cuda") else "cpu"
    _start(world, device_type, request, spec, seeded)
    parallel = Parallel(*load.grid, device_type=device_type, local_size=world.local_size)
    if world.size > 1:
        device = f"cuda:{world.local_rank}" if device == "cuda" else device
    # One video is made: nothing is gained by what stays.
    load = replace(load, device=device, residency="stage" if load.residency == "auto" else load.residency)
    preview = output.preview if world.rank == 0 else None
    film = None
    if kind_of(spec).clips(spec, request.sample) > 1:
        film = FilmFile(output.save_file, made, is_writer=world.rank == 0)
    with listening() as signals, _Progress(quiet, world, signals, preview) as progress, film or nullcontext():
        engine = Engine.of(load, spec, parallel)

        def kept() -> str | None:
            if film is not None:
                return film.kept()
            return None if engine.latents is None else _keep_latents(engine.latents, output.save_file)

        if world.size > 1:
            compare_files(world, engine.checkpoint, request)
        if world.rank == 0:
            world.at_failure = kept
        try:
            video = engine.make(
                request,
                on_event=progress,
                on_clip=film,
                made=made,
                preview_every=output.preview_every if preview else 0,
            )
            peaks = parallel.gather_objects(_peak_memory(engine.device))
            if world.rank > 0:
                return {}
            saving = time.perf_counter()
            world.stage = "save"
            video.write(output.save_file) if film is None else film.finish(video)
        except Exception as error:
            world.at_failure = None
            if world.rank > 0 or (saved := kept()) is None:
                raise
            raise SwanError(f"{described(error)}; {saved}") from error
    if video.cache is not None:
        _report_cache(video, quiet)
    ended = time.perf_counter()
    report = dict(video.report)
    report["seconds"] |= {"save": round(ended - saving, 3), "total": round(ended - started, 3)}
    return {
        **report,
        **({"grid": load.grid._asdict(), "peak_by_rank": peaks} if world.size > 1 else {}),
        **{name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]},
        "file": output.save_file,
    }


def _start(world: World, device_type: str, request: Request, spec: EasyDict, seeded: bool) -> None:
    """Meet the other processes, all of which must have been given the same."""
    try:
        world.start(device_type, request.load.dist_timeout, request_facts(request, spec, device_type, seeded))
    except Disagreement as error:
        raise UsageError(f"{error}; give all processes the same options") from error
    except RuntimeError as error:
        raise SwanError(one_line(error)) from error


def compare_files(world: World, checkpoint: Checkpoint, request: Request) -> None:
    """That all processes have the same checkpoint and LoRAs, before any of it is loaded."""
    called = {"t5": "the text encoder", "clip": "the image encoder", "wav2vec": "the audio encoder"}
    called |= {"vae": "the VAE", "tae": "the TAE"}
    found = {called.get(name, f"the DiT ({name})"): checkpoint.source(name).paths for name in checkpoint.components}
    tokenizer = checkpoint.files.tokenizer
    found["the tokenizer"] = [path for name in TOKENIZER_FILES if (path := tokenizer / name).is_file()]
    for flag, chosen in request.sample.loras.items():
        found |= {f"--{flag} number {number}": [Path(path)] for number, (path, _) in enumerate(chosen, 1)}
    found |= {f"--{flag}": [Path(path)] for flag in VIDEO_FLAGS if (path := getattr(request.sample, flag))}
    found |= {f"--src_ref_images number {at}": [Path(one)] for at, one in enumerate(request.sample.src_ref_images, 1)}
    try:
        world.agree({name: file_fact(paths) for name, paths in found.items()})
    except Disagreement as error:
        raise SwanError(f"{error}; give all processes the same files") from error
    except OSError as error:
        raise SwanError(f"{error.filename}: cannot be read: {error.strerror or one_line(error)}") from error


def _report_cache(video: Video, quiet: bool) -> None:
    """The summary on stderr, and the trace where one is asked for."""
    request = video.request
    if not quiet:
        for line in video.cache.summary():
            print(line, file=sys.stderr)
    if trace := request.output.cache_trace:
        sample = request.sample
        header = {"task": request.load.task, "seed": sample.seed, "steps": sample.steps, "cache": sample.cache}
        try:
            video.cache.write(trace, header)
        except OSError as error:
            raise SwanError(f"--cache_trace: cannot write {trace}: {error.strerror or error}") from error


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
        import torch

        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


class _Progress:
    """One bar a stage on stderr, of the first rank, and what else the engine tells.

    A bar counts from where it begins, so that its rate and what is left are of the stage itself; until the first step
    has ended it shows what the plan expects.
    """

    def __init__(self, quiet: bool, world: World, signals: Signals, preview: str | None = None):
        self.quiet, self.world, self.signals, self.preview = quiet, world, signals, preview
        self.stage, self.bar = None, None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, event: Event) -> None:
        self.signals.check()  # one may have been swallowed
        if event.kind == "preview":
            from wan.preview import write_preview

            write_preview(self.preview, event.frames)
        elif event.kind in ("note", "warning"):
            self._say(event.text if event.kind == "note" else f"warning: {event.text}")
        else:
            self.world.stage = event.stage
            if not self.quiet:
                self._show(event)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr)

    def _show(self, event: Event) -> None:
        if event.stage != self.stage:
            self._close()
            self.stage, self.bar = event.stage, self._begin(event)
        self.bar.n = event.done
        if event.done > self.bar.initial:
            self.bar.postfix = None
        self.bar.refresh()

    def _begin(self, event: Event) -> Any:
        from tqdm import tqdm

        from wan.plan import duration

        told = f"about {duration(event.left)} left, by the plan" if event.left else None
        return tqdm(total=event.total, initial=event.done, desc=event.stage, file=sys.stderr, leave=True, postfix=told)

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
