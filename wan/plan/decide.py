"""The choice of a placement and, where nothing fits, what would: changes tried together."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from easydict import EasyDict

from wan.cache.policies import POLICIES
from wan.errors import UsageError
from wan.options import Request
from wan.plan.machine import NOTHING, Held, Machine, look_with_torch
from wan.plan.memory import Workload
from wan.plan.placement import MARGIN, Decision, Placement, excess, fitting, least
from wan.plan.smaller import smaller_frames, smaller_sizes
from wan.plan.text import gigabytes
from wan.plan.weights import GGUF_TYPES, Component, expert_names

if TYPE_CHECKING:
    import torch

_MOST_SETS = 300  # of changes that are tried, a few milliseconds each
_MOST_TOLD = 3
_NO_UNITS = "this CPU has no units for bf16, in which it computes several times slower than in fp32"
_OF_VIDEO = frozenset({"tile", "cache", "frames", "size"})
_WHERE = {"device": "GPU memory", "ram": "memory"}


def choose(request: Request, spec: EasyDict, machine: Machine) -> Placement:
    """The placement of a run. Raises UsageError, one line, where it does not fit into --vram_gb or --ram_gb."""
    return decide(Workload(settle_dtype(request, spec, machine)[0], spec), machine).placement


def check_fits(request: Request, spec: EasyDict, machine: Machine) -> None:
    """Raises UsageError, which names what would fit, for a video that is too large for a machine. Offered is what
    belongs to the video: that the models be loaded otherwise is not for whoever asks for it to say."""
    request = settle_dtype(request, spec, machine)[0].changed(vram_bytes=None, ram_bytes=None)  # the machine has them
    load = Workload(request, spec)
    if fitting(load, machine) is None:
        told = "; ".join(_lacks(request, machine, least(load, machine)))
        raise UsageError(f"{told}; {_advice(load, machine, _OF_VIDEO)}")


def measure(
    device: torch.device, request: Request, spec: EasyDict, local_size: int = 1, held: Held = NOTHING
) -> Machine:
    """The machine at the start of a run, with what it can do in the type of the run. held: by models that this process
    may let go of; all else that is in use, by whomever, stays so."""
    return look_with_torch(device, request, local_size, lambda machine: settle_dtype(request, spec, machine)[0], held)


def settle_dtype(request: Request, spec: EasyDict, machine: Machine) -> tuple[Request, tuple[str, ...]]:
    """`request` with its types decided, and notes on why. All else is planned for them.

    On a CPU without units for bf16, where fp32 is several times faster, auto is mixed: the weights stay in bf16, and
    are widened one layer at a time. Where what fp32 takes besides does not fit, and bf16 does, it is bf16.
    """
    settled, load = request.changed(auto_dtype=False, auto_t5_dtype=False), request.load
    if machine.device != "cpu" or machine.has_bf16:
        return settled, ()
    narrow = [name for name in ("dtype", "t5_dtype", "vae_dtype") if getattr(load, name) == "bf16"]
    mixed, asked, slow = [], [], []
    for name in narrow:
        tried = settled.changed(**{name: "mixed"})
        if not getattr(load, f"auto_{name}", False):
            asked.append(name)
        elif _lacking(tried, spec, machine) <= _lacking(settled, spec, machine):
            mixed.append(name)
            settled = tried
        else:
            slow.append(name)
    size = gigabytes(machine.ram_bytes)
    told = (
        (mixed, "auto {be} mixed: weights in bf16, products in fp32"),
        (asked, "bf16 {be} what was asked for"),
        (slow, f"auto {{be}} bf16, for what fp32 takes does not fit into {size}"),
    )
    notes = []
    for names, what in told:
        if names:
            flags, be = " and ".join(f"--{name}" for name in names), "is" if len(names) == 1 else "are"
            notes.append(f"{'' if names is mixed else 'warning: '}{_NO_UNITS}: {flags} {what.format(be=be)}")
    return settled, tuple(notes)


def _lacking(request: Request, spec: EasyDict, machine: Machine) -> set[str]:
    """Stages that do not fit, whatever is done."""
    load = Workload(request, spec)
    return set(excess((fitting(load, machine) or least(load, machine)).memory, machine))


def decide(load: Workload, machine: Machine) -> Decision:
    """The first placement that fits, the fastest first; else the smallest, with a note, or an error for a budget."""
    decision = fitting(load, machine)
    if decision is not None:
        return decision
    decision = least(load, machine)
    over = excess(decision.memory, machine)
    line = f"{'; '.join(_lacks(load.request, machine, decision))}; {_advice(load, machine)}"
    budgets = {"device": load.request.load.vram_bytes, "ram": load.request.load.ram_bytes}
    if any(budgets[where] is not None for by in over.values() for where in by):
        raise UsageError(line)
    return replace(decision, notes=(*decision.notes, f"warning: {line}"))


def _lacks(request: Request, machine: Machine, decision: Decision) -> list[str]:
    """Every stage that does not fit, and by how much; the worst first."""
    told = []
    for stage, by in excess(decision.memory, machine).items():
        for where, size in by.items():
            if where == "device":
                flag, budget, limit = "--vram_gb", request.load.vram_bytes, machine.vram_bytes
            else:
                flag, budget, limit = "--ram_gb", request.load.ram_bytes, machine.ram_bytes
            than = f"{gigabytes(limit)} that are free" if budget is None else f"{flag} {budget / 1e9:g}"
            needs = gigabytes(decision.memory[stage][where] * (1 + MARGIN))
            told.append((size, f"{stage} needs {needs} of {_WHERE[where]}, {gigabytes(size)} more than {than}"))
    return [line for _, line in sorted(told, reverse=True)]


# What would fit


@dataclass(frozen=True)
class Change:
    """what: on the command line; group: of which one is taken at most, its changes one further than the other; made_by:
    commands that make the files it names."""

    what: str
    group: str
    apply: Callable[[Workload], Workload]
    made_by: tuple[str, ...] = ()


def _advice(load: Workload, machine: Machine, groups: frozenset[str] | None = None) -> str:
    """The fewest changes that make it fit together, up to three such sets; else what is needed with all of them.

    groups: of the changes that may be made; None: all
    """
    changes = [one for one in _changes(load, machine) if groups is None or one.group in groups]
    furthest = tuple({one.group: one for one in changes}.values())
    if not changes or not _fits(load, machine, furthest):
        decision = least(_applied(load, furthest), machine)
        told = [
            f"{gigabytes(decision.memory[stage][at] * (1 + MARGIN))} of {_WHERE[at]} to {stage}"
            for stage, by in excess(decision.memory, machine).items()
            for at in by
        ]
        with_all = f"with {_listed(furthest)}" if furthest else "and nothing can be left out"
        return f"it does not fit in any way: {with_all} it still needs {' and '.join(told)}"
    found = list(_fewest(load, machine, changes, _without_needless(load, machine, furthest)))
    commands = dict.fromkeys(command for some in found for one in some for command in one.made_by)
    made = f"; a GGUF file is made by: {' && '.join(commands)}" if commands else ""
    return f"it fits with {', or with '.join(map(_listed, found))}{made}"


def _fewest(
    load: Workload, machine: Machine, changes: Sequence[Change], enough: tuple[Change, ...]
) -> Iterator[tuple[Change, ...]]:
    """Sets that fit and have the fewest changes, at most as many as `enough`: up to three, of different groups."""
    tried, told = 0, set()
    for count in range(1, len(enough) + 1):
        for some in combinations(changes, count):
            groups = tuple(one.group for one in some)
            if len(set(groups)) < count or groups in told:
                continue
            tried += 1
            if tried > _MOST_SETS or len(told) == _MOST_TOLD:
                break
            if _fits(load, machine, some):
                told.add(groups)
                yield some
        if told:
            return
    yield enough


def _without_needless(load: Workload, machine: Machine, changes: Sequence[Change]) -> tuple[Change, ...]:
    """The changes but for those without which it fits as well; what costs most goes first."""
    kept = list(changes)
    for one in reversed(changes):
        rest = [other for other in kept if other is not one]
        if _fits(load, machine, rest):
            kept = rest
    return tuple(kept)


def _fits(load: Workload, machine: Machine, changes: Sequence[Change]) -> bool:
    return fitting(_applied(load, changes), machine) is not None


def _applied(load: Workload, changes: Sequence[Change]) -> Workload:
    for one in changes:
        load = one.apply(load)
    return load


def _listed(changes: Sequence[Change]) -> str:
    return " and ".join(one.what for one in changes)


def _changes(load: Workload, machine: Machine) -> Iterator[Change]:
    """What can be changed in this request, by what it costs: first what costs no quality, then what costs little."""

    def change(what: str, group: str, **fields) -> Change:
        return Change(what, group, lambda one: one.changed(**fields))

    request, spec = load.request, load.spec
    options, sample = request.load, request.sample
    if options.dtype == "fp32" and spec.get("dtype", "bf16") == "bf16":
        yield change("--dtype bf16", "dtype", dtype="bf16")
    if options.resident_blocks:
        yield change("--resident_blocks auto", "offload", resident_blocks=None)
    ways = ("none", "model", "block", "phase")
    if options.offload in ways and not options.may_offload:
        allowed = ways if machine.device != "mps" and not options.dit_fsdp else ways[:2]
        for name in allowed[ways.index(options.offload) + 1 :]:
            yield change(f"--offload {name}", "offload", offload=name, resident_blocks=None)
    for name in ("t5_offload", "clip_offload", "vae_offload"):
        if getattr(options, name) is False:
            yield change(f"--{name} true", name, **{name: True})
    if options.gguf_mode == "resident" and any(one.packed for one in load.components.values()):
        yield change("--gguf_mode stream", "gguf_mode", gguf_mode="stream")
    if machine.device != "cpu" and not options.t5_cpu:
        yield change("--t5_cpu", "t5_cpu", t5_cpu=True)
    if sample.cache and sample.cache["cache_device"] != "cpu" and machine.device != "cpu":
        yield change("--cache_device cpu", "cache", cache={**sample.cache, "cache_device": "cpu"})
    if sample.vae_tile_px is not None:  # else it is in tiles already, where that helps
        for tile in (256, 128):
            if 8 * spec.vae_stride[1] <= tile < (sample.vae_tile_px or max(sample.width, sample.height)):
                yield change(f"--vae_tile_px {tile}", "tile", vae_tile_px=tile)
    if options.vae_dtype == "fp32":
        yield change("--vae_dtype bf16", "vae_dtype", vae_dtype="bf16")
    if sample.cache:
        flags = " and ".join(f"--{name}" for name in POLICIES if sample.cache.get(name))
        yield change(f"no {flags}", "cache", cache={})
    for kind in GGUF_TYPES:
        yield from _gguf_changes(load, kind)
    for frames in smaller_frames(request):
        yield change(f"--frame_num {frames}", "frames", frame_num=frames)
    for size in smaller_sizes(request, spec):
        yield change(f"--size {size.flag}", "size", size=size.flag, width=size.width, height=size.height)


def _gguf_changes(load: Workload, kind: str) -> Iterator[Change]:
    """The text encoder, and the DiT, from GGUF files; with the command that makes them."""
    experts = expert_names(load.spec)
    for group, names in (("t5", ("t5",)), ("dit", tuple(experts))):
        parts = [load.components[name] for name in names]
        shared = load.request.load.t5_fsdp if group == "t5" else load.request.load.dit_fsdp
        if shared or any(one.packed for one in parts):
            continue
        flags, commands = [], []
        for one in parts:
            part = "dit" if one.name == "model" else one.name
            flag = {"t5": "--t5_gguf", "model": "--gguf"}.get(one.name, f"--gguf_{one.name}")
            (source, fetch), made = _source_of(load.request, one), f"{part}-{kind}.gguf"
            flags.append(f"{flag} {made}")
            where = f"--checkpoint-dir {shlex.quote(source)} --output {made}"
            commands += [*fetch, f"python -m wan.convert --type {kind} --component {part} {where}"]
        yield Change(
            " ".join(flags),
            f"{group} gguf",
            lambda one, names=names: one.changed(gguf=dict.fromkeys(names, kind)),
            tuple(commands),
        )


def _source_of(request: Request, component: Component) -> tuple[str, list[str]]:
    """What the converter reads: the file of a component, its folder, or the checkpoint's; and the command that fetches
    that where it is a hub id."""
    files = component.files
    if files:
        return str(files[0] if len(files) == 1 else files[0].parent), []
    if os.path.exists(request.load.ckpt_dir):
        return request.load.ckpt_dir, []
    name, _, revision = request.load.ckpt_dir.partition("@")
    folder = name.rpartition("/")[2]
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return folder, [f"hf download {shlex.quote(name)}{at} --local-dir {shlex.quote(folder)}"]
