"""Write a checkpoint folder with quantised matrices: plan every tensor, then stream them.

Three forms, each of which `--ckpt_dir` takes:

    mlx            the files, names and config.json of mlx-video; affine codes in 4 or 8 bits, or none
    fp8, int8      the official files and names, the codes and scales of LightX2V, a scale for each row
    nvfp4, mxfp8   the official files and names, the codes, scales and notes of ComfyUI

Quantised are the matrices of attention and feed-forward networks; but for mlx the text encoder's as well. Other
tensors get the type that was asked for, the VAE stays in fp32.

Format of the files: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wan.errors import SwanError
from wan.files import atomic_folder
from wan.quant.rounding import quantize_affine, quantize_channels, quantize_mxfp8, quantize_nvfp4
from wan.tasks import load_task, task_names
from wan.weights.block_floats import TILE_ROWS, tiled, tiled_shape
from wan.weights.comfy_quant import LEAF, make_note
from wan.weights.infer import infer_dit_config, our_names
from wan.weights.locate import MLX_FILES
from wan.weights.mlx import mlx_name, to_mlx
from wan.weights.names import Rows, official_t5_name
from wan.weights.source import Source
from wan.weights.write.export import component_of, plan_tensors
from wan.weights.write.recipes import RECIPES
from wan.weights.write.stream import Job, Part, Progress, check_space, write_tensors
from wan.weights.write.written import check_inputs, check_output, list_files, name_tensors

_DIT_FOLDERS = {"dit": "", "high": "high_noise_model/", "low": "low_noise_model/"}
_ATTENTION = r"(?:vace_)?blocks\.\d+\.(?:self_attn|cross_attn)\.[qkvo]\.weight"
_QUANTISED = {
    "dit": re.compile(_ATTENTION + r"|(?:vace_)?blocks\.\d+\.(?:ffn\.[02]|cross_attn\.[kv]_img)\.weight"),
    "t5": re.compile(r"blocks\.\d+\.(?:attn\.[qkvo]|ffn\.(?:gate\.0|fc1|fc2))\.weight"),
}
_MLX_QUANTISED = re.compile(_ATTENTION + r"|(?:vace_)?blocks\.\d+\.ffn\.[02]\.weight")
_DTYPE_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint32: "U32",
}


@dataclass(frozen=True)
class Form:
    """What is written. format: see above; dtype: of all that is not quantised; bits: 4, 8, or 0 for none (mlx only);
    group: columns that share a scale (mlx only)."""

    format: str
    dtype: torch.dtype = torch.bfloat16
    bits: int = 0
    group: int = 64


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Planned:
    """What becomes of one tensor of the source: `make` turns it, or some of its rows, into those of `pieces`.

    rows_at_once: of so many rows or a multiple; 0: only of all.
    """

    stored: str
    pieces: tuple[Piece, ...]
    make: Callable[[Tensor], tuple[Tensor, ...]]
    rows_at_once: int = 0

    @property
    def is_quantised(self) -> bool:
        return len(self.pieces) > 1


# Planning


def plan_part(source: Source, part: str, form: Form) -> list[Planned]:
    """Every tensor of a file. Nothing is read. Raises SwanError for what is no whole component of that kind."""
    component = "dit" if part in ("dit", "high", "low") else part
    if component != "vae":
        if component_of(source) != component:
            raise SwanError(f"{source.describe()}: does not hold the {part}")
        plan_tensors(source, RECIPES["F32"])  # whole, and with no foreign tensors
    kind = f"vae {vae_version(source)}" if component == "vae" else component
    planned = []
    for ours, stored in our_names(source, component).items():
        if isinstance(stored, Rows):
            raise SwanError(f"{source.describe()}: {stored.name} holds several tensors and cannot be written")
        official = official_t5_name(ours) if component == "t5" else ours
        shape = source.info(stored).shape
        try:
            planned.append(_plan_tensor(stored, official, shape, kind, form))
        except ValueError as error:
            raise SwanError(f"{source.describe()}: {stored}: {error}") from None
    return planned


def _plan_tensor(stored: str, name: str, shape: tuple[int, ...], kind: str, form: Form) -> Planned:
    """kind: "dit", "t5", "vae 2.1" or "vae 2.2"."""
    is_mlx = form.format == "mlx"
    written = mlx_name(name, kind) if is_mlx else name
    if len(shape) == 2 and _is_quantised(name, kind, form):
        plan = {"mlx": _plan_affine, "nvfp4": _plan_nvfp4, "mxfp8": _plan_mxfp8}.get(form.format, _plan_channels)
        return plan(stored, written, (shape[0], shape[1]), form)
    dtype = torch.float32 if kind.startswith("vae") else form.dtype
    stored_axes = len(shape)
    shape = to_mlx(torch.empty(shape, device="meta"), kind, name).shape if is_mlx else shape

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        cast = (to_mlx(tensor, kind, name) if is_mlx else tensor).to(dtype)
        if not cast.isfinite().all():
            whose = "it holds values that are not finite"
            if tensor.float().isfinite().all():
                whose = f"{str(dtype).removeprefix('torch.')} cannot hold its largest value"
            raise ValueError(whose)
        return (cast,)

    return Planned(
        stored, (Piece(written, dtype, tuple(shape)),), make, rows_at_once=int(stored_axes == len(shape) == 2)
    )


def _is_quantised(name: str, component: str, form: Form) -> bool:
    if form.format == "mlx":
        return component == "dit" and form.bits > 0 and _MLX_QUANTISED.fullmatch(name) is not None
    return component in _QUANTISED and _QUANTISED[component].fullmatch(name) is not None


def _plan_channels(stored: str, name: str, shape: tuple[int, int], form: Form) -> Planned:
    code_dtype = torch.int8 if form.format == "int8" else torch.float8_e4m3fn
    scale = Piece(f"{name}_scale", torch.float32, (shape[0], 1))
    pieces = (Piece(name, code_dtype, shape), scale)
    return Planned(stored, pieces, lambda tensor: quantize_channels(tensor, form.format), rows_at_once=1)


def _plan_nvfp4(stored: str, name: str, shape: tuple[int, int], form: Form) -> Planned:
    (rows, columns), path, note = shape, name.removesuffix(".weight"), make_note("nvfp4")
    _check_groups(columns, 16)
    pieces = (
        Piece(name, torch.uint8, (rows, columns // 2)),
        Piece(f"{name}_scale", torch.float8_e4m3fn, tiled_shape(rows, columns // 16)),
        Piece(f"{name}_scale_2", torch.float32, ()),
        Piece(f"{path}.{LEAF}", torch.uint8, tuple(note.shape)),
    )

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        codes, scales, whole = quantize_nvfp4(tensor)
        return codes[:, 0::2] << 4 | codes[:, 1::2], tiled(scales), whole, note

    return Planned(stored, pieces, make)


def _plan_mxfp8(stored: str, name: str, shape: tuple[int, int], form: Form) -> Planned:
    (rows, columns), path, note = shape, name.removesuffix(".weight"), make_note("mxfp8")
    _check_groups(columns, 32)
    pieces = (
        Piece(name, torch.float8_e4m3fn, shape),
        Piece(f"{name}_scale", torch.uint8, tiled_shape(rows, columns // 32)),
        Piece(f"{path}.{LEAF}", torch.uint8, tuple(note.shape)),
    )

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        codes, scales = quantize_mxfp8(tensor)
        return codes, tiled(scales), note

    return Planned(stored, pieces, make, rows_at_once=TILE_ROWS)


def _plan_affine(stored: str, name: str, shape: tuple[int, int], form: Form) -> Planned:
    rows, columns = shape
    _check_groups(columns, form.group, "; take a smaller --group-size" if columns % 32 == 0 else "")
    path = name.removesuffix(".weight")
    pieces = (
        Piece(name, torch.uint32, (rows, columns * form.bits // 32)),
        Piece(f"{path}.scales", form.dtype, (rows, columns // form.group)),
        Piece(f"{path}.biases", form.dtype, (rows, columns // form.group)),
    )

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        return quantize_affine(tensor, form.bits, form.group, form.dtype)

    return Planned(stored, pieces, make, rows_at_once=1)


def _check_groups(columns: int, group: int, advice: str = "") -> None:
    if columns % group:
        raise ValueError(f"rows of {columns} weights are no whole number of groups of {group}{advice}")


def file_name(part: str, form: Form, source: Source) -> str:
    """Where a part goes in the folder."""
    if form.format == "mlx":
        return MLX_FILES["model" if part == "dit" else part]
    if part == "t5":
        return f"models_t5_umt5-xxl-enc-{form.format}.safetensors"
    if part == "vae":
        return f"Wan{vae_version(source)}_VAE.safetensors"
    return f"{_DIT_FOLDERS[part]}diffusion_pytorch_model.safetensors"


def vae_version(source: Source) -> str:
    """ "2.1" or "2.2": of the VAE in `source`, whose first kernel sees the pixels or, in 2.2, folds of four."""
    stored = our_names(source, "vae").get("encoder.conv1.weight")
    return "2.2" if stored is not None and source.info(str(stored)).shape[1] == 12 else "2.1"


# Writing


def export_folder(
    parts: Mapping[str, Source],
    output: Path,
    form: Form,
    *,
    copies: Mapping[str, Path] | None = None,
    config: Mapping[str, Any] | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the folder `output` from `parts` ("dit", or "high" and "low"; "t5"; "vae").

    copies: files and folders to copy, by their places in `output`. config: of config.json. replace: an `output` that
    holds nothing but what this function wrote is replaced. on_progress: called with (bytes written, bytes in all); what
    it raises ends the run. The folder appears whole or not at all; in memory are slices of tensors and their codes (for
    nvfp4 one tensor, whose largest weight scales all). Returns a report: folder, bytes, format, files (name -> bytes),
    tensors, quantized, seconds.

    Raises SwanError where a source is not what can be written, holds values that are not finite, or the disk has no
    room; UsageError where `output` exists.
    """
    started = time.perf_counter()
    files = {file_name(part, form, source): (source, plan_part(source, part, form)) for part, source in parts.items()}
    total = sum(one.size_bytes for _, plan in files.values() for entry in plan for one in entry.pieces)
    place, output = output, Path(os.path.realpath(output))  # of a link, what it leads to is written
    check_output(output, replace)
    check_inputs(output, [*(path for source in parts.values() for path in source.paths), *(copies or {}).values()])
    copied = (one for path in (copies or {}).values() for one in (path, *path.rglob("*")) if one.is_file())
    check_space(output, total + sum(one.stat().st_size for one in copied))
    advance = Progress(total, on_progress)
    with atomic_folder(output) as folder:
        for name, path in (copies or {}).items():
            advance(0)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, folder / name) if path.is_dir() else shutil.copyfile(path, folder / name)
        if config:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        metadata = {"format": "mlx" if form.format == "mlx" else "pt"} | list_files(folder, files)
        for name, (source, plan) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                _write_file(file, source, plan, metadata, advance)
        check_output(output, replace=True)  # once more, before it is replaced: it may have been hours
    sizes = {name: (output / name).stat().st_size for name in files}
    plans = [entry for _, plan in files.values() for entry in plan]
    return {
        "folder": str(place),
        "bytes": sum(sizes.values()),
        "format": form.format,
        "files": sizes,
        "tensors": len(plans),
        "quantized": sum(entry.is_quantised for entry in plans),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _write_file(
    file: BinaryIO, source: Source, plan: list[Planned], metadata: Mapping[str, str], advance: Progress
) -> None:
    """A safetensors file; what is made of a tensor is written to its place at once."""
    # Larger elements first, so that every tensor lies at a multiple of its element size.
    pieces = sorted((one for entry in plan for one in entry.pieces), key=lambda one: -one.dtype.itemsize)
    header: dict[str, Any] = {}
    starts, end = {}, 0
    for one in pieces:
        starts[one.name], end = end, end + one.size_bytes
        offsets = [starts[one.name], end]
        header[one.name] = {"dtype": _DTYPE_CODES[one.dtype], "shape": one.shape, "data_offsets": offsets}
    header = {"__metadata__": {**metadata, **name_tensors(header)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    data_start = 8 + len(text)
    jobs = [_job(source, entry, [data_start + starts[one.name] for one in entry.pieces]) for entry in plan]
    write_tensors(file, jobs, advance)


def _job(source: Source, entry: Planned, starts: list[int]) -> Job:
    """starts: where the pieces lie in the file."""
    rows = source.info(entry.stored).shape[0] if entry.rows_at_once else 0

    def part(start: int, one: Piece) -> Part:  # all rows of a note are those of any slice
        is_by_row = rows and one.shape and one.shape[0] >= rows
        return Part(start, one.size_bytes // one.shape[0] if is_by_row else 0)

    def make(tensor: Tensor) -> tuple[Tensor, ...]:
        made = entry.make(tensor)
        for one, piece in zip(made, entry.pieces, strict=True):
            if one.dtype != piece.dtype or tuple(one.shape[1:]) != piece.shape[1:]:
                raise RuntimeError(f"{piece.name} was planned as {piece}, and is {one.dtype} {list(one.shape)}")
        return made

    return Job(source, entry.stored, tuple(map(part, starts, entry.pieces)), make, entry.rows_at_once)


# The config


def make_config(parts: Mapping[str, Source], form: Form, version: str) -> dict[str, Any]:
    """The config.json of mlx-video, or of an official folder, for the transformer in `parts`; {} if there is none."""
    transformer = next((parts[part] for part in ("dit", "high", "low") if part in parts), None)
    if transformer is None:
        return {}
    config = infer_dit_config(transformer)
    has_clip, is_dual = config.pop("clip"), "high" in parts
    task = _task_like(config, has_clip, is_dual)
    if task is not None:
        config |= {"text_len": task.dit.text_len, "eps": task.dit.eps}
    if form.format != "mlx":
        return {"_class_name": "WanModel", **config}
    stride = 16 if config["out_dim"] == 48 else 8
    config |= {
        "model_version": version,
        "dual_model": is_dual,
        "boundary": 0.0,
        "vae_z_dim": config["out_dim"],
        "vae_stride": [4, stride, stride],
    }
    if task is not None:
        told = {"sample_shift": "shift", "sample_steps": "steps", "sample_guide_scale": "guide_scale"}
        config |= {key: task.sampling[ours] for key, ours in (told | {"sample_fps": "fps"}).items()}
        config["boundary"] = task.get("boundary", 0.0)
    if form.bits:
        config["quantization"] = {"group_size": form.group, "bits": form.bits}
    return config


def _task_like(config: Mapping[str, Any], has_clip: bool, is_dual: bool) -> Any | None:
    """The task whose transformer has these shapes."""
    for task in map(load_task, task_names()):
        same = all(task.dit[key] == value for key, value in config.items() if key != "num_heads")
        if same and ("clip" in task.files) == has_clip and ("experts" in task) == is_dual:
            return task
    return None
