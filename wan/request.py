"""From command-line options to a frozen Request. Every user-facing check and its message lives here. No torch.

A wrong request raises UsageError (exit code 2); a file that is there but unusable raises SwanError (exit code 1).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easydict import EasyDict

from cache.options import OPTIONS as CACHE_OPTIONS
from cache.options import POLICIES as CACHES
from cache.options import check_coefficients, check_options
from distributed.grid import Grid, choose_grid
from wan import __version__
from wan.conditioning.sizes import i2v_size, latent_frames, latent_shape, ti2v_size
from wan.errors import SwanError, UsageError
from wan.media import read_image
from wan.tasks import embedded_checkpoint, grid_px, load_preset, load_task

DEFAULT_TASK = "t2v-tiny"
SOLVER_NAMES = ("unipc", "dpm++", "euler")
DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32")
VAE_DTYPE_NAMES = ("fp32", "bf16")
FILE_FLAGS = ("dit", "high", "low", "vae", "t5", "tokenizer", "clip")
GGUF_FLAGS = {"gguf": "dit", "gguf_high": "high", "gguf_low": "low", "t5_gguf": "t5"}  # -> the component they replace
LORA_FLAGS = {"lora": None, "lora_high": "high", "lora_low": "low"}  # -> the expert that they are for, None: each
GGUF_MODES = ("auto", "resident", "stream")
CACHE_FILES = ("cache_coefficients", "cache_trace")
PATH_OPTIONS = ("ckpt_dir", *FILE_FLAGS, *GGUF_FLAGS, *CACHE_FILES, "image", "first_frame", "last_frame", "save_file")
LoraChoice = tuple[tuple[str, float], ...]  # (absolute path, strength) each
MAX_PROMPT_CHARS = 10_000  # the prompt travels in the mp4; models read 512 tokens at most
MAX_SEED = 2**63 - 1
AREA_BELOW_720P = 832 * 624  # px

# How several processes share the work. They change nothing in the video, which does not store them.
RANK_OPTIONS = ("ulysses_size", "ring_size", "cfg_parallel", "dit_fsdp", "t5_fsdp", "dist_timeout")
MAX_RANKS = 4096
# Options a Request is built from. cli.py has a flag for each; replay and Python callers give the same names.
OPTIONS = (
    *("task", "size", "frame_num", "fps", "ckpt_dir", *FILE_FLAGS, *GGUF_FLAGS, "gguf_mode", *LORA_FLAGS),
    *("prompt", "negative_prompt", "seed"),
    *("image", "first_frame", "last_frame", "sample_solver", "sample_steps", "sample_shift", "sample_guide_scale"),
    *("preset", "boundary_step_index", "trim_first_frames"),
    *("denoising_step_list", "save_file", "offload_model", "t5_cpu", "convert_model_dtype", "device", "dtype"),
    *("attention", "vae_dtype", "vae_tile_px"),
    *CACHE_OPTIONS,
    *RANK_OPTIONS,
)

# Fields of Request that are not called like their option.
FIELD_OF = {
    "sample_solver": "solver",
    "sample_steps": "steps",
    "sample_shift": "shift",
    "image": "image_option",
    "last_frame": "last_image",
    "ckpt_dir": "ckpt_option",
}


@dataclass(frozen=True)
class Request:
    """One video to make, with every default filled in and everything checked.

    width, height:  px of the video; for a video that starts from an image they follow the image's aspect ratio
    size:           what was asked for, "W*H"; with an image only its area counts
    guide_scale:    (low-noise, high-noise); twice the same number for a task with one expert
    boundary_step_index: the first step of the low-noise expert; None: by the noise level
    trim_first_frames: so many frames at the start of the video are left out
    image:          the (first) image, absolute path, or None; last_image: the last frame of flf2v
    image_option:   the image that the user gave (None: none, or the one that comes with an embedded task)
    ckpt_dir:       folder or hub id; ckpt_option: what the user gave (None: the embedded checkpoint)
    dtype:          compute type of DiT and encoders: bf16, fp16 or fp32; vae_dtype: bf16 or fp32
    files:          single files given in place of the checkpoint's own, by component (see FILE_FLAGS)
    loras:          (absolute path, strength) each, by flag; only the flags that were given
    gguf_mode:      what becomes of quantised weights: dequantised at load (resident) or at each use (stream), or auto
    save_file:      absolute path of the mp4 or PNG
    grid:           processes that share the work: cfg x ring x ulysses; dist_timeout: how long they wait for one, s
    dit_fsdp:       whether they share out the weights of the DiT; t5_fsdp: of the text encoder
    cache:          options of the cache by their flags, {} for none; cache_coefficients: what its policy needs
    warnings:       lines to show before the run
    """

    task: str
    prompt: str
    negative_prompt: str
    seed: int
    size: str
    width: int
    height: int
    frame_num: int
    fps: int
    steps: int
    shift: float
    guide_scale: tuple[float, float]
    solver: str
    denoising_step_list: tuple[float, ...] | None
    image: str | None
    image_option: str | None
    last_image: str | None
    ckpt_dir: str
    ckpt_option: str | None
    files: dict[str, str]
    gguf_mode: str
    save_file: str
    device: str
    dtype: str
    attention: str
    offload_model: bool
    t5_cpu: bool
    vae_dtype: str
    vae_tile_px: int
    grid: Grid = Grid()
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    dist_timeout: int = 600
    boundary_step_index: int | None = None
    trim_first_frames: int = 0
    loras: dict[str, LoraChoice] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    cache_coefficients: dict[str, Any] = field(default_factory=dict)
    image_sha256: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """What is stored in the video: options that make it again, under their flags' names, and the images' hashes."""
        left_out = {*CACHE_OPTIONS, *RANK_OPTIONS, *(["offload_model"] if self.grid.size > 1 else [])}
        plain = [name for name in OPTIONS if name not in left_out]
        values = {name: getattr(self, FIELD_OF.get(name, name), None) for name in plain}
        values |= self.files | self.cache | self.loras
        low, high = self.guide_scale
        values |= {"sample_guide_scale": low if low == high else [low, high], "save_file": None, "cache_trace": None}
        stored = {name: value for name, value in values.items() if value is not None}
        return {"swan": __version__, **stored, "image_sha256": self.image_sha256}


def replay_options(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a stored run, overridden by those `given` now (not None).

    Raises SwanError when an image changed since then, unless it is given anew.
    """
    options = {name: value for name, value in settings.items() if name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if "first_frame" in given:
        given.setdefault("image", given.pop("first_frame"))
    if "preset" in given:
        spec = load_task(given.get("task", options.get("task", DEFAULT_TASK)))
        given = load_preset(given["preset"], spec) | given
    for one, other in (("sample_steps", "denoising_step_list"), ("denoising_step_list", "sample_steps")):
        if one in given:  # each says how many steps there are
            options.pop(other, None)
    for flag in GGUF_FLAGS.keys() & given:
        options.pop(GGUF_FLAGS[flag], None)
    if any(given.get(name) and not options.get(name) for name in CACHES):  # another cache, with its own settings
        options = {name: value for name, value in options.items() if name not in CACHE_OPTIONS}
    for flag, digest in settings.get("image_sha256", {}).items():
        if flag in given:
            continue
        path = options.get(flag, "")
        if not Path(path).is_file():
            raise UsageError(f"the image of the stored run is gone: {path}; give it with --{flag}")
        if _sha256(path) != digest:
            raise SwanError(f"the image changed since the stored run: {path}; give --{flag} to use it all the same")
    return {**options, **given}


def build_request(options: Mapping[str, Any] | Any, world_size: int = 1) -> Request:
    """Check `options` (a mapping or an argparse namespace; None or absent = the task's default) into a Request.

    world_size: the number of processes that make this video together. Raises UsageError or SwanError with one line.
    """
    given = dict(options) if isinstance(options, Mapping) else vars(options)
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise UsageError(f"unknown option: {', '.join(unknown)}; options: {', '.join(OPTIONS)}")
    get = {name: given.get(name) for name in OPTIONS}
    for name in PATH_OPTIONS:
        get[name] = get[name] and os.path.expanduser(get[name])
    spec = load_task(get["task"] or DEFAULT_TASK)
    if get["preset"] is not None:
        for name, value in load_preset(get["preset"], spec).items():
            get[name] = _or(get[name], value)
    warnings: list[str] = []
    images = _images(spec, get)
    given_images = images if get["image"] or get["first_frame"] else []
    size, width, height = _size(spec, get["size"], images, warnings)
    step_list = _step_list(get["denoising_step_list"], get["sample_steps"])
    steps = len(step_list) if step_list else _whole(get["sample_steps"], spec.sampling.steps, "sample_steps", 1, 1000)
    frame_num = _frame_num(spec, get["frame_num"])
    trimmed = _whole(get["trim_first_frames"], 0, "trim_first_frames", 0, frame_num - 1)
    cache, coefficients = _cache(spec, get, steps, width * height, bool(images), warnings)
    guide_scale = _guide_scale(spec, get["sample_guide_scale"])
    grid = _grid(get, world_size)
    _check_grid(grid, spec, (width, height, frame_num), guide_scale, warnings)
    prompt = _prompt(spec, get["prompt"])
    seed = _seed(get["seed"])
    return Request(
        task=spec.name,
        prompt=prompt,
        negative_prompt=_text(_or(get["negative_prompt"], spec.negative_prompt), "negative_prompt"),
        seed=seed,
        size=size,
        width=width,
        height=height,
        frame_num=frame_num,
        fps=_whole(get["fps"], spec.sampling.fps, "fps", 1, 240),
        steps=steps,
        shift=_shift(spec, get["sample_shift"], size),
        guide_scale=guide_scale,
        solver=_choice(get["sample_solver"], spec.sampling.solver, "sample_solver", SOLVER_NAMES),
        denoising_step_list=step_list,
        image=images[0][0] if images else None,
        image_option=given_images[0][0] if given_images else None,
        last_image=images[1][0] if len(images) > 1 else None,
        ckpt_dir=_ckpt_dir(spec, get["ckpt_dir"]),
        ckpt_option=_absolute(get["ckpt_dir"]),
        files=_files(spec, get),
        gguf_mode=_choice(get["gguf_mode"], "auto", "gguf_mode", GGUF_MODES),
        save_file=_save_file(get["save_file"], frame_num - trimmed, f"{spec.name}_{width}x{height}_{seed}", prompt),
        device=_device(get["device"], ranks=world_size),
        dtype=_dtype(spec, get["dtype"], get["convert_model_dtype"]),
        attention=get["attention"] or "sdpa",
        offload_model=_or(get["offload_model"], world_size == 1),
        t5_cpu=bool(get["t5_cpu"]),
        vae_dtype=_choice(get["vae_dtype"], "fp32", "vae_dtype", VAE_DTYPE_NAMES),
        vae_tile_px=_tile(get["vae_tile_px"], spec.vae_stride[1]),
        boundary_step_index=_boundary_step(spec, get["boundary_step_index"], steps),
        trim_first_frames=trimmed,
        loras=check_loras(spec, get),
        grid=grid,
        dit_fsdp=bool(get["dit_fsdp"]),
        t5_fsdp=bool(get["t5_fsdp"]),
        dist_timeout=_whole(get["dist_timeout"], 600, "dist_timeout", 1, 86_400),
        cache=cache,
        cache_coefficients=coefficients,
        image_sha256={flag: _sha256(path) for flag, (path, _, _) in zip(("image", "last_frame"), given_images)},
        warnings=tuple(warnings),
    )


def check_loras(spec: EasyDict, get: Mapping[str, Any]) -> dict[str, LoraChoice]:
    """What `get` has under the flags of LORA_FLAGS, where it has something.

    A LoRA is PATH or PATH:STRENGTH, or a pair of both; a flag takes one or a list. Raises UsageError, also for a file
    that is not there; what is in the files is not looked at.
    """
    loras: dict[str, LoraChoice] = {}
    for flag, expert in LORA_FLAGS.items():
        value = get.get(flag)
        if not value:
            continue
        if expert and "experts" not in spec:
            raise UsageError(f"--{flag} is for tasks with two experts; {spec.name} has one: use --lora")
        is_one = isinstance(value, str) or (len(value) == 2 and isinstance(value[1], (int, float)))
        loras[flag] = tuple(_lora(one, flag) for one in ([value] if is_one else value))
    return loras


def check_device(name: str, flag: str = "device") -> str:
    """The torch device for --`flag` NAME ("auto": the first accelerator, else the CPU). Imports torch.

    Raises UsageError when this machine does not have it.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "mps" if has_mps else "cpu"
    there = ["cpu", *(f"cuda:{index}" for index in range(count)), *(["mps"] if has_mps else [])]
    if name not in there and not (name == "cuda" and count):
        raise UsageError(f"--{flag} {name} is not on this machine; there is: {', '.join(there)}")
    return name


# Text and numbers


def _prompt(spec: EasyDict, prompt: str | None) -> str:
    prompt = _text(_or(prompt, spec.get("prompt", "")), "prompt")
    if not prompt.strip():
        raise UsageError("the prompt is empty: give --prompt TEXT")
    return prompt


def _or(value: Any, default: Any) -> Any:
    """`value`, or the default where no value was given; unlike `or`, an empty text or a 0 counts as given."""
    return default if value is None else value


def _text(text: Any, flag: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"--{flag} must be text, not {text!r}")
    if len(text) > MAX_PROMPT_CHARS:
        raise UsageError(f"--{flag} has {len(text)} characters; at most {MAX_PROMPT_CHARS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--{flag} is not valid UTF-8 text") from error
    return text


def _number(value: Any, flag: str, convert: Callable[[Any], Any], allowed: str, fits: Callable[[Any], bool]) -> Any:
    """`value` as a number that `fits`. Flags arrive as text, Python callers and replay give numbers."""
    try:
        if isinstance(value, bool) or (convert is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"--{flag} must be {allowed}, not {value!r}") from error
    if not fits(number):
        raise UsageError(f"--{flag} must be {allowed}, not {value}")
    return number


def _whole(value: Any, default: int, flag: str, least: int, most: int) -> int:
    allowed = f"a whole number from {least} to {most}"
    return _number(_or(value, default), flag, int, allowed, lambda n: least <= n <= most)


def _frame_num(spec: EasyDict, value: Any) -> int:
    least = 5 if spec.kind == "flf2v" else 1  # flf2v needs a first and a last latent frame
    frame_num = _whole(value, spec.sampling.frame_num, "frame_num", least, 100_000)
    try:
        latent_frames(frame_num)
    except UsageError as error:
        raise UsageError(f"--frame_num: {error}") from error
    return frame_num


def _seed(value: Any) -> int:
    allowed = f"a whole number from 0 to {MAX_SEED}, or -1 for a random one"
    seed = _number(_or(value, -1), "seed", int, allowed, lambda n: -1 <= n <= MAX_SEED)
    return secrets.randbelow(2**32) if seed == -1 else seed


def _shift(spec: EasyDict, value: Any, size: str) -> float:
    if value is None:
        at_480p = size in ("832*480", "480*832")
        value = spec.sampling.get("shift_480p", spec.sampling.shift) if at_480p else spec.sampling.shift
    return _number(value, "sample_shift", float, "a number above 0", lambda n: 0 < n < math.inf)


def _guide_scale(spec: EasyDict, value: Any) -> tuple[float, float]:
    value = _or(value, spec.sampling.guide_scale)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if len(parts) > 2 or (len(parts) == 2 and "experts" not in spec):
        allowed = "one number, or LOW,HIGH" if "experts" in spec else "one number (this task has one expert)"
        raise UsageError(f"--sample_guide_scale must be {allowed}, not {value!r}")
    allowed = "a number of at least 0"
    scales = [_number(part, "sample_guide_scale", float, allowed, lambda n: 0 <= n < math.inf) for part in parts]
    return scales[0], scales[-1]


def _step_list(value: Any, steps: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    allowed = "falling timesteps from at most 1000 to above 0, such as 1000,750,500,250"
    listed = [_number(part, "denoising_step_list", float, allowed, lambda n: 0 < n <= 1000) for part in parts]
    if not listed or any(later >= earlier for earlier, later in zip(listed, listed[1:])):
        raise UsageError(f"--denoising_step_list must be {allowed}, not {value!r}")
    if steps is not None and str(steps) != str(len(listed)):
        raise UsageError(f"--sample_steps {steps} contradicts --denoising_step_list, which has {len(listed)} steps")
    return tuple(listed)


def _boundary_step(spec: EasyDict, value: Any, steps: int) -> int | None:
    if value is None:
        return None
    if "experts" not in spec:
        raise UsageError(f"--boundary_step_index is for tasks with two experts; {spec.name} has one")
    return _whole(value, 0, "boundary_step_index", 0, steps)


def _choice(value: Any, default: str, flag: str, allowed: tuple[str, ...]) -> str:
    value = _or(value, default)
    if value not in allowed:
        raise UsageError(f"unknown --{flag} {value!r}; choose one of: {', '.join(allowed)}")
    return value


def _grid(get: Mapping[str, Any], world_size: int) -> Grid:
    sizes = {
        flag: None if get[flag] is None else _whole(get[flag], 1, flag, 1, MAX_RANKS)
        for flag in ("ring_size", "ulysses_size")
    }
    for flag in ("dit_fsdp", "t5_fsdp"):
        if get[flag] and world_size == 1:
            raise UsageError(f"--{flag} shares weights out over several processes, there is 1: start with torchrun")
    try:
        return choose_grid(world_size, bool(get["cfg_parallel"]), *sizes.values())
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_grid(
    grid: Grid, spec: EasyDict, size: tuple[int, int, int], guide_scale: tuple[float, float], warnings: list[str]
) -> None:
    width, height, frame_num = size
    shape = latent_shape(spec.vae.z_dim, frame_num, height, width, spec.vae_stride[1])
    tokens = math.prod(side // patch for side, patch in zip(shape[1:], spec.dit.patch_size))
    if tokens < grid.sequence:
        raise UsageError(f"{tokens} tokens cannot be shared by {grid.sequence} processes: make a larger video")
    if grid.cfg == 2 and all(scale == 1 for scale in guide_scale):
        raise UsageError(
            "--cfg_parallel shares out the two branches of guidance, which --sample_guide_scale 1 turns off"
        )
    if grid.ulysses > spec.dit.num_heads:
        idle = grid.ulysses - spec.dit.num_heads
        heads = f"{spec.dit.num_heads} heads on --ulysses_size {grid.ulysses}"
        warnings.append(f"{heads}: {idle} of these processes have no attention to do; a --ring_size of 2 or more helps")


def _device(value: Any, flag: str = "device", ranks: int = 1) -> str:
    value = _or(value, "auto")
    if ranks > 1 and (value == "mps" or str(value).startswith("cuda:")):
        raise UsageError(f"--{flag} {value} is one device, for {ranks} processes; choose auto, cpu or cuda")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", str(value)):
        raise UsageError(f"unknown --{flag} {value!r}; choose one of: auto, cpu, cuda, cuda:N, mps")
    return value


def _dtype(spec: EasyDict, value: Any, convert: bool | None) -> str:
    """The type asked for; "auto" is the task's own, bf16 unless its file says otherwise."""
    dtype = _choice(value, "auto", "dtype", DTYPE_NAMES)
    if convert and dtype not in ("auto", "bf16"):
        raise UsageError(f"--convert_model_dtype casts the weights to bf16, which contradicts --dtype {dtype}")
    if dtype == "auto":
        return "bf16" if convert else spec.get("dtype", "bf16")
    return dtype


def _tile(value: Any, stride: int) -> int:
    tile = _whole(value, 0, "vae_tile_px", 0, 100_000)
    if tile and (tile % stride or tile < 8 * stride):
        raise UsageError(
            f"--vae_tile_px must be 0 (no tiles) or a multiple of {stride} from {8 * stride} up, not {tile}"
        )
    return tile


def _cache(
    spec: EasyDict, get: Mapping[str, Any], steps: int, area: int, from_image: bool, warnings: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the cache, and the coefficients that it needs."""
    key = "coefficients_image" if from_image and "coefficients_image" in spec else "coefficients"
    if area > AREA_BELOW_720P and "coefficients_720p" in spec:
        key = "coefficients_720p"
    try:
        options, notes = check_options({name: get[name] for name in CACHE_OPTIONS}, steps)
        found = check_coefficients(options, spec.get(key), tuple(spec.get("experts", ["model"]))) if options else {}
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options:
        device = _device(options["cache_device"], "cache_device")
        options |= {"cache_device": device} | {name: _absolute(options[name]) for name in CACHE_FILES}
        if trace := options["cache_trace"]:
            if os.path.isdir(trace):
                raise UsageError(f"--cache_trace: {trace} is a folder")
            if not Path(trace).absolute().parent.is_dir():
                raise UsageError(f"--cache_trace: no folder {Path(trace).absolute().parent}")
            if get["save_file"] and Path(trace).absolute() == Path(get["save_file"]).absolute():
                raise UsageError(f"--cache_trace and --save_file both name {trace}")
    warnings += notes
    return options, found


# Pictures and sizes


def _images(spec: EasyDict, get: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(absolute path, width, height) of the first and the last image; each is read once here, to be sure it can be."""
    if get["image"] and get["first_frame"] and get["image"] != get["first_frame"]:
        raise UsageError("--image and --first_frame both name the first image; give one")
    first, last = get["image"] or get["first_frame"], get["last_frame"]
    if spec.kind == "t2v" and (first or last):
        raise UsageError(f"{spec.name} makes video from text alone; for an image use an i2v, flf2v or ti2v task")
    if not first and "image" in spec:
        first = str(embedded_checkpoint(spec) / spec.image)
    if spec.kind == "i2v" and not first:
        raise UsageError(f"{spec.name} needs --image FILE")
    if spec.kind == "flf2v" and not (first and last):
        raise UsageError(f"{spec.name} needs --first_frame FILE and --last_frame FILE")
    if spec.kind != "flf2v" and last:
        raise UsageError(f"--last_frame is for flf2v tasks, not for {spec.name}")
    images = []
    for path in filter(None, (first, last)):
        height, width, _ = read_image(path).shape
        images.append((str(Path(path).resolve()), width, height))
    return images


def _size(spec: EasyDict, value: Any, images: list, warnings: list[str]) -> tuple[str, int, int]:
    """(asked "W*H", width, height) in px."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[*xX]\s*(\d{1,5})\s*", str(_or(value, spec.sampling.size)))
    if not match:
        raise UsageError(f"--size must be WIDTH*HEIGHT or WIDTHxHEIGHT in pixels, such as 832*480, not {value!r}")
    width, height = int(match[1]), int(match[2])
    grid = grid_px(spec)
    if width % grid or height % grid or not width or not height:
        near = "*".join(str(max(grid, round(side / grid) * grid)) for side in (width, height))
        raise UsageError(
            f"--size {width}*{height}: {spec.name} needs multiples of {grid} pixels; the nearest is {near}"
        )
    size = f"{width}*{height}"
    if spec.sampling.sizes and size not in spec.sampling.sizes:
        warnings.append(f"size {size} is not an official size of {spec.name} ({', '.join(spec.sampling.sizes)})")
    if images:
        _, image_width, image_height = images[0]
        if spec.kind == "ti2v":
            height, width = ti2v_size(width * height, image_height, image_width, multiple=grid)
        else:
            stride = spec.vae_stride[1]
            height, width = i2v_size(width * height, image_height, image_width, stride=stride, patch=grid // stride)
    return size, width, height


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# Files


def _ckpt_dir(spec: EasyDict, value: str | None) -> str:
    if not value:
        embedded = embedded_checkpoint(spec)
        if embedded is None:
            where = " or ".join(spec.hub)
            raise UsageError(f"{spec.name} needs --ckpt_dir: a folder with the files of {where}, or that hub id itself")
        return str(embedded)
    if not os.path.exists(value) and not _is_hub_id(value):
        raise UsageError(f"--ckpt_dir: no folder {value}")
    if os.path.isfile(value):
        raise UsageError(f"--ckpt_dir takes a folder or a hub id; for the single file {value} use --dit, --vae or --t5")
    return _absolute(value)


def _is_hub_id(value: str) -> bool:
    """OWNER/NAME or OWNER/NAME@REVISION, and not a path below a folder that exists here (that is a mistyped path)."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", value)) and not os.path.exists(value.split("/")[0])


def _absolute(value: str | None) -> str | None:
    return str(Path(value).resolve()) if value and os.path.exists(value) else value or None


def _files(spec: EasyDict, get: Mapping[str, Any]) -> dict[str, str]:
    """Single files in place of the checkpoint's own, by component, absolute."""
    allowed = ["vae", "t5", "tokenizer", *(["high", "low"] if "experts" in spec else ["dit"])] + ["clip"] * (
        "clip" in spec.files
    )
    files: dict[str, str] = {}
    for flag in (*FILE_FLAGS, *GGUF_FLAGS):
        part, path = GGUF_FLAGS.get(flag, flag), get[flag]
        if not path:
            continue
        if part not in allowed:
            flags = (one for one in (*FILE_FLAGS, *GGUF_FLAGS) if GGUF_FLAGS.get(one, one) in allowed)
            usable = ", ".join(f"--{one}" for one in flags)
            raise UsageError(f"--{flag} has no meaning for {spec.name}; single files it takes: {usable}")
        if not os.path.exists(path):
            raise UsageError(f"--{flag}: no file {path}")
        if flag == "tokenizer" and not os.path.isdir(path):
            raise UsageError(f"--tokenizer takes a folder, and {path} is a file")
        if part in files:
            raise UsageError(f"--{part} and --{flag} both name a file for the same component; give one")
        if flag in GGUF_FLAGS and not _is_gguf(path):
            raise UsageError(f"--{flag}: {path} is not a GGUF file; for other formats use --{part}")
        files[part] = _absolute(path)
    return files


def _lora(value: str | tuple[str, float], flag: str) -> tuple[str, float]:
    """(absolute path, strength). A path that exists is meant as it is, colons and all."""
    path, strength = (value, 1.0) if isinstance(value, str) else value
    path = os.path.expanduser(path)
    if isinstance(value, str) and not os.path.exists(path):
        head, colon, tail = path.rpartition(":")
        if colon and (os.path.exists(head) or _is_number(tail)):
            path, strength = head, tail
    if not os.path.exists(path):
        raise UsageError(f"--{flag}: no file {path}")
    if not _is_number(strength):
        raise UsageError(f"--{flag} {path}: the strength must be a number, not {strength!r}")
    return str(Path(path).resolve()), float(strength)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, bool)
    except (TypeError, ValueError):
        return False


def _is_gguf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _save_file(value: str | None, frame_num: int, stem: str, prompt: str) -> str:
    """Absolute path of the output, in a folder that can be written to."""
    if not value:
        slug = re.sub(r"[^\w-]+", "_", prompt)[:40].strip("_")
        extension = "png" if frame_num == 1 else "mp4"
        value = "_".join(filter(None, (stem, slug, time.strftime("%Y%m%d-%H%M%S")))) + f".{extension}"
    path = Path(value).absolute()
    if path.suffix.lower() not in (".mp4", ".png"):
        raise UsageError(f"--save_file must end in .mp4 (or .png for one frame), not {path.name!r}")
    if path.suffix.lower() == ".png" and frame_num != 1:
        raise UsageError(f"--save_file: a PNG holds one frame, and {frame_num} are asked; use .mp4 or --frame_num 1")
    if os.path.isdir(path):
        raise UsageError(f"--save_file: {path} is a folder")
    if not os.path.isdir(path.parent):
        raise UsageError(f"--save_file: no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent), contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails where the name itself is too long
    except OSError as error:
        raise UsageError(f"--save_file: cannot write to {path.parent}: {error.strerror}") from error
    return str(path)
