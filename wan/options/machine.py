"""What computes: device, types, processes, where weights lie, the cache."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.cache.options import check_coefficients, check_options
from wan.conditioning.sizes import latent_shape
from wan.distributed.grid import Grid, choose_grid
from wan.errors import UsageError
from wan.models.attention_names import ATTENTION_NAMES, AUTO, BACK_END_NAMES, split_names
from wan.options.names import (
    AREA_BELOW_720P,
    DTYPE_NAMES,
    LORA_FLAGS,
    MATMUL_NAMES,
    MAX_RANKS,
    OFFLOAD_NAMES,
    T5_DTYPE_NAMES,
)
from wan.options.schema import Asked
from wan.options.values import absolute, choice, number, or_default, shown, whole


def make_grid(get: Mapping[str, Any], world_size: int) -> Grid:
    sizes = {
        flag: None if get[flag] is None else whole(get[flag], 1, flag, 1, MAX_RANKS)
        for flag in ("ring_size", "ulysses_size")
    }
    for flag in ("dit_fsdp", "t5_fsdp"):
        if get[flag] and world_size == 1:
            raise UsageError(f"--{flag} shares weights out over several processes, there is 1: start with torchrun")
    try:
        return choose_grid(world_size, bool(get["cfg_parallel"]), *sizes.values())
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_grid(at: Asked, is_guided: bool) -> None:
    """That what was checked can be shared out among the processes. is_guided: whether any step has guidance."""
    spec, grid = at.spec, at.done["grid"]
    width, height, frame_num = map(at.done.get, ("width", "height", "frame_num"))
    shape = latent_shape(spec.vae.z_dim, frame_num, height, width, spec.vae_stride[1])
    tokens = math.prod(side // patch for side, patch in zip(shape[1:], spec.dit.patch_size))
    if tokens < grid.sequence:
        raise UsageError(f"{tokens} tokens cannot be shared by {grid.sequence} processes: make a larger video")
    if grid.cfg == 2 and not is_guided:
        raise UsageError(
            "--cfg_parallel shares out the two branches of guidance, which --sample_guide_scale 1 turns off"
        )
    if grid.ulysses > spec.dit.num_heads:
        idle = grid.ulysses - spec.dit.num_heads
        heads = f"{spec.dit.num_heads} heads on --ulysses_size {grid.ulysses}"
        helps = "a --ring_size of 2 or more helps"
        at.warnings.append(f"{heads}: {idle} of these processes have no attention to do; {helps}")


def check_offload(at: Asked, name: str | None) -> str:
    releases = at.get["offload_model"]
    if name is None:
        return "auto" if or_default(releases, at.world_size == 1) else "none"  # the official code's defaults
    name = choice(name, "auto", "offload", OFFLOAD_NAMES)
    if releases is not None and releases != (name != "none"):
        raise UsageError(f"--offload_model {str(releases).lower()} contradicts --offload {name}; give one")
    if at.get["dit_fsdp"] and name in ("block", "phase"):
        raise UsageError(f"--dit_fsdp shares the weights out, and --offload {name} streams them: give one of the two")
    return name


def check_resident_blocks(at: Asked, value: Any) -> int | None:
    if value in (None, "auto"):
        return None
    if at.get["offload"] not in ("block", "phase"):
        raise UsageError("--resident_blocks is for --offload block and phase")
    return whole(value, 0, "resident_blocks", 0, at.spec.dit.num_layers)


def check_budget(value: Any, flag: str) -> int | None:
    if value is None:
        return None
    return int(1e9 * number(value, flag, float, "a number of GB (of 10^9 bytes) above 0", lambda n: 0 < n < math.inf))


def check_device_name(value: Any, flag: str = "device", ranks: int = 1) -> str:
    value = or_default(value, "auto")
    if ranks > 1 and (value == "mps" or str(value).startswith("cuda:")):
        raise UsageError(f"--{flag} {value} is one device, for {ranks} processes; choose auto, cpu or cuda")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", str(value)):
        raise UsageError(f"unknown --{flag} {value!r}; choose one of: auto, cpu, cuda, cuda:N, mps")
    return value


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


def check_dtype(at: Asked) -> tuple[str, bool]:
    """The type asked for, and whether the plan may take another: "auto" is the task's own, or else bf16 for now."""
    dtype, convert = choice(at.get["dtype"], "auto", "dtype", DTYPE_NAMES), at.get["convert_model_dtype"]
    if convert and dtype not in ("auto", "bf16"):
        raise UsageError(f"--convert_model_dtype casts the weights to bf16, which contradicts --dtype {dtype}")
    if dtype != "auto" or convert:
        return "bf16" if convert else dtype, False
    return at.spec.get("dtype", "bf16"), "dtype" not in at.spec


def check_t5_dtype(at: Asked) -> tuple[str, bool]:
    """The text encoder's type, and whether the plan may take another. "auto" is the task's own, or else bf16, whatever
    the DiT's is: fp32 takes 22 GB for UMT5-XXL, whose weights are released in bf16, and fp16 cannot hold its
    activations."""
    dtype = choice(at.get["t5_dtype"], "auto", "t5_dtype", T5_DTYPE_NAMES)
    return (at.spec.get("dtype", "bf16"), "dtype" not in at.spec) if dtype == "auto" else (dtype, False)


def check_attention(at: Asked, given: str | None) -> str:
    """Names with commas between them, of which the first that can be used is."""
    asked = or_default(given, AUTO)
    for name in split_names(asked):
        if name not in ATTENTION_NAMES:
            known = f"{AUTO}, {', '.join(BACK_END_NAMES)}"
            raise UsageError(f"unknown --attention {shown(name)}; choose one of: {known}, or several with commas")
    return asked


def check_matmul(at: Asked, given: Any) -> str:
    """fp8 and int8 are for packed weights and activations in bf16 on a CUDA device."""
    name = choice(given, "bf16", "matmul", MATMUL_NAMES)
    if name not in ("fp8", "int8"):
        return name
    device, dtype = at.done["device"], at.done["dtype"]
    if device not in ("auto", "cuda") and not device.startswith("cuda:"):
        raise UsageError(f"--matmul {name} is for CUDA devices, not --device {device}")
    if dtype != "bf16":
        raise UsageError(f"--matmul {name} takes a CUDA device, and activations in bf16, not in --dtype {dtype}")
    if at.done["gguf_mode"] == "resident":
        raise UsageError(f"--matmul {name} multiplies weights as they are stored, and --gguf_mode resident does not")
    return name


def check_tile(at: Asked, value: Any) -> int | None:
    if value is None:
        return None
    stride = at.spec.vae_stride[1]
    tile = whole(value, 0, "vae_tile_px", 0, 100_000)
    if tile and (tile % stride or tile < 8 * stride):
        raise UsageError(
            f"--vae_tile_px must be 0 (no tiles) or a multiple of {stride} from {8 * stride} up, not {tile}"
        )
    return tile


_BESIDE_MEASURED = ("sample_shift", "sample_guide_scale", "video", *LORA_FLAGS)


def check_cache(at: Asked, steps: int, area: int, from_image: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the cache, and the coefficients that it needs."""
    spec = at.spec
    key = "coefficients_image" if from_image and "coefficients_image" in spec else "coefficients"
    if area > AREA_BELOW_720P and "coefficients_720p" in spec:
        key = "coefficients_720p"
    try:
        given, model = {name: at.get[name] for name in CACHE_OPTIONS}, spec.get(key)
        options, notes = check_options(given, steps, model=model, solver=at.done["solver"])
        found = check_coefficients(options, model, tuple(spec.get("experts", ["model"]))) if options else {}
    except ValueError as error:
        raise UsageError(str(error)) from error
    changed = [name for name in _BESIDE_MEASURED if at.get[name] is not None]
    if given["cache"] is not None and changed:
        notes.append(f"--cache auto: it was measured without --{changed[0]}, beside which it may be worse")
    if options and "|" in (at.done["phases"] or ""):
        raise UsageError("a cache is for runs of one phase: --phases changes what it compares from step to step")
    if options:
        device = check_device_name(options["cache_device"], "cache_device")
        options |= {"cache_device": device, "cache_coefficients": absolute(options["cache_coefficients"])}
    at.warnings += notes
    return options, found
