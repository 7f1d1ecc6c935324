"""How long streamed blocks travel, and how much of that computing hides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from wan.plan.machine import Machine
from wan.plan.memory import Workload
from wan.plan.placement import Placement
from wan.plan.weights import expert_names, resident_indices


def exposed_seconds(transfer: Sequence[float], compute: Sequence[float]) -> float:
    """What is waited for, in all: a unit travels while the one before it computes, so the longer of the two counts."""
    return sum(max(0.0, sent - computed) for sent, computed in zip(transfer, compute, strict=True))


def transfers(load: Workload, machine: Machine, placement: Placement) -> dict[str, Any]:
    """Of one forward. A pipeline of disk, RAM and device is as fast as its slowest part."""
    ranks = load.request.load.grid.sequence
    whole = load.forward_flops.total / ranks / machine.flops
    found = {
        "bytes_per_forward": 0,
        "seconds_per_forward": 0.0,
        "compute_seconds_per_forward": whole,
        "exposed_seconds_per_forward": 0.0,
        "is_hidden": True,
        "is_measured": machine.is_measured and placement.blocks_from != "disk",  # nobody measures the disk
    }
    if placement.offload not in ("block", "phase"):
        return found
    rate = machine.disk_rate if machine.device == "cpu" else machine.transfer_rate
    if placement.blocks_from == "disk":
        rate = min(rate, machine.disk_rate)
    name = expert_names(load.spec)[0]
    sizes = load.components[name].sizes(placement.packed.get(name, ""))
    stay = resident_indices(len(sizes.blocks), placement.resident_blocks)
    counts = Counter(part for parts in sizes.blocks for part in parts)
    flops = {part: load.forward_flops.of_part(part) / count for part, count in counts.items()}
    sent, computed = [], []
    for block, parts in enumerate(sizes.blocks):
        travels = [0 if block in stay else size for size in parts.values()]
        work = [flops[part] for part in parts]
        if placement.offload == "block":
            travels, work = [sum(travels)], [sum(work)]
        sent += [size / rate for size in travels]
        computed += [one / ranks / machine.flops for one in work]
    bytes_sent = sum(sum(one.values()) for block, one in enumerate(sizes.blocks) if block not in stay)
    exposed = exposed_seconds(sent, computed)
    return found | {
        "bytes_per_forward": bytes_sent,
        "seconds_per_forward": sum(sent),
        "exposed_seconds_per_forward": exposed,
        "is_hidden": exposed == 0,
    }
