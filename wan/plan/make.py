"""The plan of a run as plain JSON data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from easydict import EasyDict

from wan.distributed.grid import attention_bytes, split
from wan.options import Request
from wan.plan.decide import decide, settle_dtype
from wan.plan.duration import shorter, stage_seconds
from wan.plan.files import check_one_quantised, find_files
from wan.plan.machine import Machine
from wan.plan.memory import Workload
from wan.plan.placement import MARGIN, Placement
from wan.plan.runs import DTYPES
from wan.plan.transfers import transfers
from wan.plan.weights import expert_names, parameters


def make_plan(request: Request, spec: EasyDict, machine: Machine) -> dict[str, Any]:
    """Everything that --dry_run tells. `files` rows have bytes = None for a file that is missing.

    tflop_per_forward: by part; memory_bytes: by stage, {"device", "ram"} (on a CPU "ram" alone), of each process;
    seconds: by stage and in all, shorter: what would take less where that is long; margin: share of each peak that
    stays free.
    Raises UsageError where a budget is too small, see `decide`, or where two files hold the same quantised network.
    """
    check_one_quantised(request, spec)
    request, dtype_notes = settle_dtype(request, spec, machine)
    load = Workload(request, spec)
    decision = decide(load, machine)
    high_steps = load.expert_of_step.count("high")
    seconds = stage_seconds(load, machine, decision.placement)
    work, total = load.forward_flops.by_kind(), load.forward_flops.total
    plan = {
        "task": spec.name,
        "title": spec.title,
        "size": f"{request.sample.width}x{request.sample.height}",
        "frames": request.sample.frame_num,
        "fps": request.sample.fps,
        "seed": request.sample.seed,
        "solver": request.sample.solver,
        "shift": request.sample.shift,
        "guide_scale": list(request.sample.guide_scale),
        "files": find_files(request, spec),
        "dtypes": {"dit": request.load.dtype, "t5": request.load.t5_dtype, "vae": request.load.vae_dtype},
        "latent_shape": list(load.latent),
        "tokens": load.all_tokens,
        "steps": request.sample.steps,
        "forwards": load.forwards,
        "tflop_per_forward": {name: flops / 1e12 for name, flops in work.items()} | {"total": total / 1e12},
        "tflop_total": load.forwards * total / 1e12,
        "parameters": parameters(spec),
        "blocks": spec.dit.num_layers,
        "machine": asdict(machine),
        "placement": asdict(decision.placement) | {"released": list(decision.placement.released)},
        "memory_bytes": decision.memory,
        "weights": weight_rows(load, machine, decision.placement),
        "transfers": transfers(load, machine, decision.placement),
        "seconds": seconds,
        "shorter": shorter(load, machine, seconds),
        "margin": MARGIN,
        "notes": [*dtype_notes, *decision.notes],
        "save_file": request.output.save_file if request.output else None,
    }
    if "experts" in spec:
        plan["steps_by_expert"] = {"high": high_steps, "low": request.sample.steps - high_steps}
    if request.load.grid.size > 1:
        plan["ranks"] = share_of_ranks(request, spec, load.all_tokens)
    return plan


def weight_rows(load: Workload, machine: Machine, placement: Placement) -> list[dict[str, Any]]:
    """One row for each component and place: component, where ("GPU", "RAM" or "disk"), bytes, until when."""
    experts, rows = expert_names(load.spec), []
    here = "RAM" if machine.device in ("cpu", "mps") else "GPU"
    stage_of = {"t5": "encode_text", "clip": "encode_image", "vae": "decode"}
    for name, component in load.components.items():
        if name in experts and name not in load.experts:
            continue
        sizes = component.sizes(placement.packed.get(name, ""))
        until = f"for {stage_of.get(name, 'denoise')}" if name in placement.released else "to the end"
        where = "RAM" if name == "t5" and placement.text != "device" else here
        parts = {where: sizes.total}
        if name in experts and placement.blocks_from:
            streamed = sum(sizes.units("block")) * (len(sizes.blocks) - placement.resident_blocks) // len(sizes.blocks)
            parts = {where: sizes.total - streamed, "RAM" if placement.blocks_from == "ram" else "disk": streamed}
        rows += [{"component": name, "where": place, "bytes": size, "until": until} for place, size in parts.items()]
    return rows


def share_of_ranks(request: Request, spec: EasyDict, tokens: int) -> dict[str, Any]:
    """How the work is shared among processes. sent_bytes: by a rank for one forward, on average, by axis."""
    grid, dit = request.load.grid, spec.dit
    sent = attention_bytes(grid, tokens, dit.dim, DTYPES[request.load.dtype].itemsize)
    shared = (("dit", request.load.dit_fsdp), ("t5", request.load.t5_fsdp))
    return {
        "grid": grid._asdict(),
        "tokens": split(tokens, grid.sequence),
        "heads": split(dit.num_heads, grid.ulysses),
        "sent_bytes": {axis: round(size) * dit.num_layers for axis, size in sent.items()},
        "weights_shared": [name for name, is_shared in shared if is_shared],
    }
