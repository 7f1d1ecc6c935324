"""What lies where: the ways there are, and the first that fits. A request and a machine give the same one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from wan.errors import UsageError
from wan.plan.machine import CONTEXT_BYTES, CUDA_PROCESS_BYTES, PROCESS_BYTES, Machine
from wan.plan.memory import Workload, memory_by_stage
from wan.plan.runs import KEPT
from wan.plan.text import gigabytes
from wan.plan.weights import Component, expert_names, share

RESIDENT_MARGIN = 1.25  # free memory over that of the dequantised weights: activations, and one packed tensor
# Of each peak, stays free: measured peaks were up to 4.7 % above the planned ones, benchmarks.plan_memory.
MARGIN = 0.05
TILES_PX = (512, 256, 128)  # of the VAE, where it needs them; larger ones compute less twice
_FASTEST_FIRST = ("model", "block", "phase")


@dataclass(frozen=True)
class Placement:
    """offload: "none", "model", "block" or "phase", decided.

    resident_blocks: of the DiT, on the device; all of them for none and model
    blocks_from: "" | "ram" | "disk": where streamed blocks are kept
    next_expert: "" (one expert) | "device" (both are kept there) | "ram" (loaded into RAM while the first one runs)
                 | "disk" (read when its turn comes, the file read ahead into the system's cache)
    text: "device" | "cpu" | "stream" (layers of the text encoder come to the GPU one by one from RAM)
    packed: component ("t5", "model" or "high"/"low") -> "stream" (stays packed), "resident" (dequantised when loaded),
            "" for files that are not quantised
    released: components that are let go of after their stage
    vae_tile_px: side of the VAE's tiles, 0 for whole frames
    """

    offload: str
    resident_blocks: int
    blocks_from: str = ""
    next_expert: str = ""
    text: str = "device"
    packed: Mapping[str, str] = field(default_factory=dict)
    released: tuple[str, ...] = ()
    vae_tile_px: int = 0

    def __post_init__(self):
        object.__setattr__(self, "released", tuple(self.released))  # a list, where it comes from JSON


@dataclass(frozen=True)
class Decision:
    """A placement, the peaks of its stages, and lines that tell why."""

    placement: Placement
    memory: dict[str, dict[str, int]]
    notes: tuple[str, ...]


def fitting(load: Workload, machine: Machine) -> Decision | None:
    """The first placement that fits, with the VAE in tiles where that is all that is missing; None if there is none."""
    for tile in _tiles(load):
        tiled, may_help = load.changed(vae_tile_px=tile), False
        for placement, notes in _candidates(tiled, machine):
            memory = memory_by_stage(tiled, machine.device, placement)
            over = excess(memory, machine)
            if not over:
                notes = (*notes, _tile_note(tile)) if tile and load.request.sample.vae_tile_px is None else notes
                return Decision(replace(placement, vae_tile_px=tile), memory, notes)
            may_help |= over.keys() <= {"encode_image", "decode"}
        if not may_help:  # smaller tiles
            return None
    return None


def least(load: Workload, machine: Machine) -> Decision:
    """Where nothing fits: the fastest placement in which nothing is over but what is over in all."""
    load = load.changed(vae_tile_px=_tiles(load)[-1])
    tried = [(one, memory_by_stage(load, machine.device, one), notes) for one, notes in _candidates(load, machine)]
    # What is over in the smallest one as well does not depend on the choice, which is only of the DiT's place.
    hopeless = excess(tried[-1][1], machine).keys()
    fits = [one for one in tried if excess(one[1], machine).keys() <= hopeless]
    placement, memory, notes = fits[-1 if "denoise" in hopeless else 0]
    return Decision(replace(placement, vae_tile_px=load.request.sample.vae_tile_px), memory, notes)


def _tiles(load: Workload) -> list[int]:
    """Sides of the VAE's tiles to try, 0 for whole frames."""
    request, stride = load.request, load.spec.vae_stride[1]
    if request.sample.vae_tile_px is not None:
        return [request.sample.vae_tile_px]
    return [0] + [px for px in TILES_PX if px < max(request.sample.width, request.sample.height) and px >= 8 * stride]


def _tile_note(tile: int) -> str:
    return (
        f"the VAE works in tiles of {tile} pixels, for whole frames do not fit: pixels differ slightly from those of"
        f" whole frames; the settings in the video say --vae_tile_px {tile}"
    )


# Candidates


def _candidates(load: Workload, machine: Machine) -> Iterator[tuple[Placement, tuple[str, ...]]]:
    """Placements to try, the fastest first, the smallest last; with notes on what they made of "auto"."""
    request, layers = load.request, load.spec.dit.num_layers
    names = _FASTEST_FIRST if request.load.offload == "auto" else (request.load.offload,)
    if request.load.offload == "none" and request.load.may_offload:
        names = ("none", *_FASTEST_FIRST)
    if machine.device == "mps" and request.load.offload in ("block", "phase"):
        what = f"--offload {request.load.offload} streams to the CPU and to CUDA, not to mps"
        raise UsageError(f"{what}: use --offload model or none")
    if len(names) > 1 and (request.load.dit_fsdp or machine.device == "mps"):
        names = tuple(name for name in names if name in ("none", "model"))
    if request.load.resident_blocks is not None and request.load.resident_blocks >= layers:
        names = ("model",)
    for name in names:
        if name in ("none", "model"):
            yield from _whole(load, machine, name)
            continue
        for source in ("disk",) if machine.device == "cpu" else ("ram", "disk"):
            base, notes = _base(load, machine, name, all_packed=False)
            base = replace(base, blocks_from=source)
            if request.load.resident_blocks is not None:
                yield replace(base, resident_blocks=request.load.resident_blocks), notes
                continue
            yield replace(base, resident_blocks=_most_resident(load, machine, base)), notes


def _whole(load: Workload, machine: Machine, name: str) -> Iterator[tuple[Placement, tuple[str, ...]]]:
    """The DiT stays whole. Quantised weights are dequantised if that fits."""
    for all_packed in (False, True):
        base, notes = _base(load, machine, name, all_packed)
        if all_packed and (load.request.load.gguf_mode != "auto" or not any(base.packed.values())):
            return
        if machine.device == "cuda" and base.next_expert == "disk":
            ahead = replace(base, next_expert="ram")
            if not excess(memory_by_stage(load, machine.device, ahead), machine):
                yield ahead, notes
        yield base, notes


def _base(load: Workload, machine: Machine, name: str, all_packed: bool) -> tuple[Placement, tuple[str, ...]]:
    """A placement with all blocks on the device, or none; where the text encoder goes; what stays packed."""
    request = load.request
    is_whole = name in ("none", "model")
    next_expert = "" if len(load.experts) == 1 else "device" if name == "none" else "disk"
    layers = load.spec.dit.num_layers
    base = Placement(name, layers if is_whole else 0, "", next_expert, released=_released(load, name))
    places = ["device", *(["stream"] if machine.device == "cuda" else []), "cpu"]
    if request.load.t5_cpu:
        places = ["cpu"]
    elif machine.device == "cpu" or request.load.t5_fsdp:  # which shares the layers out, where they compute
        places = ["device"]
    ways = []
    for place in places:
        for text_packed in (all_packed, True) if request.load.gguf_mode == "auto" else (all_packed,):
            packed, notes = _packed_modes(load, machine, name, place, (text_packed, all_packed))
            ways.append((replace(base, text=place, packed=packed), notes))
    for way in ways:
        if "encode_text" not in excess(memory_by_stage(load, machine.device, way[0]), machine):
            return way
    return ways[-1]


def _released(load: Workload, name: str) -> tuple[str, ...]:
    asked, others = load.request.load, name != "none"
    models = ("t5", "wav2vec", "clip", *expert_names(load.spec), *load.vae_configs)
    flags = {"t5": asked.t5_offload, "clip": asked.clip_offload} | dict.fromkeys(load.vae_configs, asked.vae_offload)
    return tuple(one for one in models if (others if flags.get(one) is None else flags[one]))


def _most_resident(load: Workload, machine: Machine, base: Placement) -> int:
    """As many blocks as fit on the device, less than all; 0 if not even that fits."""

    def is_over(count: int) -> bool:
        one = replace(base, resident_blocks=count)
        return "denoise" in excess(memory_by_stage(load, machine.device, one), machine)

    return bisect_left(range(1, load.spec.dit.num_layers), True, key=is_over)  # more blocks need more memory


def _packed_modes(
    load: Workload, machine: Machine, name: str, text: str, all_packed: tuple[bool, bool]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Component -> what becomes of its quantised weights, and notes on what "auto" became.

    all_packed: of the text encoder, of the DiT: not to be dequantised, however much is free.
    """
    request, modes, notes = load.request, {}, []
    free = _free(machine)
    for part in ("t5", *expert_names(load.spec)):
        component = load.components[part]
        where = "ram" if part == "t5" and text != "device" and machine.device != "cpu" else "device"
        modes[part] = request.load.gguf_mode if component.packed else ""
        if modes[part] and part != "t5" and request.load.matmul in ("fp8", "int8"):
            modes[part] = "stream"  # in which they are multiplied
        dense = component.dense.total
        if request.load.t5_fsdp if part == "t5" else request.load.dit_fsdp:
            dense = share(dense, request.load.grid.size)
        if modes[part] == "auto":
            is_streamed = part != "t5" and name in ("block", "phase")
            fits = RESIDENT_MARGIN * dense <= free[where]
            dtype = request.load.t5_dtype if part == "t5" else request.load.dtype
            stays = is_streamed or dtype in KEPT or all_packed[part != "t5"] or not fits
            modes[part] = "stream" if stays else "resident"
            notes.append(_mode_note(component, dtype, dense, free[where], modes[part], is_streamed))
        if name == "none":
            free[where] -= component.packed.total if modes[part] == "stream" else dense
    return modes, tuple(notes)


def _mode_note(component: Component, dtype: str, dense: int, free: float, mode: str, is_streamed: bool) -> str:
    reason = f"{dtype} weights would take {gigabytes(dense)} of {gigabytes(max(free, 0))} free"
    if is_streamed:
        reason = "blocks are streamed"
    elif dtype in KEPT:
        reason = f"they would take {gigabytes(dense)} in fp32, which {dtype} computes in"
    return f"{component.describe()}: {reason}, so gguf_mode is {mode}"


def _free(machine: Machine) -> dict[str, float]:
    """For weights, where nothing is loaded yet."""
    if machine.device == "cpu":
        return {"device": machine.ram_bytes - PROCESS_BYTES}
    device = float("inf") if machine.vram_bytes is None else machine.vram_bytes - CONTEXT_BYTES
    return {"device": device, "ram": machine.ram_bytes - CUDA_PROCESS_BYTES}


# What does not fit


def excess(memory: Mapping[str, Mapping[str, int]], machine: Machine) -> dict[str, dict[str, int]]:
    """Stage -> by how much it is over with its margin, by "device" and "ram"; stages that fit are left out."""
    limits = {"device": machine.vram_bytes, "ram": machine.ram_bytes}
    over = {}
    for stage, sizes in memory.items():
        found = {at: int(size * (1 + MARGIN)) - limits[at] for at, size in sizes.items() if limits[at] is not None}
        if found := {where: size for where, size in found.items() if size > 0}:
            over[stage] = found
    return over
