"""Bytes of the weights of each component, as they lie in memory: dense in the type of the run, or packed. They are
those of the model itself, built on the meta device and, where its files are here, prepared for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from wan.errors import SwanError
from wan.memory.offload import is_streamed
from wan.models.audio import empty_audio_encoder
from wan.models.dit import WanModel
from wan.models.encoders import empty_clip_encoder, empty_text_encoder
from wan.options import Request
from wan.plan.files import checkpoint_of, size_of, vae_names
from wan.plan.runs import DTYPES, KEPT, build, in_type, key
from wan.quant.linear import QuantLinear
from wan.quant.wide import WideLinear, keep_narrow
from wan.weights.assign import ModelWeights
from wan.weights.checkpoint import Checkpoint
from wan.weights.in_turn import AHEAD_BYTES
from wan.weights.infer import vae_config
from wan.weights.source import Source, TensorInfo, open_source
from wan.weights.write.export import plan_tensors
from wan.weights.write.recipes import RECIPES

GGUF_TYPES = ("Q8_0", "Q4_K_M")  # that are offered where nothing else fits
# The C library keeps freed blocks of less than 32 MB. Measured: decoding at 128 to 512 px, in fp32 and bf16, took 150
# to 380 MB more than its tensors, and hardly any more where every block was given back; loading the VAE, from fp32 to
# bf16, some 250 MB.
HEAP_BYTES = 300_000_000  # at most
_SMALL_BYTES = 32 << 20


def resident_indices(count: int, resident: int) -> set[int]:
    """Which of `count` blocks stay on the device: so many, evenly spread, so that the others have time to arrive."""
    return {(2 * index + 1) * count // (2 * resident) for index in range(resident)}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a component in memory.

    blocks: of the matrices of each block, and of what adapters put after it, by part; unpacked: of the largest matrix
    once dequantised, or widened, where that is done as they are used, one at a time.
    """

    total: int
    blocks: tuple[Mapping[str, int], ...] = ()
    unpacked: int = 0

    def units(self, offload: str) -> list[int]:
        """Bytes of what travels at once, in the order of its use, were all blocks streamed."""
        if offload == "block":
            return [sum(one.values()) for one in self.blocks]
        return [size for one in self.blocks for size in one.values()]

    def streamed(self, resident: int) -> list[tuple[int, ...]]:
        """Of each part of the blocks that travel, where so many stay on the device."""
        stay = resident_indices(len(self.blocks), resident)
        return [tuple(parts.values()) for index, parts in enumerate(self.blocks) if index not in stay]


@dataclass(frozen=True)
class Reading:
    """Bytes that loading reads; that it needs on a CPU beside the weights, at its worst moment; and of the largest
    tensor, with what it is made from, which passes through RAM on its way to a GPU."""

    stored: int
    beside: int
    largest: int


@dataclass(frozen=True)
class Component:
    """A model.

    kind: "dit", "vae", "t5", "clip" or "wav2vec"; config: as the task has it, or of a VAE as its file tells it; packed:
    None where its files are dense.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    dense: Sizes
    packed: Sizes | None
    reading: Reading

    def sizes(self, mode: str) -> Sizes:
        """mode: "stream" for packed weights."""
        return self.packed if mode == "stream" and self.packed else self.dense

    def describe(self) -> str:
        """As `Source.describe`."""
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.files[0].parent} ({len(self.files)} files)" if self.files else self.name


def components(request: Request, spec: EasyDict) -> dict[str, Component]:
    """By name: "t5", "wav2vec", "clip", "model" or "high" and "low", "vae" and "tae", as far as there is work for them.
    Files that are here are looked into."""
    names = ["t5", *(name for name in ("wav2vec", "clip") if name in spec.files), *expert_names(spec)]
    names += vae_names(request, spec)
    return {name: component(request, spec, name) for name in names}


def component(request: Request, spec: EasyDict, name: str) -> Component:
    checkpoint = checkpoint_of(request, spec)
    kind = checkpoint.kind(name)
    dtypes = {"t5": request.load.t5_dtype, "wav2vec": "fp32", "vae": request.load.vae_dtype}
    dtype = dtypes.get(kind, request.load.dtype)
    known, asked = checkpoint.derived, ("component", name, dtype)
    if asked not in known:
        known[asked] = _component(checkpoint, spec, name, kind, dtype)
    return known[asked]


def _component(checkpoint: Checkpoint, spec: EasyDict, name: str, kind: str, dtype: str) -> Component:
    files = tuple(checkpoint.paths(name))
    config, packed = config_of(spec, kind), None
    dense, reading = _as_released(kind, key(config), dtype)
    try:
        if source := checkpoint.source(name) if files else None:
            config = vae_config(source, spec) if kind == "vae" else config
            makers = {"t5": empty_text_encoder, "clip": empty_clip_encoder, "wav2vec": empty_audio_encoder}
            make = makers.get(kind, lambda _: build(kind, config))
            dense, reading = _prepared(make(source), source, kind, dtype, stream=False)
            if kind in ("dit", "t5") and source.is_quantized():
                packed, reading = _prepared(make(source), source, kind, dtype, stream=True)
    except SwanError:  # a run will refuse it, in these words; the plan goes by the task
        reading = replace(reading, stored=sum(map(size_of, files)))
    return Component(name, kind, config, files, dense, packed, reading)


def as_gguf(dense: Component, gguf_type: str, dtype: str) -> Component:
    """A component as it would be with a GGUF file of that type, as `wan.convert` writes it."""
    packed, reading = _written(dense.kind, key(dense.config), gguf_type, dtype)
    return replace(dense, packed=packed, reading=reading)


@lru_cache(maxsize=64)
def _written(kind: str, config: str, gguf_type: str, dtype: str) -> tuple[Sizes, Reading]:
    models = [build(kind, json.loads(config)) for _ in range(2)]
    return _prepared(models[0], _NotWritten(models[1], gguf_type), kind, dtype, stream=True)


def expert_names(spec: EasyDict) -> list[str]:
    """In the order in which they run."""
    return ["high", "low"] if "experts" in spec else ["model"]


def config_of(spec: EasyDict, kind: str) -> Mapping[str, Any]:
    """What the task file says of a model."""
    return {"dit": spec.dit, "vae": spec.vae, "t5": spec.text, "clip": {}, "wav2vec": spec.get("wav2vec", {})}[kind]


def parameters(spec: EasyDict, vaes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, int]:
    """Number of parameters by component; `dit` is one expert. vaes: by name, where they are not the task's own."""
    kinds = {"text": "t5", "dit": "dit"}
    kinds |= {name: name for name in ("wav2vec", "clip") if name in spec.files}
    counts = {name: count_parameters(spec, kind) for name, kind in kinds.items()}
    return counts | {name: _count("vae", key(config)) for name, config in (vaes or {"vae": spec.vae}).items()}


def count_parameters(spec: EasyDict, kind: str) -> int:
    return _count(kind, key(config_of(spec, kind)))


@lru_cache(maxsize=64)
def _count(kind: str, config: str) -> int:
    return sum(one.numel() for one in build(kind, json.loads(config)).parameters())


def lora_bytes(request: Request) -> dict[str, int]:
    """Bytes that LoRAs take beside packed weights, by the flag that names them: their files' numbers, in fp32."""
    sizes = {}
    for flag, chosen in request.sample.loras.items():
        sizes[flag] = 0
        for path in (Path(path) for path, _ in chosen if Path(path).exists()):
            try:
                source = open_source(path)
                sizes[flag] += 4 * sum(math.prod(source.info(name).shape) for name in source.keys())
            except SwanError:
                sizes[flag] += 2 * size_of(path)
    return sizes


def share(size: int, ranks: int) -> int:
    """Of what is shared out over `ranks`, the part of one, at most."""
    return math.ceil(size / ranks)


@lru_cache(maxsize=64)
def _as_released(kind: str, config: str, dtype: str) -> tuple[Sizes, Reading]:
    model = in_type(build(kind, json.loads(config)), dtype)
    if dtype in KEPT:
        keep_narrow(model, KEPT[dtype])
    counts = [one.numel() for one in model.parameters()]
    return _sizes(model, dtype), Reading(2 * sum(counts), 0, max(one.nbytes for one in model.parameters()))


def _prepared(model: nn.Module, source: Source, kind: str, dtype: str, stream: bool) -> tuple[Sizes, Reading]:
    """Of a model that would be filled from a file. Raises SwanError for one that does not fit."""
    weights = ModelWeights(model, source, kind, dtype=DTYPES[dtype], kept=KEPT.get(dtype), stream=stream)
    held = read = most = largest = heap = 0
    reads = [(stored, size, stored if stored != size else 0) for stored, size in weights.reads()]
    ahead = min(AHEAD_BYTES, sum(passes for *_, passes in reads))
    for stored, size, passes in reads:  # passes: it is read as it is stored, and becomes another
        heap += passes if passes < _SMALL_BYTES else 0
        held, read = held + size, read + stored
        most, largest = max(most, held + max(passes, ahead)), max(largest, size + passes)
    return _sizes(model, dtype), Reading(read, most - held + min(HEAP_BYTES, heap), largest)


def _sizes(model: nn.Module, dtype: str) -> Sizes:
    """As the model is: dense in its type, or with packed layers."""
    blocks = []
    if isinstance(model, WanModel):
        for path, unit in model.units().items():
            parts = {part: getattr(unit, part).named_parameters(f"{path}.{part}") for part in unit.parts}
            streamed = {
                part: _bytes(one for name, one in found if is_streamed(name, one)) for part, found in parts.items()
            }
            blocks.append(streamed)
    elif layers := getattr(getattr(model, "encoder", None), "block", None):
        blocks = [{"layer": _bytes(layer.parameters())} for layer in layers]
    counts = (_made_anew(one, DTYPES[dtype]) for one in model.modules())
    return Sizes(_bytes(model.parameters()), tuple(blocks), max(counts) * DTYPES[dtype].itemsize)


def _made_anew(layer: nn.Module, dtype: torch.dtype) -> int:
    """Weights that a layer makes of those that it keeps, at each use."""
    if isinstance(layer, QuantLinear):
        return math.prod(layer.shape)
    is_wide = isinstance(layer, WideLinear) and layer.weight.dtype != dtype
    return layer.weight.numel() if is_wide else 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


class _NotWritten(Source):
    """A GGUF file of a model as it would be written."""

    def __init__(self, model: nn.Module, gguf_type: str):
        stored = {name: TensorInfo(tuple(one.shape), DTYPES["bf16"]) for name, one in model.state_dict().items()}
        super().__init__([], stored)
        planned = plan_tensors(self, RECIPES[gguf_type])
        self._types = {one.source_name: one.type for one in planned if one.type.torch_name is None}

    def block_type(self, name: str):
        return self._types.get(name)
