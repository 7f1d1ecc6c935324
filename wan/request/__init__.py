"""From command-line options to a frozen Request. Every user-facing check and its message lives here. No torch.

A wrong request raises UsageError (exit code 2); a file that is there but unusable raises SwanError (exit code 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wan import __version__
from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.distributed.grid import Grid
from wan.errors import UsageError
from wan.pictures import image_sha256
from wan.request.files import check_ckpt_dir, check_files, check_loras, check_outputs, check_save_file
from wan.request.machine import (
    check_attention,
    check_budget,
    check_cache,
    check_device,
    check_device_name,
    check_dtype,
    check_grid,
    check_offload,
    check_resident_blocks,
    check_t5_dtype,
    check_tile,
    make_grid,
)
from wan.request.options import (
    DEFAULT_TASK,
    FIELD_OF,
    GGUF_MODES,
    KINDS,
    MAX_STEPS,
    OPTIONS,
    SOLVER_NAMES,
    STORED,
    STORED_PICTURES,
    VAE_DTYPE_NAMES,
    LoraChoice,
)
from wan.request.pictures import check_size, read_images
from wan.request.replay import replay_options
from wan.request.sampling import (
    check_boundary_step,
    check_frame_num,
    check_guide_scale,
    check_prompt,
    check_seed,
    check_shift,
    check_step_list,
)
from wan.request.values import absolute, choice, of_kind, or_default, whole
from wan.tasks import load_preset, load_task

__all__ = ["Request", "build_request", "check_device", "check_loras", "replay_options"]


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
    dtype:          compute type of DiT and image encoder: bf16, fp16 or fp32; t5_dtype: of the text encoder;
                    vae_dtype: bf16 or fp32
    auto_dtype:     dtype was not asked for, and the plan may take another, see `wan.plan.settle_dtype`
    files:          single files given in place of the checkpoint's own, by component (see FILE_FLAGS)
    loras:          (absolute path, strength) each, by flag; only the flags that were given
    gguf_mode:      what becomes of quantised weights: dequantised at load (resident) or at each use (stream), or auto
    vae_tile_px:    side of the VAE's tiles, px; 0: whole frames; None: whole frames where these fit, else tiles
    offload:        none (models stay), model (each is released after its stage), block, phase (parts of the DiT come as
                    they are used too), or auto: what fits, but for none
    may_offload:    whether none, where it does not fit, gives way to what does: the default on several processes
    resident_blocks: how many blocks of the DiT stay on the device with block and phase; None: as many as fit
    vae_offload:    whether the VAE is released after use; None: as the other models are
    vram_bytes:     budget of device memory, ram_bytes: of the machine's, for each process; None: what is free
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
    t5_cpu: bool
    vae_dtype: str
    vae_tile_px: int
    t5_dtype: str = "bf16"
    auto_dtype: bool = field(default=False, compare=False)
    vae_tile_px: int | None
    offload: str = "auto"
    may_offload: bool = False
    resident_blocks: int | None = None
    vae_offload: bool | None = None
    vram_bytes: int | None = None
    ram_bytes: int | None = None
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

    def __post_init__(self):
        check_attention(self.attention, self.dtype)

    def settings(self) -> dict[str, Any]:
        """What is stored in the video: options that make it again, under their flags' names, and the images' hashes."""
        values = {name: getattr(self, FIELD_OF.get(name, name), None) for name in STORED}
        values |= self.files | self.loras | {name: self.cache.get(name) for name in CACHE_OPTIONS}
        low, high = self.guide_scale
        values["sample_guide_scale"] = low if low == high else [low, high]
        stored = {name: values[name] for name in STORED if values[name] is not None}
        return {"swan": __version__, **stored, "image_sha256": self.image_sha256}


def build_request(options: Mapping[str, Any] | Any, world_size: int = 1, replayed: str | None = None) -> Request:
    """Check `options` (a mapping or an argparse namespace; None or absent = the task's default) into a Request.

    world_size: the number of processes that make this video together; replayed: the video whose settings are among the
    options. Raises UsageError or SwanError with one line.
    """
    given = dict(options) if isinstance(options, Mapping) else vars(options)
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise UsageError(f"unknown option: {', '.join(unknown)}; options: {', '.join(OPTIONS)}")
    get = {name: of_kind(given.get(name), name, kind) for name, kind in KINDS.items()}
    spec = load_task(get["task"] or DEFAULT_TASK)
    if get["preset"] is not None:
        for name, value in load_preset(get["preset"], spec).items():
            get[name] = or_default(get[name], value)
    warnings: list[str] = []
    images = read_images(spec, get)
    given_images = images if get["image"] or get["first_frame"] else []
    size, width, height = check_size(spec, get["size"], images, warnings)
    step_list = check_step_list(get["denoising_step_list"], get["sample_steps"])
    steps = (
        len(step_list) if step_list else whole(get["sample_steps"], spec.sampling.steps, "sample_steps", 1, MAX_STEPS)
    )
    frame_num = check_frame_num(spec, get["frame_num"])
    trimmed = whole(get["trim_first_frames"], 0, "trim_first_frames", 0, frame_num - 1)
    cache, coefficients = check_cache(spec, get, steps, width * height, bool(images), warnings)
    guide_scale = check_guide_scale(spec, get["sample_guide_scale"])
    grid = make_grid(get, world_size)
    check_grid(grid, spec, (width, height, frame_num), guide_scale, warnings)
    prompt = check_prompt(spec, get["prompt"])
    dtype, auto_dtype = check_dtype(spec, get["dtype"], get["convert_model_dtype"])
    seed = check_seed(get["seed"])
    request = Request(
        task=spec.name,
        prompt=prompt,
        negative_prompt=or_default(get["negative_prompt"], spec.negative_prompt),
        seed=seed,
        size=size,
        width=width,
        height=height,
        frame_num=frame_num,
        fps=whole(get["fps"], spec.sampling.fps, "fps", 1, 240),
        steps=steps,
        shift=check_shift(spec, get["sample_shift"], size),
        guide_scale=guide_scale,
        solver=choice(get["sample_solver"], spec.sampling.solver, "sample_solver", SOLVER_NAMES),
        denoising_step_list=step_list,
        image=images[0][0] if images else None,
        image_option=given_images[0][0] if given_images else None,
        last_image=images[1][0] if len(images) > 1 else None,
        ckpt_dir=check_ckpt_dir(spec, get["ckpt_dir"]),
        ckpt_option=absolute(get["ckpt_dir"]),
        files=check_files(spec, get),
        gguf_mode=choice(get["gguf_mode"], "auto", "gguf_mode", GGUF_MODES),
        save_file=check_save_file(
            get["save_file"], frame_num - trimmed, f"{spec.name}_{width}x{height}_{seed}", prompt
        ),
        device=check_device_name(get["device"], ranks=world_size),
        dtype=dtype,
        auto_dtype=auto_dtype,
        attention=get["attention"] or "sdpa",
        t5_cpu=bool(get["t5_cpu"]),
        t5_dtype=check_t5_dtype(spec, get["t5_dtype"]),
        vae_dtype=choice(get["vae_dtype"], "fp32", "vae_dtype", VAE_DTYPE_NAMES),
        vae_tile_px=check_tile(get["vae_tile_px"], spec.vae_stride[1]),
        offload=check_offload(get, world_size),
        may_offload=world_size > 1 and get["offload"] is None and get["offload_model"] is None,
        resident_blocks=check_resident_blocks(spec, get),
        vae_offload=get["vae_offload"],
        vram_bytes=check_budget(get["vram_gb"], "vram_gb"),
        ram_bytes=check_budget(get["ram_gb"], "ram_gb"),
        boundary_step_index=check_boundary_step(spec, get["boundary_step_index"], steps),
        trim_first_frames=trimmed,
        loras=check_loras(spec, get),
        grid=grid,
        dit_fsdp=bool(get["dit_fsdp"]),
        t5_fsdp=bool(get["t5_fsdp"]),
        dist_timeout=whole(get["dist_timeout"], 600, "dist_timeout", 1, 86_400),
        cache=cache,
        cache_coefficients=coefficients,
        image_sha256={flag: image_sha256(path) for flag, (path, _, _) in zip(STORED_PICTURES, given_images)},
        warnings=tuple(warnings),
    )
    loras = [(flag, path) for flag, chosen in request.loras.items() for path, _ in chosen]
    pictures = [("image", request.image), ("last_frame", request.last_image)]
    coefficients_file = ("cache_coefficients", cache.get("cache_coefficients"))
    inputs = [*pictures, *loras, *request.files.items(), ("ckpt_dir", request.ckpt_dir), coefficients_file]
    outputs = {"save_file": request.save_file, "cache_trace": cache.get("cache_trace")}
    check_outputs(outputs, [*inputs, ("replay", replayed)])
    return request
