"""What quantisation does to Tiny World: `python -m benchmarks.tiny_world --gguf-types Q8_0,Q4_K_M,fp8,mlx4`.

The transformer is written in each type of GGUF, or as fp8, int8, mlx8, mlx4 (groups of 64) or mlx4-32, as wan.convert
does; the clips of the benchmark are made from it with weights that stay packed (gguf_mode stream), and from the
original, each in a process of its own. Prints a table:

    in blocks    share of the weights that are in blocks; the rest is in 16 or 32 bits
    load s       to load the transformer, shortest of three; clip s: median
    peak MB      resident memory of the whole process until the first clip is made; most of it is libraries
    PSNR         of the frames to those of the original by the same seed; mean over the clips
    color ...    share of the clips in which the judge sees what was asked

Rows of 192 weights, which most matrices of the embedded model have, are no whole number of the 256-weight blocks of
the K types and are stored in F16; only `ffn.2`, with rows of 768, is in blocks then. The last column has what
the file really holds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.common import high_water_bytes, in_fresh_process, machine
from benchmarks.tiny_world import TASK, WORDS, Outcome, cases, make_request, rates, run
from wan.engine import Engine
from wan.errors import UsageError
from wan.options import Request
from wan.tasks import load_task
from wan.weights.source import Source, open_source
from wan.weights.write.export import export_gguf, plan_tensors
from wan.weights.write.folder import Form, export_folder
from wan.weights.write.recipes import RECIPES

SCHEMES = {
    "fp8": Form("fp8", torch.float32),
    "int8": Form("int8", torch.float32),
    "nvfp4": Form("nvfp4", torch.float32),
    "mxfp8": Form("mxfp8", torch.float32),
    "mlx8": Form("mlx", torch.float32, 8, 64),
    "mlx4": Form("mlx", torch.float32, 4, 64),
    "mlx4-32": Form("mlx", torch.float32, 4, 32),
}
REFERENCE = "reference"
LOADS = 3
SAME_DB = 99.0  # counts for clips that are equal


class Made(NamedTuple):
    """What one process made of one file."""

    outcomes: list[Outcome]
    request: Request
    load_seconds: float
    peak_bytes: int


def make(file: str | None, count: int, steps: int | None, ckpt_dir: str | None) -> Made:
    """Load the transformer (None: the one of the checkpoint) and make `count` clips."""
    clip, seed = cases()[0]
    options = {"dit": file, "gguf_mode": "stream"} if file else {}
    short = make_request(clip.prompt, seed, 1, ckpt_dir, frame_num=1, **options)
    engine = Engine.of(short.load, load_task(TASK))

    def load() -> float:
        engine.release()
        return engine.make(short).report["seconds"]["load"]

    load_seconds = min(load() for _ in range(LOADS))
    run(1, steps, ckpt_dir, engine)  # loads the other models
    peak = high_water_bytes()
    outcomes, request = run(count, steps, ckpt_dir, engine)
    return Made(outcomes, request, load_seconds, peak)


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """In dB, of uint8 frames."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return 10 * math.log10(255**2 / error) if error else SAME_DB


def compare(types: list[str], count: int, steps: int | None, ckpt_dir: str | None) -> tuple[dict, dict[str, Made]]:
    """The JSON, and what was made by type."""
    clip, seed = cases()[0]
    engine = Engine.of(make_request(clip.prompt, seed, steps, ckpt_dir).load, load_task(TASK))
    source = engine.checkpoint.source("model")
    stored = {REFERENCE: _stored_as_is(source)}
    made = {REFERENCE: in_fresh_process(make, None, count, steps, ckpt_dir)}
    with tempfile.TemporaryDirectory() as folder:
        for name in types:
            file, stored[name] = (_write_scheme if name in SCHEMES else _export)(source, Path(folder), name)
            made[name] = in_fresh_process(make, str(file), count, steps, ckpt_dir)
    rows = [{"type": name, **stored[name], **_figures(one, made[REFERENCE])} for name, one in made.items()]
    for index, row in enumerate(rows):
        twins = [other["type"] for other in rows[:index] if other["plan"] == row["plan"]]
        row["same_weights_as"] = twins[0] if twins else None
    for row in rows:
        del row["plan"]
    request = made[REFERENCE].request
    return {
        "task": TASK,
        "clips": count,
        "size": f"{request.sample.width}x{request.sample.height}",
        "frames": request.sample.frame_num,
        "steps": request.sample.steps,
        "solver": request.sample.solver,
        "device": request.load.device,
        "dtype": request.load.dtype,
        "gguf_mode": "stream",
        "machine": machine(),
        "types": rows,
    }, made


def _stored_as_is(source: Source) -> dict[str, Any]:
    infos = [source.info(name) for name in source.keys()]
    forms = [_label(source.block_type(name)) for name in source.keys()]
    kinds = [form or str(info.dtype).removeprefix("torch.") for form, info in zip(forms, infos, strict=True)]
    size_bytes = sum(path.stat().st_size for path in source.paths)
    return _storage(size_bytes, [info.shape for info in infos], kinds, set(filter(None, forms)))


def _label(form: Any) -> str | None:
    """Of a scheme; None for numbers as they are."""
    return form and (f"{form.name}/{form.group}" if form.has_offsets else form.name)


def _write_scheme(source: Source, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Write a file in `folder`. Returns it and what it holds."""
    form, output = SCHEMES[name], folder / name
    config = {"quantization": {"bits": form.bits, "group_size": form.group}} if form.bits else {}
    export_folder({"dit": source}, output, form, copies={}, config=config)
    [file] = output.glob("*.safetensors")
    return file, _stored_as_is(open_source(file))


def _export(source: Source, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The same for a type of GGUF."""
    file = folder / f"{name}.gguf"
    planned = plan_tensors(source, RECIPES[name])
    size_bytes = export_gguf(source, file, name)["bytes"]
    blocks = {one.type.name for one in planned if one.type.torch_dtype is None}
    return file, _storage(size_bytes, [one.shape for one in planned], [one.type.name for one in planned], blocks)


def _storage(size_bytes: int, shapes: list[tuple[int, ...]], kinds: list[str], blocks: set[str]) -> dict[str, Any]:
    """plan: the kind of each tensor; tensors: how many of each kind; in_blocks: share of the weights."""
    weights = [math.prod(shape) for shape in shapes]
    in_blocks = sum(count for count, kind in zip(weights, kinds) if kind in blocks)
    return {
        "bytes": size_bytes,
        "bytes_per_weight": round(size_bytes / sum(weights), 3),
        "in_blocks": round(in_blocks / sum(weights), 4),
        "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)},
        "plan": kinds,
    }


def _figures(made: Made, reference: Made) -> dict[str, Any]:
    likeness = [psnr(one.frames, other.frames) for one, other in zip(made.outcomes, reference.outcomes)]
    is_reference = made is reference
    return {
        "load_seconds": round(made.load_seconds, 4),
        "seconds_per_clip": round(statistics.median(one.seconds for one in made.outcomes), 3),
        "peak_bytes": made.peak_bytes,
        "psnr_db": None if is_reference else round(statistics.mean(likeness), 2),
        "psnr_db_least": None if is_reference else round(min(likeness), 2),
        **rates(made.outcomes),
    }


def table(result: dict[str, Any]) -> str:
    head = ["type", "bytes", "B/weight", "in blocks", "load s", "clip s", "peak MB", "PSNR dB", *WORDS, "tensors"]
    lines = [head]
    for row in result["types"]:
        numbers = [f"{row['bytes']:,}", f"{row['bytes_per_weight']:.2f}", f"{row['in_blocks']:.0%}"]
        numbers += [f"{row['load_seconds']:.3f}", f"{row['seconds_per_clip']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        numbers += ["-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}", *(f"{row[word]:.0%}" for word in WORDS)]
        lines.append([row["type"], *numbers, _contents(row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]] for line in lines]
    made = f"{result['clips']} clips of {result['frames']} frames {result['size']}, {result['steps']} steps"
    how = f"computed in {result['dtype']} on {result['device']}, quantised weights kept packed"
    return "\n".join([f"{result['task']}: {made}; {how}", *("  ".join(line) for line in aligned)])


def _contents(row: dict[str, Any]) -> str:
    """The types in a file, commonest first."""
    twin = f" (the same weights as {row['same_weights_as']})" if row["same_weights_as"] else ""
    return ", ".join(f"{count} {kind}" for kind, count in row["tensors"].items()) + twin


def draw(result: dict[str, Any], made: dict[str, Made], columns: int = 8, scale: int = 2) -> Image.Image:
    """A contact sheet: a row for each type, with the middle frames of some of the clips."""
    outcomes = made[REFERENCE].outcomes
    chosen = [index * len(outcomes) // columns for index in range(columns)] if len(outcomes) > columns else None
    chosen = chosen or list(range(len(outcomes)))
    height, width = (side * scale for side in outcomes[0].frames.shape[1:3])
    label_px, text_px, gap_px = 150, 14, 6
    top_px = 3 * text_px + gap_px
    size = (label_px + len(chosen) * (width + gap_px) + gap_px, top_px + len(made) * (height + gap_px))
    sheet = Image.new("RGB", size, (225, 225, 235))
    pen = ImageDraw.Draw(sheet)
    for column, index in enumerate(chosen):
        clip = outcomes[index].clip
        words = f"{clip.color} {clip.shape}\nmoving {clip.direction}\non {clip.background}"
        pen.multiline_text((label_px + column * (width + gap_px), gap_px // 2), words, fill="black", spacing=2)
    for line, (row, one) in enumerate(zip(result["types"], made.values())):
        y = top_px + line * (height + gap_px)
        likeness = "" if row["psnr_db"] is None else f"\nPSNR {row['psnr_db']:.1f} dB"
        words = "\n".join(f"{count} {kind}" for kind, count in row["tensors"].items())
        twin = f" = {row['same_weights_as']}" if row["same_weights_as"] else ""
        text = f"{row['type']}{twin}\n{row['bytes_per_weight']:.2f} bytes a weight{likeness}\n{words}"
        pen.multiline_text((gap_px, y), text, fill="black", spacing=2)
        for column, index in enumerate(chosen):
            frames = one.outcomes[index].frames
            still = Image.fromarray(frames[len(frames) // 2]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(still, (label_px + column * (width + gap_px), y))
    return sheet


def main(args: argparse.Namespace) -> int:
    """`args`: those of `tiny_world`."""
    given = [name.strip() for name in args.gguf_types.split(",")]
    types = list(dict.fromkeys(name.lower() if name.lower() in SCHEMES else name.upper() for name in given))
    for name in types:
        if name not in RECIPES and name not in SCHEMES:
            raise UsageError(f"--gguf-types: no type {name!r}; types: {', '.join([*RECIPES, *SCHEMES])}")
    result, made = compare(types, args.clips, args.steps, args.ckpt_dir)
    print(table(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(result, made).quantize(128).save(args.picture, format="PNG", optimize=True)
    return 0
