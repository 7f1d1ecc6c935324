"""What lies where: the choice. No torch; the same request and machine give the same placement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from easydict import EasyDict

from wan.errors import UsageError
from wan.plan.machine import CONTEXT_BYTES, Machine
from wan.plan.memory import CUDA_PROCESS_BYTES, PROCESS_BYTES, Workload, memory_by_stage
from wan.plan.text import gigabytes
from wan.plan.weights import Component, expert_names, share
from wan.request import Request

RESIDENT_MARGIN = 1.25  # free memory over that of the dequantised weights: activations, and one packed tensor
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
    """

    offload: str
    resident_blocks: int
    blocks_from: str = ""
    next_expert: str = ""
    text: str = "device"
    packed: Mapping[str, str] = field(default_factory=dict)
    released: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "released", tuple(self.released))  # a list, where it comes from JSON


@dataclass(frozen=True)
class Decision:
    """A placement, the peaks of its stages, and lines that tell why."""

    placement: Placement
    memory: dict[str, dict[str, int]]
    notes: tuple[str, ...]


def choose(request: Request, spec: EasyDict, machine: Machine) -> Placement:
    """The placement of a run. Raises UsageError, one line, where it does not fit into --vram_gb or --ram_gb."""
    return decide(Workload(request, spec), machine).placement


def decide(load: Workload, machine: Machine) -> Decision:
    """The first placement that fits, the fastest first; else the smallest, with a note, or an error for a budget."""
    tried: list[tuple[Placement, dict, tuple[str, ...]]] = []
    for placement, notes in _candidates(load, machine):
        memory = memory_by_stage(load, machine.device, placement)
        tried.append((placement, memory, notes))
        if not _excess(memory, machine):
            return Decision(placement, memory, notes)
    # What is over in the smallest one as well does not depend on the choice, which is only of the DiT's place.
    hopeless = _excess(tried[-1][1], machine).keys()
    fits = [one for one in tried if _excess(one[1], machine).keys() <= hopeless]
    placement, memory, notes = fits[-1 if "denoise" in hopeless else 0]
    return Decision(placement, memory, (*notes, _refusal(load, machine, placement, memory)))


def resident_indices(count: int, resident: int) -> set[int]:
    """Which of `count` blocks stay on the device: so many, evenly spread, so that the others have time to arrive."""
    return {(2 * index + 1) * count // (2 * resident) for index in range(resident)}


# Candidates


def _candidates(load: Workload, machine: Machine) -> Iterator[tuple[Placement, tuple[str, ...]]]:
    """Placements to try, the fastest first, the smallest last; with notes on what they made of "auto"."""
    request, layers = load.request, load.spec.dit.num_layers
    names = _FASTEST_FIRST if request.offload == "auto" else (request.offload,)
    if machine.device == "mps" and request.offload in ("block", "phase"):
        what = f"--offload {request.offload} streams to the CPU and to CUDA, not to mps"
        raise UsageError(f"{what}: use --offload model or none")
    if request.offload == "auto" and (request.dit_fsdp or machine.device == "mps"):
        names = ("model",)
    if request.resident_blocks is not None and request.resident_blocks >= layers:
        names = ("model",)
    for name in names:
        if name in ("none", "model"):
            yield from _whole(load, machine, name)
            continue
        for source in ("disk",) if machine.device == "cpu" else ("ram", "disk"):
            base, notes = _base(load, machine, name, all_packed=False)
            base = replace(base, blocks_from=source)
            if request.resident_blocks is not None:
                yield replace(base, resident_blocks=request.resident_blocks), notes
                continue
            yield replace(base, resident_blocks=_most_resident(load, machine, base)), notes


def _whole(load: Workload, machine: Machine, name: str) -> Iterator[tuple[Placement, tuple[str, ...]]]:
    """The DiT stays whole. Quantised weights are dequantised if that fits."""
    for all_packed in (False, True):
        base, notes = _base(load, machine, name, all_packed)
        if all_packed and (load.request.gguf_mode != "auto" or not any(base.packed.values())):
            return
        if machine.device == "cuda" and base.next_expert == "disk":
            ahead = replace(base, next_expert="ram")
            if not _excess(memory_by_stage(load, machine.device, ahead), machine):
                yield ahead, notes
        yield base, notes


def _base(load: Workload, machine: Machine, name: str, all_packed: bool) -> tuple[Placement, tuple[str, ...]]:
    """A placement with all blocks on the device, or none; where the text encoder goes; what stays packed."""
    request = load.request
    is_whole = name in ("none", "model")
    next_expert = "" if len(load.experts) == 1 else "device" if name == "none" else "disk"
    layers = load.spec.dit.num_layers
    base = Placement(name, layers if is_whole else 0, "", next_expert, released=_released(request, load.spec, name))
    places = ["device", *(["stream"] if machine.device == "cuda" else []), "cpu"]
    if request.t5_cpu:
        places = ["cpu"]
    elif machine.device == "cpu" or request.t5_fsdp:  # which shares the layers out, where they compute
        places = ["device"]
    ways = []
    for place in places:
        for text_packed in (all_packed, True) if request.gguf_mode == "auto" else (all_packed,):
            packed, notes = _packed_modes(load, machine, name, place, (text_packed, all_packed))
            ways.append((replace(base, text=place, packed=packed), notes))
    for way in ways:
        if "encode_text" not in _excess(memory_by_stage(load, machine.device, way[0]), machine):
            return way
    return ways[-1]


def _released(request: Request, spec: EasyDict, name: str) -> tuple[str, ...]:
    kept = name == "none"
    keeps_vae = kept if request.vae_offload is None else not request.vae_offload
    models = () if kept else ("t5", "clip", *expert_names(spec))
    return (*models, *(() if keeps_vae else ("vae",)))


def _most_resident(load: Workload, machine: Machine, base: Placement) -> int:
    """As many blocks as fit on the device, less than all; 0 if not even that fits."""
    layers = load.spec.dit.num_layers
    for count in range(layers - 1, 0, -1):
        one = replace(base, resident_blocks=count)
        if "denoise" not in _excess(memory_by_stage(load, machine.device, one), machine):
            return count
    return 0


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
        modes[part] = request.gguf_mode if component.packed else ""
        dense = component.dense.total
        if request.t5_fsdp if part == "t5" else request.dit_fsdp:
            dense = share(dense, request.grid.size)
        if modes[part] == "auto":
            is_streamed = part != "t5" and name in ("block", "phase")
            fits = RESIDENT_MARGIN * dense <= free[where]
            stays = is_streamed or all_packed[part != "t5"] or not fits
            modes[part] = "stream" if stays else "resident"
            notes.append(_mode_note(component, request.dtype, dense, free[where], modes[part], is_streamed))
        if name == "none":
            free[where] -= component.packed.total if modes[part] == "stream" else dense
    return modes, tuple(notes)


def _mode_note(component: Component, dtype: str, dense: int, free: float, mode: str, is_streamed: bool) -> str:
    reason = f"{dtype} weights would take {gigabytes(dense)} of {gigabytes(max(free, 0))} free"
    if is_streamed:
        reason = "blocks are streamed"
    return f"{component.describe()}: {reason}, so gguf_mode is {mode}"


def _free(machine: Machine) -> dict[str, float]:
    """For weights, where nothing is loaded yet."""
    if machine.device == "cpu":
        return {"device": machine.ram_bytes - PROCESS_BYTES}
    device = float("inf") if machine.vram_bytes is None else machine.vram_bytes - CONTEXT_BYTES
    return {"device": device, "ram": machine.ram_bytes - CUDA_PROCESS_BYTES}


# What does not fit


def _excess(memory: Mapping[str, Mapping[str, int]], machine: Machine) -> dict[str, dict[str, int]]:
    """Stage -> by how much it is over, by "device" and "ram"; stages that fit are left out."""
    limits = {"device": machine.vram_bytes, "ram": machine.ram_bytes}
    over = {}
    for stage, sizes in memory.items():
        found = {where: size - limits[where] for where, size in sizes.items() if limits[where] is not None}
        if found := {where: size for where, size in found.items() if size > 0}:
            over[stage] = found
    return over


def _refusal(load: Workload, machine: Machine, placement: Placement, memory: Mapping[str, Mapping[str, int]]) -> str:
    """One line on the stage that is most over. Raised where the budget was given, else returned."""
    request, budgets = load.request, {"device": load.request.vram_bytes, "ram": load.request.ram_bytes}
    over = [(size, stage, where) for stage, by in _excess(memory, machine).items() for where, size in by.items()]
    given = [one for one in over if budgets[one[2]] is not None]
    excess, stage, where = max(given or over)
    limit = machine.vram_bytes if where == "device" else machine.ram_bytes
    what = "GPU memory" if where == "device" else "memory"
    flag = "--vram_gb" if where == "device" else "--ram_gb"
    told = f"{flag} {budgets[where] / 1e9:g}" if given else f"{gigabytes(limit)} that are free"
    needs = f"{gigabytes(memory[stage][where])} of {what}, {gigabytes(excess)} more than {told}"
    line = f"{stage} needs {needs}; {', '.join(_remedies(request, load, placement, stage, where, machine))}"
    if given:
        raise UsageError(line)
    return f"warning: {line}"


def _remedies(
    request: Request, load: Workload, placement: Placement, stage: str, where: str, machine: Machine
) -> list[str]:
    """Flags that act on a stage, those that cost least first."""
    larger = request.width * request.height > 832 * 480
    size = "--size 832*480 or smaller" if larger else f"a --size below {request.width}*{request.height}"
    frames = [f"a --frame_num below {request.frame_num}"] if request.frame_num > 1 else []
    offload = ["--offload model"] if placement.offload == "none" else []
    if stage == "encode_text":
        packed = [] if load.components["t5"].packed else ["a GGUF file of the text encoder with --t5_gguf"]
        resident = ["--gguf_mode stream"] if placement.packed.get("t5") == "resident" else []
        on_cpu = ["--t5_cpu"] if where == "device" and placement.text != "cpu" else []
        return [*on_cpu, *offload, *resident, *packed] or [f"a larger {_flag(where)}"]
    if stage in ("encode_image", "decode"):
        tile = request.vae_tile_px
        tiles = ["--vae_tile_px 256"] if not tile or tile > 256 else []
        dtype = ["--vae_dtype bf16"] if request.vae_dtype == "fp32" else []
        vae = ["--vae_offload true"] if request.vae_offload is False else []
        return [*offload, *vae, *dtype, *tiles, size, *frames]
    name = expert_names(load.spec)[0]
    finer = [f"--offload {one}" for one in ("block", "phase") if request.offload not in ("auto", "phase", one)]
    finer = [] if request.dit_fsdp else finer
    blocks = [f"a --resident_blocks below {request.resident_blocks}"] if request.resident_blocks else []
    dense = not load.components[name].packed
    flag = "--gguf" if name == "model" else "--gguf_high and --gguf_low"
    packed = [f"a GGUF file with {flag}"] if dense else []
    resident = ["--gguf_mode stream"] if placement.packed.get(name) == "resident" else []
    return [*finer[:1], *blocks, *resident, size, *frames, *packed]


def _flag(where: str) -> str:
    return "--vram_gb" if where == "device" else "--ram_gb"
