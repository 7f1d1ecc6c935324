"""The plan of a run: what is computed, what lies where and what that takes, decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from easydict import EasyDict

from wan.distributed.grid import attention_bytes, split
from wan.options import Request
from wan.plan.decide import decide, settle_dtype
from wan.plan.duration import shorter, stage_seconds
from wan.plan.files import check_one_quantised, find_files
from wan.plan.machine import Machine
from wan.plan.memory import Workload, memory_by_stage
from wan.plan.placement import MARGIN, Placement
from wan.plan.runs import DTYPES
from wan.plan.transfers import transfers
from wan.plan.weights import expert_names, parameters

# Of a forward. Threads of so small a network, whose kernels take microseconds, spin for each other: where anything else
# runs on the machine, for as long as the system gives the other one no core, and a run takes ten times as long.
_SMALL_FLOPS = 4e9


@dataclass(frozen=True)
class Plan:
    """load: the run, its type decided; memory: peak bytes by stage, {"device", "ram"} (on a CPU "ram" alone), of one
    process, of several the first; notes: lines on what was decided, warnings among them."""

    load: Workload
    machine: Machine
    placement: Placement
    memory: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, request: Request, spec: EasyDict, machine: Machine) -> Plan:
        """Raises UsageError where a budget is too small, see `decide`, or two files hold the same quantised network."""
        check_one_quantised(request, spec)
        request, notes = settle_dtype(request, spec, machine)
        load = Workload(request, spec)
        decision = decide(load, machine)
        return cls(load, machine, decision.placement, decision.memory, (*notes, *decision.notes))

    @property
    def request(self) -> Request:
        return self.load.request

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By stage and in all."""
        return stage_seconds(self.load, self.machine, self.placement)

    @property
    def threads(self) -> int | None:
        """That compute on a CPU; None: as many as torch has."""
        is_small = self.load.forward_flops.total < _SMALL_FLOPS
        return 1 if self.machine.device == "cpu" and is_small else None

    def to_json(self) -> dict[str, Any]:
        """Everything that --dry_run tells. `files` rows have bytes = None for a file that is missing; shorter: what
        would take less where that is long; margin: share of each peak that stays free."""
        request, spec, load = self.request, self.load.spec, self.load
        flops = load.forward_flops
        data = {
            "task": spec.name,
            "title": spec.title,
            "size": f"{request.sample.width}x{request.sample.height}",
            "frames": load.kind.frames(request.sample),
            "clips": load.clips,
            "fps": request.sample.fps,
            "seed": request.sample.seed,
            "solver": request.sample.solver,
            "shift": request.sample.shift,
            "guide_scale": list(request.sample.guide_scale),
            "phases": request.sample.phases,
            "files": find_files(request, spec),
            "dtypes": {"dit": request.load.dtype, "t5": request.load.t5_dtype, "vae": request.load.vae_dtype},
            "latent_shape": list(load.latent),
            "tokens": load.all_tokens,
            "steps": request.sample.steps,
            "forwards": load.forwards,
            "tflop_per_forward": {part: one / 1e12 for part, one in flops.by_kind().items()}
            | {"total": flops.total / 1e12},
            "tflop_total": load.forwards * flops.total / 1e12,
            "parameters": parameters(spec, load.vae_configs),
            "threads": self.threads,
            "blocks": len(load.components[load.experts[0]].dense.blocks),
            "machine": asdict(self.machine),
            "placement": asdict(self.placement) | {"released": list(self.placement.released)},
            "memory_bytes": self.memory,
            "weights": self._weights(),
            "transfers": transfers(load, self.machine, self.placement),
            "seconds": self.seconds,
            "shorter": shorter(load, self.machine, self.seconds),
            "margin": MARGIN,
            "notes": list(self.notes),
            "save_file": request.output.save_file if request.output else None,
        }
        if "experts" in spec:
            data["steps_by_expert"] = {name: load.expert_of_step.count(name) for name in expert_names(spec)}
        if request.load.grid.size > 1:
            data["ranks"] = self._ranks()
        return data

    def _weights(self) -> list[dict[str, Any]]:
        """One row for each component and place: component, where ("GPU", "RAM" or "disk"), bytes, until when."""
        load, placement, rows = self.load, self.placement, []
        here = "RAM" if self.machine.device in ("cpu", "mps") else "GPU"
        stage_of = {"t5": "encode_text", "wav2vec": "encode_audio", "clip": "encode_image"}
        stage_of |= {"vae": "encode_image", load.decoder: "decode"}
        for name, component in load.components.items():
            if component.kind == "dit" and name not in load.experts:
                continue
            sizes = component.sizes(placement.packed.get(name, ""))
            until = f"for {stage_of.get(name, 'denoise')}" if name in placement.released else "to the end"
            where = "RAM" if name == "t5" and placement.text != "device" else here
            parts = {where: sizes.total}
            if component.kind == "dit" and placement.blocks_from:
                streamed = sum(map(sum, sizes.streamed(placement.resident_blocks)))
                parts = {where: sizes.total - streamed, "RAM" if placement.blocks_from == "ram" else "disk": streamed}
            rows += [{"component": name, "where": at, "bytes": size, "until": until} for at, size in parts.items()]
        return rows

    def _ranks(self) -> dict[str, Any]:
        """How the work is shared among processes. sent_bytes: by a rank for one forward, on average, by axis;
        memory_bytes_but_of_first: as `memory`, of those that do not encode."""
        request, dit, tokens = self.request, self.load.spec.dit, self.load.all_tokens
        sent = attention_bytes(request.load.grid, tokens, dit.dim, DTYPES[request.load.dtype].itemsize)
        shared = (("dit", request.load.dit_fsdp), ("t5", request.load.t5_fsdp))
        others = memory_by_stage(self.load, self.machine.device, self.placement, is_first=False)
        return {
            "grid": request.load.grid._asdict(),
            "tokens": split(tokens, request.load.grid.sequence),
            "heads": split(dit.num_heads, request.load.grid.ulysses),
            "sent_bytes": {axis: round(size) * dit.num_layers for axis, size in sent.items()},
            "weights_shared": [name for name, is_shared in shared if is_shared],
            "memory_bytes_but_of_first": others,
        }


def make_plan(request: Request, spec: EasyDict, machine: Machine) -> dict[str, Any]:
    """`Plan.of(...)` as JSON data."""
    return Plan.of(request, spec, machine).to_json()
