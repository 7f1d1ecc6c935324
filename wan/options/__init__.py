"""Options: what a user can ask for, checked. Every user-facing check and its message lives here. No torch.

`LoadOptions` say what is loaded, `Sample` what one call makes, `Output` what is written: their fields are the schema
that the command line, replay, the engine and the adapters read. A wrong option raises UsageError (exit code 2), a file
that is there but unusable SwanError (exit code 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from wan import __version__
from wan.errors import UsageError
from wan.options.files import check_outputs
from wan.options.load import LoadOptions
from wan.options.machine import check_device, check_grid
from wan.options.names import DEFAULT_TASK
from wan.options.output import Output
from wan.options.sample import Sample
from wan.options.schema import Asked, Option, check_part, flag_of, of_kinds, options_of
from wan.options.values import or_default
from wan.tasks import load_preset, load_task

__all__ = ["FLAGS", "LoadOptions", "Output", "Request", "STORED", "Sample", "build_request", "check_device"]

PARTS = {"load": LoadOptions, "sample": Sample, "output": Output}
FLAGS: dict[str, Option] = {name: one for part in PARTS.values() for name, one in options_of(part)}
PART_OF = {name: key for key, part in PARTS.items() for name, _ in options_of(part)}
# What a video stores, and all that is taken from one: not where to write, and no second name for another option.
STORED = tuple(name for name, one in FLAGS.items() if one.stored)


@dataclass(frozen=True)
class Request:
    """A video to make, with certain models, and where it goes. warnings: lines to show before the run."""

    load: LoadOptions
    sample: Sample
    output: Output
    warnings: tuple[str, ...] = ()

    def changed(self, **values: Any) -> Request:
        """The same with other values of fields, of whichever part has them."""
        parts = {}
        for key, part in PARTS.items():
            own = {one.name for one in fields(part)} & values.keys()
            parts[key] = replace(getattr(self, key), **{name: values.pop(name) for name in own})
        return replace(self, **parts, **values)

    def settings(self) -> dict[str, Any]:
        """What is stored in the video: options that make it again, under their flags' names, and the images' hashes."""
        load, sample = self.load, self.sample
        values = {flag_of(one): getattr(part, one.name) for part in (load, sample) for one in fields(part)}
        values |= {**sample.cache, "ckpt_dir": load.ckpt_option, "image": sample.image_option}
        low, high = sample.guide_scale
        values["sample_guide_scale"] = low if low == high else [low, high]
        stored = {name: value for name in STORED if (value := values.get(name)) not in (None, ())}
        return {"swan": __version__, **stored, "image_sha256": sample.image_sha256}


def build_request(options: Mapping[str, Any] | Any, world_size: int = 1, replayed: str | None = None) -> Request:
    """Check `options` (a mapping or an argparse namespace; None or absent = the task's default) into a Request.

    world_size: the number of processes that make this video together; replayed: the video whose settings are among the
    options. Raises UsageError or SwanError with one line.
    """
    at = asked(options, world_size)
    parts = {key: check_part(part, at) for key, part in PARTS.items()}
    check_grid(at)
    request = Request(**parts, warnings=tuple(at.warnings))
    check_written(request, replayed)
    return request


def asked(options: Mapping[str, Any] | Any, world_size: int = 1) -> Asked:
    """Options of known names and kinds, with those of their preset, for their task."""
    given = dict(options) if isinstance(options, Mapping) else vars(options)
    if unknown := sorted(set(given) - set(FLAGS)):
        raise UsageError(f"unknown option: {', '.join(unknown)}; options: {', '.join(FLAGS)}")
    get = of_kinds(given, FLAGS)
    spec = load_task(get["task"] or DEFAULT_TASK)
    if get["preset"] is not None:
        for name, value in load_preset(get["preset"], spec).items():
            get[name] = or_default(get[name], value)
    return Asked(spec, get, world_size)


def check_written(request: Request, replayed: str | None = None) -> None:
    """That nothing which is read would be overwritten."""
    load, sample = request.load, request.sample
    loras = [(flag, path) for flag, chosen in sample.loras.items() for path, _ in chosen]
    pictures = [("image", sample.image), ("last_frame", sample.last_frame)]
    coefficients = ("cache_coefficients", sample.cache.get("cache_coefficients"))
    inputs = [*pictures, *loras, *load.files.items(), ("ckpt_dir", load.ckpt_dir), coefficients, ("replay", replayed)]
    check_outputs({"save_file": request.output.save_file, "cache_trace": sample.cache.get("cache_trace")}, inputs)
