"""The plan as lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "MPS"}


def format_plan(plan: Mapping[str, Any]) -> str:
    """All of the plan, as --dry_run prints it."""
    work = plan["tflop_per_forward"]
    parts = ", ".join(f"{name.replace('_', ' ')} {_short(work[name])}" for name in work if name != "total")
    steps = str(plan["steps"])
    if "steps_by_expert" in plan:
        steps += " ({high} high-noise, {low} low-noise)".format(**plan["steps_by_expert"])
    shift = "" if plan["shift"] is None else f", shift {plan['shift']:g}"
    phases = f", by phase: {plan['phases']}" if plan["phases"] else ""
    clips = f" in {plan['clips']} clips" if plan["clips"] > 1 else ""
    lines = [
        f"task        {plan['task']}: {plan['title']}",
        f"video       {plan['size']}, {plan['frames']} frames{clips} at {plan['fps']} fps, seed {plan['seed']}",
        f"latent      {'x'.join(map(str, plan['latent_shape']))}, {plan['tokens']} tokens",
        f"sampling    {plan['solver']}, {steps} steps, {plan['forwards']} forwards{shift}{phases}",
        f"work        {_short(work['total'])} TFLOP a forward ({parts}), {_short(plan['tflop_total'])} TFLOP in all",
        "types       " + ", ".join(f"{name} {dtype}" for name, dtype in plan["dtypes"].items()),
        "parameters  " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan["parameters"].items()),
        f"machine     {_machine(plan['machine'])}",
        f"placement   {_placement(plan)}",
        *(
            f"weights     {row['component']:<13} {_bytes(row['bytes'])} on {row['where']}, {row['until']}"
            for row in plan["weights"]
        ),
        *(f"memory      {stage:<13} {_sizes(sizes)}" for stage, sizes in plan["memory_bytes"].items()),
        f"margin      {plan['margin']:.0%} of each peak stay free, for estimates were off by as much when measured",
        *([f"transfers   {_transfers(plan['transfers'])}"] if plan["transfers"]["bytes_per_forward"] else []),
        f"time        {_time(plan)}",
        *([f"shorter     {_shorter(plan)}"] if plan["shorter"] else []),
        *(f"note        {note}" for note in plan["notes"]),
        *(_rank_lines(plan["ranks"]) if "ranks" in plan else []),
        *(_file_line(row) for row in plan["files"]),
        *([f"output      {plan['save_file']}"] if plan["save_file"] else []),
    ]
    return "\n".join(lines)


def start_lines(plan: Mapping[str, Any]) -> list[str]:
    """What is printed at the start of a run: where weights lie, peaks, transfers, how long it takes, notes."""
    peaks = {}
    for stage, sizes in plan["memory_bytes"].items():
        for where, size in sizes.items():
            peaks[where] = max(peaks.get(where, (0, "")), (size, stage))
    told = [f"{gigabytes(size)} of {_where(where)} ({stage})" for where, (size, stage) in peaks.items()]
    margin = f"{plan['margin']:.0%} more stay free, for estimates err"
    lines = [f"placement: {_placement(plan)}", f"peaks, estimated: {', '.join(told)}; {margin}"]
    if plan["transfers"]["bytes_per_forward"]:
        lines.append(f"transfers: {_transfers(plan['transfers'])}")
    lines.append(f"time: {_time(plan)}")
    if plan["shorter"]:
        lines.append(f"shorter: {_shorter(plan)}")
    return lines + list(plan["notes"])


def duration(seconds: float) -> str:
    """In the two largest units that matter: "<1 s", "45 s", "12 min", "3 h 20 min", "2 days 5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 0.95 else "<1 s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if hours < 10 and minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days:,} days {hours} h" if days < 10 and hours else f"{days:,} days"


def gigabytes(size: float) -> str:
    return "unlimited" if math.isinf(size) else f"{size / 1e9:.1f} GB"


def _where(key: str) -> str:
    return "GPU memory" if key == "device" else "memory"


def _machine(machine: Mapping[str, Any]) -> str:
    vram = machine["vram_bytes"]
    gpu = "" if machine["device"] == "cpu" else f"{gigabytes(vram) if vram else 'unknown'} of GPU memory, "
    rate = "" if machine["device"] == "cpu" else f", {machine['transfer_rate'] / 1e9:.3g} GB/s to it"
    origin = "measured" if machine["is_measured"] else "rates assumed"
    rates = f"{machine['flops'] / 1e12:.3g} TFLOP/s{rate} ({origin})"
    return f"{_DEVICES[machine['device']]}; {gpu}{gigabytes(machine['ram_bytes'])} of memory to use; {rates}"


def _placement(plan: Mapping[str, Any]) -> str:
    placed, device = plan["placement"], _DEVICES[plan["machine"]["device"]]
    how = {
        "none": "all models stay",
        "model": "each model is released after its stage",
        "block": "blocks of the DiT come as they are used",
        "phase": "the parts of each block of the DiT come as they are used",
    }[placed["offload"]]
    parts = [f"offload {placed['offload']} ({how})"]
    if placed["blocks_from"]:
        source = "RAM" if placed["blocks_from"] == "ram" else "disk"
        parts.append(
            f"{placed['resident_blocks']} of {plan['blocks']} blocks stay on the {device}, others from {source}"
        )
    if device != "CPU":
        text = {"device": f"on the {device}", "cpu": "on the CPU", "stream": f"layer by layer to the {device}"}
        parts.append(f"text encoder {text[placed['text']]}")
    if placed["next_expert"] in ("ram", "disk"):
        way = "read into RAM meanwhile" if placed["next_expert"] == "ram" else "from disk when its turn comes"
        parts.append(f"second expert {way}")
    modes = [f"{name} {mode}" for name, mode in placed["packed"].items() if mode]
    return "; ".join(parts + ([f"quantised weights: {', '.join(modes)}"] if modes else []))


def _sizes(sizes: Mapping[str, int]) -> str:
    told = ", ".join(f"{_bytes(size)} of {_where(where)}" for where, size in sizes.items())
    return f"{told} (estimate)"


def _transfers(sent: Mapping[str, Any]) -> str:
    seconds, work = sent["seconds_per_forward"], sent["compute_seconds_per_forward"]
    hidden = "hidden" if sent["is_hidden"] else f"{_seconds(sent['exposed_seconds_per_forward'])} of it not hidden"
    origin = "" if sent["is_measured"] else " (rates assumed)"
    amount = f"{_bytes(sent['bytes_per_forward'])} a forward in {_seconds(seconds)}"
    return f"{amount}, beside {_seconds(work)} of computing: {hidden}{origin}"


def _time(plan: Mapping[str, Any]) -> str:
    stages = ", ".join(f"{stage} {duration(value)}" for stage, value in plan["seconds"].items() if stage != "total")
    origin = "rates measured, but for the disk's" if plan["machine"]["is_measured"] else "rates assumed"
    return f"about {duration(max(plan['seconds']['total'], 1))} on this machine ({stages}; an estimate, {origin})"


def _shorter(plan: Mapping[str, Any]) -> str:
    told = []
    for one in plan["shorter"]:
        takes = "" if one["seconds"] is None else f" (about {duration(one['seconds'])})"
        told.append(one["change"] + takes)
    return ", or ".join(told)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"


def _rank_lines(ranks: Mapping[str, Any]) -> list[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in ranks["grid"].items() if size > 1)
    sent = ", ".join(f"{_bytes(size)} by {axis}" for axis, size in ranks["sent_bytes"].items() if size)
    shared = f", weights shared out: {', '.join(ranks['weights_shared'])}" if ranks["weights_shared"] else ""
    each = f"{_range(ranks['tokens'])} tokens, {_range(ranks['heads'])} heads"
    count = math.prod(ranks["grid"].values())
    return [f"processes   {count}: {axes}; each {each}, sends {sent or 'no tokens'} a forward{shared}"]


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"


def _file_line(row: Mapping[str, Any]) -> str:
    state = "from the hub" if row["hub"] else "MISSING" if row["bytes"] is None else _bytes(row["bytes"])
    return f"file        {row['component']:<9} {row['path']} ({state})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
