"""The fields of the page: which a model has, what stands in them where nothing is given, and what they say together.

A field is a flag of generate.py, and takes its kind, help, default and choices from there, or one of the page's own:
the guidance of each of two experts, seconds, the cache, rows of LoRAs, and all other options as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from wan.cache.choices import QUALITIES
from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.cache.options import POLICIES
from wan.cache.policies.teacache import RESCALES
from wan.errors import SwanError
from wan.files import parse_json
from wan.options import FLAGS, PART_OF, Sample, asked
from wan.options.inputs import INPUTS
from wan.options.names import AUDIO_SYNCS, LORA_FLAGS, SOLVER_NAMES
from wan.options.sampling import check_frame_num
from wan.options.schema import flag_of
from wan.options.values import listed
from wan.serve.fields import FILE_KINDS, each_lora, is_open
from wan.serve.models import Loras, Model
from wan.serve.refused import bad
from wan.serve.store import Job
from wan.serve.web.texts import help_of, label, text
from wan.tasks import load_task, preset_names
from wan.tasks.kinds import KINDS, kind_of

LORA_ROWS = 4
_REFUSED = {
    "enable_tts",
    "tts_text",
    "tts_prompt_audio",
    "tts_prompt_text",
}  # of s2v, which only says what to do instead
_KNOBS = ("fb_thresh", "fb_metric", "teacache_thresh", "teacache_policy", "easy_thresh")
_KNOBS += ("mag_thresh", "mag_K", "mag_retention", "cache_max_skips", "cache_force")
_INPUTS = [one for one in INPUTS if is_open(one) and one not in _REFUSED]
_NEEDED = {one for kind in KINDS.values() for one in kind.needed}
# Fields by the part of the page that they are in.
PARTS = {
    "top": ("prompt", "negative_prompt"),
    "inputs": (*sorted(_INPUTS, key=lambda one: one not in _NEEDED), "strength"),
    "shape": ("size", "frame_num", "seconds", "fps"),
    "sampling": ("preset", "sample_solver", "sample_steps", "sample_shift")
    + ("sample_guide_scale", "guidance_high", "guidance_low", "seed"),
    "caching": ("cache_choice", "cache_quality", *_KNOBS),
    "loras": tuple(f"lora_{part}_{n}" for n in range(1, LORA_ROWS + 1) for part in ("name", "strength", "expert")),
    "others": ("others",),
}
FIELDS = tuple(name for part in PARTS.values() for name in part)
FILES = tuple(name for name in FIELDS if name in FLAGS and FLAGS[name].kind in FILE_KINDS)
OTHER_FLAGS = tuple(
    one for one in FLAGS if is_open(one) and one not in {*FIELDS, *_REFUSED, *POLICIES, "cache", "first_frame"}
)
_PREVIEWS = 8
_AUTO = "auto"
_COMMON = {"cache_max_skips", "cache_force"}
_CHOICES = {
    "sample_solver": SOLVER_NAMES,
    "audio_sync": AUDIO_SYNCS,
    "cache_quality": tuple(QUALITIES),
    "teacache_policy": tuple(RESCALES),
    "cache_choice": (_AUTO, *POLICIES),
}
# What follows from others, in the order in which it does; see `usual`.
_FOLLOWS = ("fps", "solver", "denoising_step_list", "sigmas", "phases", "sigma_max", "steps", "shift", "guide_scale")


spec_of = lru_cache(load_task)  # reading takes a millisecond, and each field asks


def is_switch(field: str) -> bool:
    return field in FLAGS and FLAGS[field].kind == "flag"


def has(model: Model, field: str, cache: str = "") -> bool:
    """Whether a field is of use with a model. cache: what is chosen there."""
    spec = spec_of(model.task)
    kind, experts = kind_of(spec), "experts" in spec
    if field in _KNOBS:
        return cache in POLICIES and field in {*POLICIES[cache].flags, *_COMMON} - {*POLICIES[cache].idle}
    if field in INPUTS:
        return field in kind.inputs
    told = {
        "strength": "video" in kind.inputs,
        "size": kind.asks_size,
        "frame_num": "audio" not in kind.inputs,  # as long as what is heard
        "fps": "audio" not in kind.inputs,
        "seconds": not {"audio", "src_pose"} & {*kind.inputs},
        "sample_guide_scale": not experts,
        "guidance_low": experts,
        "guidance_high": experts,
        "cache_quality": cache == _AUTO,
    }
    return told.get(field, not field.startswith("lora_expert") or experts)


def usual(model: Model, preset: str = "") -> dict[str, str]:
    """What fields stand for where nothing is given, as text; without those that nothing can be said of."""
    try:
        options = model.merged({"preset": preset} if preset else {})
        at = asked({name: one for name, one in options.items() if PART_OF[name] == "sample"} | {"task": model.task})
        size = at.get["size"] or at.spec.sampling.size
        at.done["size"] = size.replace("x", "*")  # which the shift may go by
        for one in fields(Sample):
            if one.name in _FOLLOWS:
                at.done[one.name] = one.metadata["check"](at, at.get[flag_of(one)])
        frames = check_frame_num(at.spec, at.get["frame_num"])
    except SwanError:  # of options of the server that go together with others of a request alone
        return {}
    low, high = at.done["guide_scale"]
    cache = next((name for name in (*POLICIES, "cache") if options.get(name)), None)
    found = {
        "size": size,
        "frame_num": frames,
        "fps": at.done["fps"],
        "seconds": f"{frames / at.done['fps']:.3g}",
        "sample_solver": at.done["solver"],
        "sample_steps": at.done["steps"],
        "sample_shift": at.done["shift"],
        "sample_guide_scale": low,
        "guidance_low": low,
        "guidance_high": high,
        "negative_prompt": options.get("negative_prompt", at.spec.negative_prompt),
        "prompt": options.get("prompt", at.spec.get("prompt")),
        "preset": model.options.get("preset"),
        "cache_choice": options.get("cache") if cache == "cache" else cache,
        "cache_quality": next(name for name in reversed(QUALITIES)),
    }
    found |= {name: CACHE_OPTIONS[name].default for name in _KNOBS}
    return {name: _plain(one) for name, one in found.items() if one not in (None, "")}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def choices(field: str, model: Model, loras: Loras, there: Mapping[str, str], language: str) -> list[tuple[str, str]]:
    """(what is shown, value) of a field that offers some, the first of which leaves it to the server; [] for others.

    there: `usual`
    """
    if field.startswith("lora_expert"):
        return [
            (text(key, language), value)
            for key, value in (("both", "lora"), ("high", "lora_high"), ("low", "lora_low"))
        ]
    if field.startswith("lora_name"):
        return [(text("none", language), ""), *((name, name) for name in sorted(loras.names()))]
    given = _CHOICES.get(field) or (preset_names() if field == "preset" else ())
    if field in CACHE_OPTIONS and CACHE_OPTIONS[field].kind == "name" and not given:
        given = tuple(one for one in CACHE_OPTIONS[field].allowed.split(", ") if one)
    if field == "size":
        given = tuple(spec_of(model.task).sampling.sizes)
    elif not given:
        return []
    value = there.get(field, text("none", language) if field in ("preset", "cache_choice") else "")
    return [(text("usual", language, value=value) if value else "–", ""), *((one, one) for one in given)]


def named(field: str, language: str) -> tuple[str, str]:
    """(label, help) of a field."""
    if field.startswith("lora_"):
        part, _, row = field.removeprefix("lora_").partition("_")
        return text(f"lora_{part}", language, number=row), ""
    if field == "others":
        return text("others_label", language), ""
    if field in ("guidance_low", "guidance_high"):
        return text(field, language), help_of("sample_guide_scale", language) if field == "guidance_high" else ""
    if field in FLAGS:
        return label(field, language), help_of(field, language)
    return text(field, language), text(f"{field}_help", language)


def in_words(told: str, language: str, param: str | None = None) -> str:
    """A message, in which flags of fields become labels, and other options are as they are written among these.

    param: a field that the message may begin with, without dashes
    """

    def word(match: re.Match[str]) -> str:
        name = match[1]
        if name in FIELDS:
            return f"“{named(name, language)[0]}”"
        return match[0] if PART_OF.get(name, "load") == "load" else name

    begin = "--" if param is None else rf"--|\A(?={re.escape(param)}\b)"
    return re.sub(rf"(?:{begin})(\w+)", word, told)


def body_of(model: Model, values: Mapping[str, Any], language: str) -> dict[str, Any]:
    """The fields of a request, for `read_fields`, of the values of the page's, of which those that the model does not
    have count for nothing. Files are paths of uploads. Raises Refused."""
    cache = values.get("cache_choice") or ""
    given = {name: one for name, one in values.items() if has(model, name, cache) and one not in (None, "", [], False)}
    others = _others(given.pop("others", ""), language)
    body: dict[str, Any] = {"model": model.name}
    rows = {name: given.pop(name) for name in PARTS["loras"] if name in given}
    for row in range(1, LORA_ROWS + 1):
        if name := rows.get(f"lora_name_{row}"):
            flag = rows.get(f"lora_expert_{row}") or "lora"
            body.setdefault(flag, []).append({"name": name, "scale": rows.get(f"lora_strength_{row}", 1)})
    for flag in LORA_FLAGS:
        if flag in body and flag in others:  # more than there are rows for
            body[flag] += each_lora(others.pop(flag))
    if cache:
        body["cache" if cache == _AUTO else cache] = cache if cache == _AUTO else True
        given.pop("cache_choice")
    guidance = {"guidance_low": "guidance_scale_low", "guidance_high": "guidance_scale_high"}
    for name, one in given.items():
        body[guidance.get(name, name)] = _source(name, one, language) if name in FILES else one
    if twice := sorted(body.keys() & others):
        raise bad(twice[0], text("twice", language, name=twice[0]))
    return body | others


def _source(field: str, path: Any, language: str) -> Any:
    """Of uploads, which become files of the job."""
    many = [Path(one) for one in _parts(path)]
    if not all(one.is_file() for one in many):
        raise bad(field, text("send_again", language, name=label(field, language)))
    return many if FLAGS[field].kind == "pictures" else many[0]


def _others(written: str, language: str) -> dict[str, Any]:
    """Options as lines of NAME = VALUE, or as an object of JSON."""
    if written.lstrip().startswith("{"):
        try:
            return parse_json(written, True)
        except ValueError as error:
            raise bad("others", text("json_wrong", language)) from error
    found: dict[str, Any] = {}
    for number, line in enumerate(written.splitlines(), 1):
        if not line.strip():
            continue
        name, is_there, value = line.partition("=")
        name = name.strip().removeprefix("--")
        if not is_there or not name or not value.strip():
            raise bad("others", text("line_wrong", language, number=number))
        if name in found:
            raise bad(name, text("twice", language, name=name))
        found[name] = value.strip()
    return found


def values_of(job: Job, model: Model, loras: Loras) -> dict[str, Any]:
    """The values of the page's fields that ask for what a job was asked for, but for its files; the rest is empty."""
    found: dict[str, Any] = dict.fromkeys(FIELDS, "")
    found |= {name: False for name in FIELDS if is_switch(name)} | dict.fromkeys(FILES) | {"model": model.name}
    found |= {name: "lora" for name in FIELDS if name.startswith("lora_expert")}
    names = {str(path): name for name, path in loras.names().items()}
    others: dict[str, Any] = {}
    rows = iter(range(1, LORA_ROWS + 1))
    for flag, value in job.options.items():
        if flag in LORA_FLAGS:
            for path, strength in value:
                one = {"name": names.get(path, Path(path).stem), "scale": strength}
                if (row := next(rows, None)) is None:
                    others.setdefault(flag, []).append(one)
                else:
                    found |= {f"lora_name_{row}": one["name"], f"lora_strength_{row}": _plain(float(strength))}
                    found[f"lora_expert_{row}"] = flag
        elif flag == "sample_guide_scale" and "experts" in spec_of(model.task):
            parts = listed(value)
            found |= {"guidance_low": _plain(parts[0]), "guidance_high": _plain(parts[-1])}
        elif (flag in POLICIES and value) or flag == "cache":
            found["cache_choice"] = _AUTO if flag == "cache" else flag
        elif flag == "prompts" and all(len(one.splitlines()) == 1 for one in value):
            found[flag] = "\n".join(value)
        elif flag in FIELDS and flag != "prompts":
            found[flag] = value if isinstance(value, bool) else ",".join(map(_plain, _parts(value)))
        else:
            others[flag] = value
    found["others"] = _written(others)
    return found


def told(job: Job, loras: Loras) -> dict[str, Any]:
    """The options of a job as people are shown them: LoRAs by their names."""
    names = {str(path): name for name, path in loras.names().items()}
    shown = dict(job.options)
    for flag in LORA_FLAGS.keys() & shown.keys():
        shown[flag] = [[names.get(path, Path(path).stem), strength] for path, strength in shown[flag]]
    return shown | {flag: name for flag, name in job.files.items()}


def preview_every(model: Model, options: Mapping[str, Any]) -> int:
    """Steps from preview to preview, where nobody says: for some eight of a run."""
    steps = options.get("sample_steps") or usual(model, options.get("preset", "")).get("sample_steps", "1")
    return max(1, round(float(steps) / _PREVIEWS)) if str(steps).isdigit() else 1


def _parts(value: Any) -> list[Any]:
    """The parts of a list; anything else as one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _written(others: Mapping[str, Any]) -> str:
    """Options as `_others` reads them."""
    if any(isinstance(value, (list, dict)) or "\n" in str(value) for value in others.values()):
        return json.dumps(others, ensure_ascii=False, indent=1)
    as_text = {name: str(value).lower() if isinstance(value, bool) else _plain(value) for name, value in others.items()}
    return "\n".join(f"{name} = {value}" for name, value in as_text.items())
