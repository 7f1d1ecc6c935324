"""Bytes of the weights of each component, as they lie in memory: dense in the type of the run, or packed. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from easydict import EasyDict

from wan.options import Request
from wan.plan.files import component_files, component_held, size_of
from wan.plan.headers import Held, held_at
from wan.plan.work import block_matrices, kept_fp32, parameters, text_layer_params

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PARTS = ("self_attn", "cross_attn", "ffn")  # of a block, in the order of their use
GGUF_BITS = {"Q8_0": 8.5, "Q4_K_M": 5.3}  # of a weight, over all matrices of a file as `wan.convert` writes it
# The C library keeps freed blocks of less than 32 MB. Measured: decoding at 128 to 512 px, in fp32 and bf16, took 150
# to 380 MB more than its tensors, and hardly any more where every block was given back; loading the VAE, from fp32 to
# bf16, some 250 MB.
HEAP_BYTES = 300_000_000  # at most
REMAP_BYTES = 64 << 20  # a `.pth` is mapped, and its pages stay until so many are read: wan.weights.pth
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|enc\.blk|encoder\.block)\.(\d+)\.(.*)")
_PART_OF = {"self_attn": 0, "attn1": 0, "cross_attn": 1, "attn2": 1, "ffn": 2}
_KEPT_FP32 = re.compile(
    r"(^|\.)(time_embedding|time_embedder|time_projection|time_proj)[._]|modulation$|scale_shift_table$"
)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a component in memory.

    blocks: of the matrices of each block, by its parts; unpacked: of the largest matrix once dequantised, for packed
    ones, one at a time; mapped: what stays in the file on a CPU.
    """

    total: int
    blocks: tuple[tuple[int, ...], ...] = ()
    unpacked: int = 0
    mapped: int = 0

    def units(self, offload: str) -> list[int]:
        """Bytes of what travels at once, in the order of its use, were all blocks streamed."""
        return (
            [sum(one) for one in self.blocks] if offload == "block" else [size for one in self.blocks for size in one]
        )

    @property
    def outside(self) -> int:
        """What no offloading moves."""
        return self.total - sum(map(sum, self.blocks))


@dataclass(frozen=True)
class Component:
    """A model.

    packed: None where its files are dense; load_bytes: what loading needs beside the weights; largest: of its tensors,
    which passes through RAM on its way to a GPU.
    """

    name: str
    files: tuple[Path, ...]
    dense: Sizes
    packed: Sizes | None = None
    load_bytes: int = 0
    largest: int = 0

    def sizes(self, mode: str) -> Sizes:
        """mode: "stream" for packed weights."""
        return self.packed if mode == "stream" and self.packed else self.dense

    def describe(self) -> str:
        """As `Source.describe`."""
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{self.files[0].parent} ({len(self.files)} files)" if self.files else self.name


def components(request: Request, spec: EasyDict) -> dict[str, Component]:
    """By name: "t5", "clip", "vae", and "model" or "high" and "low". Files that are here are looked into."""
    counts = parameters(spec)
    found = {"t5": _encoder(request, spec, "t5", counts["text"])}
    if "clip" in counts:
        found["clip"] = _encoder(request, spec, "clip", counts["clip"])
    for part in dict(spec.get("experts") or {"dit": ""}):
        name = "model" if part == "dit" else part
        found[name] = _transformer(request, spec, part, name)
    found["vae"] = vae_component(request, spec)
    return found


def vae_component(request: Request, spec: EasyDict) -> Component:
    itemsize = ITEMSIZE[request.load.vae_dtype]
    size = parameters(spec)["vae"] * itemsize
    files = tuple(component_files(request, spec, "vae"))
    return Component("vae", files, Sizes(size), None, _load_bytes(files, None, itemsize, size))


def as_gguf(component: Component, spec: EasyDict, kind: str, dtype: str) -> Component:
    """A component as it would be with a GGUF file of type `kind`, see GGUF_BITS."""
    itemsize, dense, is_text = ITEMSIZE[dtype], component.dense, component.name == "t5"
    smaller = GGUF_BITS[kind] / (8 * itemsize)
    blocks = tuple(tuple(int(size * smaller) for size in block) for block in dense.blocks)
    outside = dense.outside * smaller if is_text else dense.outside  # of a text encoder, the table of its tokens
    unpacked = spec.text.dim * spec.text.dim_ffn if is_text else spec.dit.dim * spec.dit.ffn_dim
    packed = Sizes(int(outside) + sum(map(sum, blocks)), blocks, unpacked * itemsize)
    largest = spec.text.vocab * spec.text.dim * itemsize if is_text else component.largest
    return replace(component, packed=packed, load_bytes=int(unpacked * itemsize * smaller), largest=largest)


def expert_names(spec: EasyDict) -> list[str]:
    """In the order in which they run."""
    return ["high", "low"] if "experts" in spec else ["model"]


def lora_bytes(request: Request) -> dict[str, int]:
    """Bytes that LoRAs take beside packed weights, by the flag that names them: their files' numbers, in fp32."""
    sizes = {}
    for flag, chosen in request.sample.loras.items():
        sizes[flag] = 0
        for path in (Path(path) for path, _ in chosen):
            held = held_at(path) if path.is_file() else None
            exists = path.exists()
            sizes[flag] += 4 * sum(one.weights for one in held) if held else 2 * size_of(path) if exists else 0
    return sizes


def _transformer(request: Request, spec: EasyDict, part: str, name: str) -> Component:
    itemsize, layers = ITEMSIZE[request.load.dtype], spec.dit.num_layers
    total = parameters(spec)["dit"] * itemsize + kept_fp32(spec) * (4 - itemsize)
    dense = Sizes(total, (tuple(count * itemsize for count in block_matrices(spec)),) * layers)
    files = tuple(component_files(request, spec, part))
    held = component_held(request, spec, part)
    packed = _packed(held, itemsize, layers) if held else None
    largest = spec.dit.dim * max(6 * spec.dit.dim * 4, spec.dit.ffn_dim * itemsize)  # the projection of time is fp32
    return Component(name, files, dense, packed, _load_bytes(files, held, itemsize, total), largest)


def _encoder(request: Request, spec: EasyDict, part: str, count: int) -> Component:
    itemsize = ITEMSIZE[request.load.t5_dtype if part == "t5" else request.load.dtype]
    layers = spec.text.num_layers if part == "t5" else 0
    blocks = ((text_layer_params(spec) * itemsize,),) * layers if layers else ()
    files = tuple(component_files(request, spec, part))
    held = component_held(request, spec, part)
    packed = _packed(held, itemsize, layers) if held and part == "t5" else None
    if part == "t5" and held is None and files and 0 < sum(map(size_of, files)) < 0.75 * 2 * count:
        stored = sum(map(size_of, files))  # a `.pth` of half the size: fp8 or int8
        packed = Sizes(stored, ((stored // max(layers, 1),),) * layers, itemsize * spec.text.dim * spec.text.dim_ffn)
    load_bytes = _load_bytes(files, held, itemsize, count * itemsize)
    largest = spec.text.vocab * spec.text.dim * itemsize if part == "t5" else 0  # the embeddings, which are read first
    if held is None and files:  # a `.pth`, of which what is read stays mapped
        largest *= 2
        load_bytes = max(load_bytes, largest - count * itemsize)
    return Component(part, files, Sizes(count * itemsize, blocks), packed, load_bytes, largest)


def _packed(held: Sequence[Held], itemsize: int, layers: int) -> Sizes | None:
    """What a file holds, with its quantised matrices as they are stored; None if it has none."""
    if not any(one.itemsize == 0 for one in held):
        return None
    blocks = [[0] * len(PARTS) for _ in range(layers)]
    total = unpacked = mapped = 0
    for one in held:
        is_kept = bool(_KEPT_FP32.search(one.name))
        packed = one.stays_packed and not is_kept
        size = one.stored if packed else one.weights * (4 if is_kept else itemsize)
        total += size
        match = _BLOCK.search(one.name)
        if packed:
            mapped += size
            unpacked = max(unpacked, one.weights * itemsize if match else 0)  # of embeddings, only rows
        if match and one.axes == 2 and int(match[1]) < layers and not is_kept:
            blocks[int(match[1])][_PART_OF.get(match[2].split(".")[0], 0)] += size
    return Sizes(total, tuple(map(tuple, blocks)), unpacked, mapped)


def _load_bytes(files: Sequence[Path], held: Sequence[Held] | None, itemsize: int, dense: int) -> int:
    """What loading needs beside the weights: pages of a mapped `.pth`, or one tensor as stored, if it is converted."""
    if held is None:
        stored = sum(map(size_of, files))
        is_converted = abs(stored - dense) > dense / 10
        return min(REMAP_BYTES, stored) + (min(HEAP_BYTES, stored) if is_converted else 0)
    in_blocks = [one for one in held if _BLOCK.search(one.name) and one.itemsize != itemsize]
    return max((one.stored for one in in_blocks), default=0)


def share(size: int, ranks: int) -> int:
    """Of what is shared out over `ranks`, the part of one, at most."""
    return math.ceil(size / ranks)
