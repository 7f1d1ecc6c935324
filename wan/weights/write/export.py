"""Write a checkpoint as one GGUF file: plan every tensor, write the header, then stream the tensors.

A transformer is written as architecture `wan` under the official names, the text encoder as `t5encoder` under the
names of llama.cpp. Shapes are the true ones: the patch embedding has five dimensions.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from wan.errors import SwanError
from wan.files import atomic
from wan.quant.ggml import BY_NAME, GGMLType
from wan.quant.quantize import quantize
from wan.weights.containers.gguf import GGUFSource
from wan.weights.containers.gguf_header import ARRAY, BOOL, SCALARS, STRING, GGUFArray
from wan.weights.infer import HEADS_KEY, count, infer_dit_config, looks_like, our_names, told_heads
from wan.weights.names import gguf_t5_name
from wan.weights.source import Source
from wan.weights.write.recipes import LAYOUTS, RECIPES, T5, Recipe, tensor_type
from wan.weights.write.stream import Job, Part, Progress, check_space, write_tensors

ALIGNMENT = 32  # bytes; the data of every tensor begins at a multiple
_VERSION = 3
_QUANTIZATION_VERSION = 2
_T5_CONTEXT, _T5_EPS = 512, 1e-6

# Last parts of the names of a transformer's tensors. Others are a quantiser's scales, which `read` does not apply.
_LEAVES = ("weight", "bias", "modulation", "emb_pos", "weights", "padding_tokens", "kernel")

_UINT32, _INT32, _FLOAT32 = 4, 5, 6
_ELEMENT_TYPES = {np.dtype(SCALARS[one]): one for one in (0, 1, _UINT32, _INT32, _FLOAT32)}

# bool, int (stored as uint32, int32 if negative), float (float32), str, list of str, bytes or an array of numbers
Value = bool | int | float | str | bytes | list[str] | np.ndarray


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to write, and what its source calls it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    source_name: str

    @property
    def size_bytes(self) -> int:
        return self.type.tensor_bytes(self.shape)


# Planning


def component_of(source: Source) -> str:
    """ "dit" or "t5": what `source` holds. Raises SwanError, which says what it looks like, for anything else."""
    for component, marker in (("dit", "patch_embedding.weight"), ("t5", "shared.weight")):
        if marker in our_names(source, component):
            return component
    raise SwanError(f"{source.describe()}: neither a Wan transformer nor its text encoder{looks_like(source)}")


def plan_tensors(source: Source, recipe: Recipe) -> list[Planned]:
    """Every tensor of the file, in the order of the source. Nothing is read.

    Raises SwanError for what is no whole Wan transformer or UMT5 encoder.
    """
    component = component_of(source)
    names = {ours: str(name) for ours, name in our_names(source, component).items()}
    if component == "dit":
        infer_dit_config(source)
    _check_names(source, component, names)
    layout, plan = LAYOUTS[component], []
    for ours, source_name in names.items():
        info = source.info(source_name)
        if not info.dtype.is_floating_point:
            problem = f"tensor {source_name} holds {str(info.dtype).removeprefix('torch.')}, not weights"
            raise SwanError(f"{source.describe()}: {problem}")
        name, shape = (gguf_t5_name(ours) if component == "t5" else ours), info.shape or (1,)
        kind = BY_NAME[tensor_type(recipe, layout, name, shape, info.dtype == torch.bfloat16)]
        if shape[-1] % kind.block_weights:
            kind = BY_NAME["F16"]
        plan.append(Planned(name, shape, kind, source_name))
    return plan


def quantised_before(source: Source, planned: list[Planned]) -> str | None:
    """The commonest type of 8 bits or less in the source of tensors that will be quantised; None if there is none."""
    types = []
    for one in planned:
        dtype = source.info(one.source_name).dtype
        if one.type.torch_dtype is None and dtype.itemsize == 1:
            types.append(str(dtype).removeprefix("torch."))
        elif one.type.torch_dtype is None and isinstance(source, GGUFSource):
            types += [source.type(one.source_name).name] if source.type(one.source_name).torch_dtype is None else []
    return Counter(types).most_common(1)[0][0] if types else None


def _check_names(source: Source, component: str, names: Mapping[str, str]) -> None:
    """No foreign tensors, and no gaps: every block has the tensors of the first."""
    prefixes = ("encoder.block.",) if component == "t5" else ("blocks.", "vace_blocks.")
    blocks: dict[str, set[str]] = {}  # by the path of each
    for ours, source_name in names.items():
        known = gguf_t5_name(ours) != ours if component == "t5" else ours.rpartition(".")[2] in _LEAVES
        if not known:
            what = "the UMT5 encoder" if component == "t5" else "a Wan transformer (scaled weights cannot be converted)"
            raise SwanError(f"{source.describe()}: {source_name} is no tensor of {what}")
        if match := re.fullmatch(rf"((?:{'|'.join(map(re.escape, prefixes))})\d+)\.(.+)", ours):
            blocks.setdefault(match[1], set()).add(match[2])
    for prefix in prefixes:
        whole = set().union(*(held for path, held in blocks.items() if path.startswith(prefix)))
        whole -= {name for name in whole if name.startswith("before_proj.")}  # of the first one alone
        for index in range(count(names, prefix)):
            if lacking := sorted(whole - blocks.get(f"{prefix}{index}", set())):
                lacks = f"{len(lacking)} of its {len(whole)} tensors are missing"
                where = f"{prefix.removeprefix('encoder.').rstrip('s.')} {index}"
                raise SwanError(f"{source.describe()}: incomplete, {where} has no {lacking[0]} ({lacks})")


# Keys and values


def make_metadata(source: Source, recipe: Recipe) -> dict[str, Value]:
    """The keys and values of the file; for the text encoder its shapes, and the tokenizer where the source has one."""
    component = component_of(source)
    metadata: dict[str, Value] = {"general.architecture": LAYOUTS[component].architecture}
    if component == "t5":
        metadata |= _t5_metadata(source)
    elif heads := told_heads(source, infer_dit_config(source)["dim"]):
        metadata[HEADS_KEY] = heads
    metadata |= {"general.quantization_version": _QUANTIZATION_VERSION, "general.file_type": recipe.file_type}
    if component == "t5" and isinstance(source, GGUFSource):
        metadata |= _tokenizer_of(source)
    return metadata


def _t5_metadata(source: Source) -> dict[str, Value]:
    """Hyperparameters under the names of llama.cpp's converter."""
    names = our_names(source, "t5")
    shapes = {gguf_t5_name(ours): source.info(str(name)).shape for ours, name in names.items()}
    vocab, dim = shapes["token_embd.weight"]
    buckets, heads = shapes["enc.blk.0.attn_rel_b.weight"]
    head_dim = shapes["enc.blk.0.attn_q.weight"][0] // heads
    values = {
        "vocab_size": vocab,
        "context_length": _T5_CONTEXT,
        "embedding_length": dim,
        "feed_forward_length": shapes["enc.blk.0.ffn_up.weight"][0],
        "block_count": count(shapes, "enc.blk."),
        "attention.head_count": heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_epsilon": _T5_EPS,
        "attention.layer_norm_rms_epsilon": _T5_EPS,
        "attention.relative_buckets_count": buckets,
    }
    return {f"{T5.architecture}.{key}": value for key, value in values.items()}


def _tokenizer_of(source: GGUFSource) -> dict[str, Value]:
    """The tokenizer inside a GGUF file, as it is."""
    found: dict[str, Value] = {}
    for key, value in source.metadata.items():
        if key.startswith("tokenizer."):
            is_numbers = isinstance(value, GGUFArray) and value.type != STRING
            elements = source.array(key) if isinstance(value, GGUFArray) else value
            found[key] = np.array(elements, dtype=SCALARS[value.type]) if is_numbers else elements
    return found


# Writing


def write_header(file: BinaryIO, metadata: Mapping[str, Value], planned: list[Planned]) -> None:
    """Write all that comes before the data of the first tensor, padding included."""
    file.write(struct.pack("<4sIQQ", b"GGUF", _VERSION, len(planned), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _encode(value))
    offset = 0
    for one in planned:
        dims = len(one.shape)
        file.write(_string(one.name))
        file.write(struct.pack(f"<I{dims}QIQ", dims, *reversed(one.shape), one.type.id, offset))
        offset += _padded(one.size_bytes)
    file.write(bytes(-file.tell() % ALIGNMENT))


def data_bytes(planned: list[Planned]) -> int:
    """Bytes of all that follows the header."""
    return sum(_padded(one.size_bytes) for one in planned)


def export_gguf(
    source: Source,
    output: Path,
    type_name: str,
    *,
    tokenizer: Mapping[str, Value] | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the transformer or text encoder in `source` to `output` (replaced if it exists) by recipe `type_name`.

    tokenizer: keys and values to add. on_progress: called with (bytes made, bytes in all); what it raises ends the
    run. The file appears whole or not at all. In memory are slices of tensors and their blocks. Returns a report:
    file, bytes, architecture, type, tensors, quantized (tensors in blocks), types (ggml type -> tensors) and seconds.

    Raises SwanError where the source is not what can be written, holds values that are not finite, or where the disk
    has no room.
    """
    started = time.perf_counter()
    recipe = RECIPES[type_name]
    planned = plan_tensors(source, recipe)
    metadata = make_metadata(source, recipe) | dict(tokenizer or {})
    header = io.BytesIO()
    write_header(header, metadata, planned)
    total = header.tell() + data_bytes(planned)
    place = Path(os.path.realpath(output))  # of a link, what it leads to is written
    check_space(place, total)
    advance = Progress(total, on_progress, done=header.tell())
    with atomic(place) as temporary, temporary.open("wb") as file:
        file.write(header.getvalue())
        write_tensors(file, _jobs(source, planned, header.tell()), advance, threads)
        file.truncate(total)
        advance(total - advance.done)  # what lies between tensors
    types = Counter(one.type.name for one in planned)
    return {
        "file": str(output),
        "bytes": total,
        "architecture": metadata["general.architecture"],
        "type": type_name,
        "tensors": len(planned),
        "quantized": sum(one.type.torch_dtype is None for one in planned),
        "types": dict(types.most_common()),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _jobs(source: Source, planned: list[Planned], start: int) -> Iterator[Job]:
    """start: where the data of the first tensor begins."""
    for one in planned:
        is_matrix = len(one.shape) == 2
        part = Part(start, one.type.row_bytes(one.shape[1]) if is_matrix else 0)
        yield Job(source, one.source_name, (part,), partial(_blocks, kind=one.type), int(is_matrix))
        start += _padded(one.size_bytes)


def _blocks(tensor: torch.Tensor, kind: GGMLType) -> tuple[np.ndarray]:
    return (quantize(tensor, kind),)


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode(value: Value) -> bytes:
    """The type of a value and the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<Ii", _INT32, value) if value < 0 else struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    numbers = np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else value
    return struct.pack("<IIQ", ARRAY, _ELEMENT_TYPES[numbers.dtype], len(numbers)) + numbers.tobytes()
