"""Options: what a user can ask for, checked. Every user-facing check and its message lives here. No torch.

`LoadOptions` say what is loaded, `Sample` what one call makes, `Output` what is written: their fields are the schema
that the command line, replay, the engine and the adapters read. A wrong option raises UsageError (exit code 2), a file
that is there but unusable SwanError (exit code 1).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from wan import __version__
from wan.errors import SwanError, UsageError
from wan.options.beside import with_preset
from wan.options.files import check_outputs, told_task
from wan.options.load import LoadOptions
from wan.options.machine import check_device, check_grid
from wan.options.names import DEFAULT_TASK, STORED_FILES, STORED_PICTURES, VIDEO_FLAGS
from wan.options.output import Output
from wan.options.sample import Sample
from wan.options.schema import Asked, Option, check_part, flag_of, of_kinds, options_of
from wan.tasks import load_task

__all__ = ["FLAGS", "LoadOptions", "Option", "Output", "Request", "STORED", "Sample"]
__all__ += ["build_load", "build_request", "build_sample", "check_device", "of_part"]

PARTS = {"load": LoadOptions, "sample": Sample, "output": Output}
FLAGS: dict[str, Option] = {name: one for part in PARTS.values() for name, one in options_of(part)}
PART_OF = {name: key for key, part in PARTS.items() for name, _ in options_of(part)}
# What a video stores, and all that is taken from one: not where to write, and no second name for another option.
STORED = tuple(name for name, one in FLAGS.items() if one.stored)


@dataclass(frozen=True)
class Request:
    """A video to make, with certain models, and where it goes. warnings: lines to show before the run; is_private: the
    settings in the video name files without their folders; called: how they name a file that lies elsewhere, by where
    it lies."""

    load: LoadOptions
    sample: Sample
    output: Output | None = None
    warnings: tuple[str, ...] = ()
    is_private: bool = False
    called: Mapping[str, str] = field(default_factory=dict)

    def changed(self, **values: Any) -> Request:
        """The same with other values of fields, of whichever part has them."""
        parts = {}
        for key, part in PARTS.items():
            own = {one.name for one in fields(part)} & values.keys()
            if own:
                parts[key] = replace(getattr(self, key), **{name: values.pop(name) for name in own})
        return replace(self, **parts, **values)

    def settings(self) -> dict[str, Any]:
        """What is stored in the video: options that make it again, under their flags' names, and the images' hashes."""
        load, sample = self.load, self.sample
        values = {flag_of(one): getattr(part, one.name) for part in (load, sample) for one in fields(part)}
        values |= {**sample.cache, "ckpt_dir": load.ckpt_option, "image": sample.image_option}
        low, high = sample.guide_scale
        values["sample_guide_scale"] = low if low == high else [low, high]
        stored = {name: value for name in STORED if _is_storable(value := values.get(name))}
        if self.is_private or self.called:
            paths = stored.keys() & {*STORED_FILES, *STORED_PICTURES}
            stored |= {name: self._called(stored[name]) for name in paths}
        memory = [name for name in (*STORED_PICTURES, *VIDEO_FLAGS, "src_ref_images") if _in_memory(values[name])]
        kept = {"in_memory": memory} if memory else {}
        kept |= {"extended_from": list(sample.extended_from)} if sample.extended_from else {}
        return {"swan": __version__, **stored, "image_sha256": sample.image_sha256, **kept}

    def _called(self, value: Any) -> Any:
        """Of a path, a list of paths, or of pairs of a path and a number."""
        if isinstance(value, (list, tuple)):
            return [self._called(one) for one in value]
        if not isinstance(value, str):
            return value
        path = self.called.get(value, value)
        return os.path.basename(path) if self.is_private else path


def _in_memory(value: Any) -> bool:
    """Whether it is a picture without a file, or a list with one."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(part is not None and not isinstance(part, str) for part in parts)


def _is_storable(value: Any) -> bool:
    """Whether it says something, and is no image in memory."""
    if isinstance(value, (list, tuple)):
        return value != () and all(map(_is_storable, value))
    return isinstance(value, (str, Real))


def of_part(options: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Those that are of "load", "sample" or "output"."""
    return {name: value for name, value in options.items() if PART_OF.get(name) == part}


def build_request(options: Mapping[str, Any] | Any, world_size: int = 1, replayed: str | None = None) -> Request:
    """Check `options` (a mapping or an argparse namespace; None or absent = the task's default) into a Request.

    world_size: the number of processes that make this video together; replayed: the video whose settings are among the
    options. Raises UsageError or SwanError with one line.
    """
    at = asked(options, world_size)
    load, sample, output = (check_part(part, at) for part in PARTS.values())
    check_grid(at, sample.is_guided)
    request = Request(load, sample, output, tuple(at.warnings))
    check_written(request, replayed)
    return request


def build_load(options: Mapping[str, Any], world_size: int = 1) -> LoadOptions:
    """What an engine loads. Raises as `build_request`, also for an option of a video."""
    _refuse_others(options, "load")
    return check_part(LoadOptions, asked(options, world_size))


def build_sample(options: Mapping[str, Any], load: LoadOptions) -> Request:
    """A video of an engine, which nothing is written for. Raises as `build_request`, also for an option of loading."""
    _refuse_others(options, "sample")
    at = asked({**options, "task": load.task})
    at.done |= {"grid": load.grid, "ckpt_dir": load.ckpt_dir}
    sample = check_part(Sample, at)
    check_grid(at, sample.is_guided)
    return Request(load, sample, warnings=tuple(at.warnings))


def _refuse_others(options: Mapping[str, Any], part: str) -> None:
    why = {
        "load": "says what is loaded: it is for Engine()",
        "sample": "says what a video is like: it is for generate()",
        "output": "says what is written: see Video.save(), and preview_every of generate()",
    }
    for name in options:
        if (other := PART_OF.get(name, part)) != part:
            raise UsageError(f"{name} {why[other]}")


def asked(options: Mapping[str, Any] | Any, world_size: int = 1) -> Asked:
    """Options of known names and kinds, with those of their preset, for their task."""
    given = dict(options) if isinstance(options, Mapping) else vars(options)
    if unknown := sorted(set(given) - set(FLAGS)):
        raise UsageError(f"unknown option: {', '.join(unknown)}; options: {', '.join(FLAGS)}")
    get = of_kinds(given, FLAGS)
    name, told = get["task"], ""
    if name is None:
        try:
            name, told = told_task(get)
        except SwanError as error:
            if isinstance(error, UsageError) or world_size == 1:  # else this rank's file is damaged: told to all later
                raise
    spec = load_task(name or DEFAULT_TASK)
    get |= with_preset({name: value for name, value in get.items() if value is not None}, spec)
    return Asked(spec, get, world_size, told)


def check_written(request: Request, replayed: str | None = None) -> None:
    """That nothing which is read would be overwritten."""
    load, sample = request.load, request.sample
    loras = [(flag, path) for flag, chosen in sample.loras.items() for path, _ in chosen]
    made_from = [(name, getattr(sample, name)) for name in ("image", "last_frame", *VIDEO_FLAGS)]
    made_from += [("src_ref_images", path) for path in sample.src_ref_images]
    coefficients = ("cache_coefficients", sample.cache.get("cache_coefficients"))
    made_from = [(flag, path) for flag, path in made_from if isinstance(path, str)]  # and is no image in memory
    inputs = [*made_from, *loras, *load.files.items(), ("ckpt_dir", load.ckpt_dir), coefficients, ("replay", replayed)]
    check_outputs({name: getattr(request.output, name) for name in ("save_file", "preview", "cache_trace")}, inputs)
