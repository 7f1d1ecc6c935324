"""The plan of a run, printed by --dry_run: files, shapes, steps, work and memory. Loads nothing, imports no torch.

Everything is computed from the shapes in the task file. Parameters and FLOPs are exact counts; memory is an estimate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from easydict import EasyDict

from distributed.grid import attention_bytes, split
from wan.conditioning.sizes import latent_shape
from wan.errors import SwanError
from wan.request import Request
from wan.weights.locate import locate

if TYPE_CHECKING:
    import torch

CLIP_PARAMS = 632_076_800  # ViT-H/14 of open-clip, the image tower alone
CLIP_DIM, CLIP_TOKENS = 1280, 257
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Full-resolution feature maps (4 frames each) alive at the peak of VAE decoding: layer inputs and outputs, the
# upsampled map of twice the width, and the two frames that every causal convolution keeps.
VAE_LIVE_MAPS = 16


def make_plan(request: Request, spec: EasyDict) -> dict[str, Any]:
    """The plan as plain JSON data. `files` rows have bytes = None for a file that is missing.

    work: TFLOP of one forward by part, and of the run; memory: bytes by stage.
    """
    shape = latent_shape(spec.vae.z_dim, request.frame_num, request.height, request.width, spec.vae_stride[1])
    tokens = math.prod(size // patch for size, patch in zip(shape[1:], spec.dit.patch_size))
    high_steps = high_noise_steps(request, spec)
    low_scale, high_scale = request.guide_scale
    forwards = high_steps * (1 if high_scale == 1 else 2) + (request.steps - high_steps) * (1 if low_scale == 1 else 2)
    work = forward_flops(spec, tokens)
    total = sum(work.values())
    plan = {
        "task": spec.name,
        "title": spec.title,
        "size": f"{request.width}x{request.height}",
        "frames": request.frame_num,
        "fps": request.fps,
        "seed": request.seed,
        "solver": request.solver,
        "shift": request.shift,
        "guide_scale": list(request.guide_scale),
        "files": find_files(request, spec),
        "latent_shape": list(shape),
        "tokens": tokens,
        "steps": request.steps,
        "forwards": forwards,
        "tflop_per_forward": {name: flops / 1e12 for name, flops in work.items()} | {"total": total / 1e12},
        "tflop_total": forwards * total / 1e12,
        "parameters": parameters(spec),
        "memory_bytes": memory_by_stage(request, spec, shape, tokens),
        "save_file": request.save_file,
    }
    if "experts" in spec:
        plan["steps_by_expert"] = {"high": high_steps, "low": request.steps - high_steps}
    if request.grid.size > 1:
        plan["ranks"] = share_of_ranks(request, spec, tokens)
    return plan


def share_of_ranks(request: Request, spec: EasyDict, tokens: int) -> dict[str, Any]:
    """How the work is shared among processes. sent_bytes: by a rank for one forward, on average, by axis."""
    grid, dit = request.grid, spec.dit
    sent = attention_bytes(grid, tokens, dit.dim, DTYPE_BYTES[request.dtype])
    return {
        "grid": grid._asdict(),
        "tokens": split(tokens, grid.sequence),
        "heads": split(dit.num_heads, grid.ulysses),
        "sent_bytes": {axis: round(size) * dit.num_layers for axis, size in sent.items()},
        "weights_shared": [
            name for name, is_shared in (("dit", request.dit_fsdp), ("t5", request.t5_fsdp)) if is_shared
        ],
    }


def missing_files(plan: Mapping[str, Any]) -> list[str]:
    """Paths in the plan that do not exist here. Files of a hub id are not looked for."""
    return [row["path"] for row in plan["files"] if row["bytes"] is None and not row["hub"]]


def high_noise_steps(request: Request, spec: EasyDict) -> int:
    """How many steps the high-noise expert takes; 0 for a task with one expert."""
    if "experts" not in spec:
        return 0
    if request.boundary_step_index is not None:
        return min(request.boundary_step_index, request.steps)
    if request.denoising_step_list:
        sigmas = [step / 1000 for step in request.denoising_step_list]
    else:
        start = 0.999 if request.solver == "unipc" else 1.0  # where each solver's schedule begins
        sigmas = [start * (1 - step / request.steps) for step in range(request.steps)]
    shifted = [request.shift * sigma / (1 + (request.shift - 1) * sigma) for sigma in sigmas]
    return sum(sigma >= spec.boundary for sigma in shifted)


# Work


def forward_flops(spec: EasyDict, tokens: int) -> dict[str, float]:
    """FLOPs of one DiT forward on one sample: linear layers, self-attention, cross-attention. 2 per multiply-add."""
    dit = spec.dit
    image_tokens = _image_tokens(spec)
    patch_values = math.prod(dit.patch_size)
    per_token = dit.num_layers * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)  # q k v o, cross q o, ffn
    per_token += patch_values * dit.dim * (dit.in_dim + dit.out_dim)  # patch embedding and head
    per_text_token = dit.num_layers * 2 * dit.dim**2 + dit.text_dim * dit.dim + dit.dim**2  # cross k v, embedding
    per_image_token = dit.num_layers * 2 * dit.dim**2 + CLIP_DIM**2 + CLIP_DIM * dit.dim
    linear = tokens * per_token + dit.text_len * per_text_token + image_tokens * per_image_token
    pairs = tokens * dit.dim * dit.num_layers  # times keys: the products with k and with v
    return {
        "linear": 2.0 * linear,
        "self_attention": 4.0 * pairs * tokens,
        "cross_attention": 4.0 * pairs * (dit.text_len + image_tokens),
    }


def _image_tokens(spec: EasyDict) -> int:
    if "clip" not in spec.files:
        return 0
    return CLIP_TOKENS * (2 if spec.kind == "flf2v" else 1)


# Parameters


def parameters(spec: EasyDict) -> dict[str, int]:
    """Number of parameters by component; `dit` is one expert."""
    counts = {"text": _text_params(spec.text), "dit": _dit_params(spec), "vae": _vae_params(spec.vae)}
    if "clip" in spec.files:
        counts["clip"] = CLIP_PARAMS
    return counts


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _dit_params(spec: EasyDict) -> int:
    dit = spec.dit
    dim = dit.dim
    block = 8 * _linear(dim, dim) + _linear(dim, dit.ffn_dim) + _linear(dit.ffn_dim, dim)
    block += 4 * dim + 2 * dim + 6 * dim  # q and k norms of both attentions, norm3, modulation
    total = _linear(dit.in_dim * math.prod(dit.patch_size), dim)
    total += _linear(dit.text_dim, dim) + _linear(dim, dim)
    total += _linear(dit.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    total += _linear(dim, dit.out_dim * math.prod(dit.patch_size)) + 2 * dim
    if "clip" in spec.files:
        block += 2 * _linear(dim, dim) + dim
        total += 2 * CLIP_DIM + _linear(CLIP_DIM, CLIP_DIM) + _linear(CLIP_DIM, dim) + 2 * dim
        total += 2 * CLIP_TOKENS * CLIP_DIM if spec.kind == "flf2v" else 0
    return total + dit.num_layers * block


def _text_params(text: EasyDict) -> int:
    block = (
        4 * text.dim * text.dim_attn + 3 * text.dim * text.dim_ffn + 2 * text.dim + text.num_buckets * text.num_heads
    )
    return text.vocab * text.dim + text.num_layers * block + text.dim


def _conv(inputs: int, outputs: int, taps: int) -> int:
    return inputs * outputs * taps + outputs


def _residual(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return inputs + _conv(inputs, outputs, 27) + outputs + _conv(outputs, outputs, 27) + shortcut


def _vae_params(vae: EasyDict) -> int:
    pixels = 12 if vae.version == "2.2" else 3  # 2.2 folds 2x2 pixels into channels
    widths = [vae.dim * mult for mult in [1, *vae.dim_mult]]
    encoder = _conv(pixels, widths[0], 27) + _vae_ends(widths[-1], 2 * vae.z_dim)
    for stage, temporal in enumerate([*vae.temporal_downsample, None]):
        encoder += _vae_stage(widths[stage], widths[stage + 1], vae.num_res_blocks)
        if temporal is not None:
            encoder += _conv(widths[stage + 1], widths[stage + 1], 9)
            encoder += _conv(widths[stage + 1], widths[stage + 1], 3) if temporal else 0
    widths = [vae.get("dec_dim", vae.dim) * mult for mult in [vae.dim_mult[-1], *reversed(vae.dim_mult)]]
    decoder = _conv(vae.z_dim, widths[0], 27) + _vae_ends(widths[0], 0) + widths[-1] + _conv(widths[-1], pixels, 27)
    for stage, temporal in enumerate([*reversed(vae.temporal_downsample), None]):
        # The upsampling of 2.1 halves the channels, that of 2.2 keeps them.
        halves = vae.version == "2.1"
        inputs = widths[stage] // 2 if halves and stage else widths[stage]
        out = widths[stage + 1]
        decoder += _vae_stage(inputs, out, vae.num_res_blocks + 1)
        if temporal is not None:
            decoder += _conv(out, out // 2 if halves else out, 9) + (_conv(out, 2 * out, 3) if temporal else 0)
    return encoder + decoder + _conv(2 * vae.z_dim, 2 * vae.z_dim, 1) + _conv(vae.z_dim, vae.z_dim, 1)


def _vae_stage(inputs: int, outputs: int, blocks: int) -> int:
    return _residual(inputs, outputs) + (blocks - 1) * _residual(outputs, outputs)


def _vae_ends(width: int, head_out: int) -> int:
    """The middle (two residual blocks around one attention) and, for the encoder, the head."""
    attention = width + _conv(width, 3 * width, 1) + _conv(width, width, 1)
    return 2 * _residual(width, width) + attention + (width + _conv(width, head_out, 27) if head_out else 0)


# Memory


def memory_by_stage(request: Request, spec: EasyDict, shape: tuple[int, ...], tokens: int) -> dict[str, int]:
    """Estimated peak bytes of each stage, of each process: the weights it holds and its largest activations."""
    bytes_per_weight = DTYPE_BYTES[request.dtype]
    bytes_per_vae_weight = DTYPE_BYTES[request.vae_dtype]
    counts = parameters(spec)
    dit = spec.dit
    # Hidden states, their normalised copy, q, k, v, attention output, projection and residual, then the ffn.
    hidden = -(-tokens // request.grid.sequence) * (8 * dit.dim + 2 * dit.ffn_dim) * bytes_per_weight
    latents = 8 * math.prod(shape) * 4  # sample, noise, two predictions and the solver's history
    per_map = 4 * request.width * request.height * spec.vae.get("dec_dim", spec.vae.dim) * bytes_per_vae_weight
    per_map //= 4 if spec.vae.version == "2.2" else 1  # the decoder of 2.2 works on folded 2x2 pixels
    rows, ranks = shape[2], request.grid.size
    per_map = per_map * -(-rows // ranks) // rows if ranks <= rows else per_map
    video = 3 * request.frame_num * request.width * request.height * 4
    weights = {
        "encode_text": _streamed_bytes(request, "t5") or counts["text"] * bytes_per_weight,
        "denoise": counts["dit"] * bytes_per_weight,
        "decode": counts["vae"] * bytes_per_vae_weight,
    }
    if "clip" in counts:
        weights["encode_image"] = counts["clip"] * 2
    experts = 1 if request.offload_model or "experts" not in spec else 2
    weights["denoise"] *= experts
    streamed = [_streamed_bytes(request, part) for part in ("dit", "high", "low")]
    if any(streamed):
        weights["denoise"] = sum(streamed) if experts == 2 else max(streamed)
    if request.t5_fsdp:
        weights["encode_text"] //= ranks
    if request.dit_fsdp:  # and two blocks are whole, one at work and one on the way
        weights["denoise"] = weights["denoise"] // ranks + 2 * weights["denoise"] // (experts * dit.num_layers)
    # Kept models add up; released ones (--offload_model true) do not.
    kept = 0 if request.offload_model else sum(weights.values())
    text = dit.text_len * (4 * spec.text.dim_attn + 3 * spec.text.dim_ffn) * bytes_per_weight
    activations = {"encode_text": text, "denoise": hidden + latents, "decode": VAE_LIVE_MAPS * per_map + video}
    return {stage: (kept or weights[stage]) + size for stage, size in activations.items()}


def _streamed_bytes(request: Request, part: str) -> int:
    """Size of the GGUF file whose weights stay packed; 0 if the part has none."""
    path = Path(request.files.get(part, ""))
    return _size_of(path) if request.gguf_mode == "stream" and path.suffix == ".gguf" and path.is_file() else 0


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a torch device: what its driver says, else that of the machine or of the container."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int((group / "memory.max").read_text()) - used + int(stat.get("file", 0)))  # files can go
    return free


# Files


def find_files(request: Request, spec: EasyDict) -> list[dict[str, Any]]:
    """One row a file: component, path, bytes (None if missing), hub (True: a hub repository, not looked into)."""
    in_hub = request.ckpt_option is not None and not Path(request.ckpt_dir).exists()
    rows = []
    for part, official in _official_paths(spec).items():
        hub = in_hub and part not in request.files
        paths = [] if hub else _find_part(request, spec, part)
        sizes = {path: _size_of(path) for path in paths} or {Path(request.ckpt_dir) / official: None}
        rows += [{"component": part, "path": str(path), "bytes": size, "hub": hub} for path, size in sizes.items()]
    return rows


def _official_paths(spec: EasyDict) -> dict[str, str]:
    """Component -> its place in the official checkpoint folder."""
    networks = spec.get("experts") or {"dit": "diffusion_pytorch_model*.safetensors"}
    return {**networks, **{name: spec.files[name] for name in ("t5", "tokenizer", "clip", "vae") if name in spec.files}}


def _find_part(request: Request, spec: EasyDict, part: str) -> list[Path]:
    """The files of one component, [] if there are none."""
    # `locate` stops at the first component that is missing, and a plan lists them all: so each is located alone, with
    # any existing file standing in for the others.
    stand_ins = {other: __file__ for other in _official_paths(spec) if other != part}
    own = {part: request.files[part]} if part in request.files else {}
    try:
        found = locate(request.ckpt_dir, spec, {**stand_ins, **own})
    except SwanError:
        return []
    if part == "tokenizer":
        return [found.tokenizer]
    if part in ("dit", "high", "low"):
        return found.dit["model" if part == "dit" else part]
    return getattr(found, part) or []


def _size_of(path: Path) -> int:
    """Bytes of a file, of all files in a folder, or of all shards of an index."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.iterdir() if part.is_file())
    if path.name.endswith(".index.json"):
        shards = path.parent.glob(path.name.removesuffix(".safetensors.index.json") + "-*.safetensors")
        return sum(part.stat().st_size for part in shards)
    return path.stat().st_size


# Text


def format_plan(plan: Mapping[str, Any]) -> str:
    """The plan as lines for people."""
    work = plan["tflop_per_forward"]
    parts = ", ".join(f"{name.replace('_', ' ')} {_short(work[name])}" for name in work if name != "total")
    steps = str(plan["steps"])
    if "steps_by_expert" in plan:
        steps += " ({high} high-noise, {low} low-noise)".format(**plan["steps_by_expert"])
    lines = [
        f"task        {plan['task']}: {plan['title']}",
        f"video       {plan['size']}, {plan['frames']} frames at {plan['fps']} fps, seed {plan['seed']}",
        f"latent      {'x'.join(map(str, plan['latent_shape']))}, {plan['tokens']} tokens",
        f"sampling    {plan['solver']}, {steps} steps, {plan['forwards']} forwards, shift {plan['shift']:g}",
        f"work        {_short(work['total'])} TFLOP a forward ({parts}), {_short(plan['tflop_total'])} TFLOP in all",
        "parameters  " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan["parameters"].items()),
        "memory      "
        + ", ".join(f"{name} {_bytes(size)}" for name, size in plan["memory_bytes"].items())
        + " (estimate)",
        *(_rank_lines(plan["ranks"]) if "ranks" in plan else []),
        *(_file_line(row) for row in plan["files"]),
        f"output      {plan['save_file']}",
    ]
    return "\n".join(lines)


def _rank_lines(ranks: Mapping[str, Any]) -> list[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in ranks["grid"].items() if size > 1)
    sent = ", ".join(f"{_bytes(size)} by {axis}" for axis, size in ranks["sent_bytes"].items() if size)
    shared = f", weights shared out: {', '.join(ranks['weights_shared'])}" if ranks["weights_shared"] else ""
    each = f"{_range(ranks['tokens'])} tokens, {_range(ranks['heads'])} heads"
    count = math.prod(ranks["grid"].values())
    return [f"processes   {count}: {axes}; each {each}, sends {sent or 'no tokens'} a forward{shared}"]


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"


def _file_line(row: Mapping[str, Any]) -> str:
    state = "from the hub" if row["hub"] else "MISSING" if row["bytes"] is None else _bytes(row["bytes"])
    return f"file        {row['component']:<9} {row['path']} ({state})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
