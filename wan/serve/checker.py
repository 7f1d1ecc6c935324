"""A process that looks into a request before it is accepted: its options, its files, and whether it fits.

Files of strangers are decoded here, so that what they can do to a decoder is done to nothing else. No GPU is touched.
Told {"check": number, "options", "machine", "ranks"}, it tells {"check": number, "facts" | "refused": ...}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from wan.errors import SwanError, described
from wan.file_checks import open_loras
from wan.options import FLAGS, build_load, build_sample, of_part
from wan.options.names import FILE_KINDS
from wan.plan.decide import check_fits
from wan.plan.machine import Machine
from wan.plan.plan import Plan
from wan.serve.child import Inbox
from wan.tasks import load_task
from wan.tasks.kinds import kind_of

_MOST_KNOWN = 1000
_NOT_IN_PLAN = {"prompt", "prompts", "negative_prompt", "seed"}


def main(inbox: Inbox) -> None:
    """Until the server ends. Tells {"ready": number of GPUs} first."""
    import torch

    inbox.tell({"ready": torch.cuda.device_count()})
    known: dict[str, float | str] = {}
    while True:
        message = inbox.next()
        try:
            told = {"facts": _facts(message["options"], message["ranks"], Machine(**message["machine"]), known)}
        except SwanError as error:
            told = {"refused": str(error)}
        except Exception as error:
            told = {"refused": f"this cannot be checked: {described(error)}"}
        inbox.tell({"check": message["check"], **told})


def _facts(options: Mapping[str, Any], ranks: int, machine: Machine, known: dict[str, float | str]) -> dict[str, Any]:
    """What the video will be. Raises SwanError.

    ranks: processes that make it together; known: seconds, or why it does not fit, by all that plans depend on
    """
    load = build_load(of_part(options, "load"), ranks)
    spec = load_task(load.task)
    request = build_sample(of_part(options, "sample"), load)
    sample, kind = request.sample, kind_of(spec)
    open_loras(sample.loras, spec)  # their files may be others the next time
    shape = (sample.width, sample.height, sample.frame_num, sample.film_frames, sample.num_clip, sample.audio_samples)
    kept = {one: FLAGS[one].kind in FILE_KINDS or value for one, value in options.items() if one not in _NOT_IN_PLAN}
    key = json.dumps([kept, shape, len(sample.prompts), vars(machine)], sort_keys=True)
    if key not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[key] = _planned(request, spec, machine)
    if isinstance(known[key], str):
        raise SwanError(known[key])
    frames = kind.frames(sample) - sample.trim_first_frames
    return {
        "width": sample.width,
        "height": sample.height,
        "frames": frames,
        "fps": sample.fps,
        "steps": sample.steps,
        "seed": sample.seed,
        "clips": kind.clips(spec, sample),
        "expected_seconds": known[key],
        "warnings": list(request.warnings),
    }


def _planned(request: Any, spec: Any, machine: Machine) -> float | str:
    try:
        check_fits(request, spec, machine)
        return Plan.of(request, spec, machine).seconds["total"]
    except SwanError as error:
        return str(error)
