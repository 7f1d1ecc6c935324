"""A transformer file, a folder of other components and a VideoX-Fun config -> the Request that generate.py runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.compat.config import FunConfig
from wan.errors import SwanError, UsageError
from wan.options import Request, build_request
from wan.tasks import load_task, task_names
from wan.weights.infer import check_dit, identify, infer_dit_config
from wan.weights.source import open_source

_TWO_FILES = "use generate.py --task t2v-A14B with --gguf_high and --gguf_low"
_ONE_EXPERT = f"by its name one of the two experts of Wan2.2, which alone makes a poorer video; {_TWO_FILES}"


def text_task(gguf_path: str | os.PathLike) -> EasyDict:
    """The task of one transformer file that makes video from text alone, told from its tensors.

    Raises UsageError where there is no file, SwanError that says what the file holds where no such task fits it.
    """
    if not Path(gguf_path).expanduser().exists():
        raise UsageError(f"no file {gguf_path}")
    source = open_source(Path(gguf_path).expanduser())
    infer_dit_config(source)  # says what is wrong with a file that is no transformer
    specs = [load_task(name) for name in task_names()]
    specs = [spec for spec in specs if spec.kind in ("t2v", "ti2v") and "experts" not in spec]
    for spec in specs:
        try:
            check_dit(source, spec)
        except SwanError:
            continue
        return spec
    tasks = ", ".join(spec.name for spec in specs)
    raise SwanError(f"{source.describe()}: holds {identify(source)}; video from text alone is made by: {tasks}")


def text_request(
    gguf_path: str | os.PathLike,
    base_model_path: str | os.PathLike,
    config: FunConfig,
    options: Mapping[str, Any],
    names: Mapping[str, str],
) -> tuple[Request, EasyDict]:
    """The request for one video, and its task with the file names of `config`.

    options: of `build_request`, without the task and the files; names: what the caller calls those options, for
    messages. The warnings of `config` are among the request's. Raises UsageError or SwanError with a one-line message.
    """
    spec = text_task(gguf_path)
    check_config(config, spec)
    files = {"dit": str(gguf_path), "ckpt_dir": str(base_model_path)}
    for part, subpath in config.files.items():
        if part not in spec.files or subpath == spec.files[part]:
            continue
        path = Path(base_model_path).expanduser() / subpath
        if path.exists():
            files[part] = str(path)  # an option of generate.py, so the video can be replayed
        else:
            spec.files[part] = subpath
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("sample_shift", config.shift)
    try:
        request = build_request({"task": spec.name, **files, **given})
        expert = re.search(r"(high|low)[-_ ]?noise", Path(gguf_path).name, re.IGNORECASE)
        notes = (f"{gguf_path}: {_ONE_EXPERT}",) if expert else ()
        return request.changed(warnings=(*notes, *config.warnings, *request.warnings)), spec
    except UsageError as error:
        message = str(error)
        for ours, theirs in names.items():
            message = message.replace(f"--{ours}", theirs)
        raise UsageError(message) from None


def check_config(config: FunConfig, spec: Mapping[str, Any]) -> None:
    """Raise UsageError where `config` is that of another model than the task's."""
    if config.boundary is not None:
        raise UsageError(f"{config.name}: boundary is for the two experts of Wan2.2, which are two files; {_TWO_FILES}")
    wrong = [
        f"{key} {value!r} (the model has {spec['dit'][key]!r})"
        for key, value in config.dit.items()
        if key in spec["dit"] and value != spec["dit"][key] and key != "model_type"
    ]
    strides = zip(("temporal", "spatial"), config.stride, spec["vae_stride"])
    wrong += [
        f"{name}_compression_ratio {value!r} (the VAE of {spec['name']} has {stride})"
        for name, value, stride in strides
        if value not in (None, stride)
    ]
    if wrong:
        raise UsageError(f"{config.name}: does not fit {spec['name']}: {', '.join(wrong)}")


def guidance(scale: Any) -> Any:
    """The guidance scale of VideoX-Fun and diffusers, where all values up to 1 mean none, as ours, where 1 does."""
    try:
        return 1 if 0 <= float(scale) <= 1 else scale
    except (TypeError, ValueError):
        return scale  # the request says what is wrong with it
