"""What a run refuses for its files, by their headers and sizes alone: nothing is loaded. `--dry_run` asks the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan.errors import SwanError, one_line
from wan.models.dit import WanModel
from wan.models.encoders import empty_clip_encoder, empty_text_encoder
from wan.models.vae import WanVAE
from wan.plan.files import component_files
from wan.request import Request
from wan.request.options import LoraChoice
from wan.weights.assign import check_weights
from wan.weights.infer import check_dit, check_encoder
from wan.weights.locate import CheckpointFiles
from wan.weights.lora import Lora, open_lora, weight_shapes
from wan.weights.source import open_source


def check_files(files: CheckpointFiles, spec: Any) -> None:
    """Every weight file of a run against its task. Raises SwanError, one line, for the first that does not fit."""
    for paths in files.dit.values():
        check_component("dit", paths, spec)
    for part in ("vae", "t5", "clip"):
        if paths := getattr(files, part):
            check_component(part, paths, spec)


def faults(request: Request, spec: Any) -> list[str]:
    """What is wrong with the files that are here: a line for each component, as `check_files` and `open_loras` have it.
    Those that are missing are left to the plan, which lists them."""
    found = []

    def check(call: Callable[[], object]) -> None:
        try:
            call()
        except SwanError as error:
            found.append(one_line(error))

    for part in (*(spec.get("experts") or ["dit"]), "vae", "t5", "clip"):
        if part != "clip" or "clip" in spec.files:
            paths = component_files(request, spec, part)
            kind = "dit" if part in ("high", "low") else part
            if paths:
                check(partial(check_component, kind, paths, spec))
    check(partial(open_loras, request.loras, spec))
    return found


def check_component(part: str, paths: Sequence[Path], spec: Any) -> None:
    """The files of "dit" (of either expert), "vae", "t5" or "clip" against the task: containers, sizes, and every name
    and shape against the model as it is built on the meta device. Raises SwanError, one line."""
    source = open_source(paths)
    if part == "dit":
        check_dit(source, spec)
        with torch.device("meta"):
            model = WanModel(**spec.dit)
    elif part == "vae":
        with torch.device("meta"):
            model = WanVAE(**spec.vae)
    else:
        check_encoder(source, part, spec)
        model = (empty_text_encoder if part == "t5" else empty_clip_encoder)(source)
    check_weights(model, source, part)


def open_loras(asked: Mapping[str, LoraChoice], spec: Any) -> dict[str, Lora]:
    """Path -> the LoRA, checked by its header against the shapes of the task. Raises SwanError, one line."""
    if not asked:
        return {}
    with torch.device("meta"):
        shapes = weight_shapes(WanModel(**spec.dit))
    return {path: open_lora(path, shapes) for path in sorted({path for chosen in asked.values() for path, _ in chosen})}
