"""`--dry_run`: the checks and the plan of a run that does not take place. Downloads nothing and loads nothing."""

from __future__ import annotations

import json

import torch
from easydict import EasyDict

from wan.command import put
from wan.errors import SwanError, UsageError
from wan.file_checks import faults, settle_matmul
from wan.memory.residency import attention_of
from wan.models.attention import choose_attention
from wan.options import Request, check_device
from wan.options.phases import check_phase_loras
from wan.plan import Machine, format_plan, look, make_plan, measure, missing_files
from wan.plan.text import gigabytes
from wan.weights.checkpoint import Checkpoint


def dry_run(request: Request, spec: EasyDict, as_json: bool, local_size: int) -> None:
    """Print the plan. Raises what the run would: UsageError, or one SwanError for all files that are wrong or missing.

    A machine that has not the device asked for plans for one that has, with the memory that is asked for and rates that
    are assumed.
    """
    request = request.changed(checkpoint=Checkpoint(request.load.ckpt_dir, spec, request.load.files, partial=True))
    machine, is_here = _machine(request, spec, local_size)
    notes = []
    if is_here:
        _, notes = choose_attention(*attention_of(request.load, spec))
    device = check_device(request.load.device) if is_here else machine.device
    matmul, lines = settle_matmul(request.load.checkpoint, request.load.matmul, device)
    request, notes = request.changed(matmul=matmul), notes + lines
    if is_here and request.sample.cache:
        check_device(request.sample.cache["cache_device"], "cache_device")
    check_phase_loras(request.sample.by_phase, request.sample.loras)
    wrong = faults(request, spec)
    if wrong:
        raise SwanError("; ".join(wrong))
    plan = make_plan(request, spec, machine)
    plan["notes"] = [*plan["notes"], *notes]
    if not is_here:
        plan["notes"].append(_of_no_device(machine))
    told = f"task: {request.load.task}, {request.load.task_told}\n" if request.load.task_told else ""
    put(json.dumps(plan) if as_json else told + format_plan(plan))
    if missing := missing_files(plan):
        raise SwanError(f"missing: {', '.join(missing)}")


def _machine(request: Request, spec: EasyDict, local_size: int) -> tuple[Machine, bool]:
    """The machine of the run, and whether it is this one."""
    try:
        device = torch.device(check_device(request.load.device))
    except UsageError:
        return look(request, local_size), False
    if device.type == "cpu" and request.load.device == "auto" and request.load.vram_bytes is not None:
        return look(request, local_size), False
    return measure(device, request, spec, local_size), True


def _of_no_device(machine: Machine) -> str:
    memory = f"taken to be {gigabytes(machine.vram_bytes)}" if machine.vram_bytes else "unknown (--vram_gb says it)"
    told = f"this machine has no such device: its memory is {memory}, its rates are assumed"
    return f"{told}, and a run here would be refused"
