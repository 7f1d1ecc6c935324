"""The fields of a request to options of generate.py: OpenAI's, those that SGLang and vLLM-Omni add, and our own flags.

What names a file here is no path: it is sent, or a data URL, a URL, or a video that this server made, see `inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wan.errors import UsageError
from wan.options import FLAGS, PART_OF
from wan.options.names import FILE_KINDS, LORA_FLAGS, MAX_STEPS
from wan.options.values import of_kind, shown, whole
from wan.serve.models import Loras, Model
from wan.serve.refused import Refused, bad

# Names of others -> our flags.
_SAME = {
    "num_inference_steps": "sample_steps",
    "flow_shift": "sample_shift",
    "boundary_ratio": "boundary",
    "enable_teacache": "teacache",
    "first_frame": "image",
}
_BLOCKS = ("video_params", "extra_params", "extra_body")  # fields within fields
_NEUTRAL = {"user", "metadata", "generator_device"}  # of no effect on what is made
_IMAGES = ("input_reference", "image_reference", "reference_url")
_REFERENCES = {
    **dict.fromkeys(_IMAGES, ("image", "src_ref", "src_ref_images")),
    "video_reference": ("video", "src_video", "src_pose"),
    "audio_reference": ("audio",),
}
_LORA_NAMES, _LORA_SCALES = ("name", "lora_name", "adapter", "path"), ("scale", "lora_scale", "strength")
# Files of the server's machine, and who writes prompts; whether somebody does, the server says.
_CLOSED = {"cache_coefficients", "prompt_extend_method"}
EXTEND = ("use_prompt_extend", "prompt_extend_target_lang")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Wanted:
    """options: by flag, without files; sources: what files come from, by flag, one or a list, see `inputs`."""

    model: Model
    options: dict[str, Any]
    sources: dict[str, Any]
    preview_every: int = 0


def read_fields(
    body: Mapping[str, Any], models: Mapping[str, Model], loras: Loras, needs_prompt: bool = True
) -> Wanted:
    """What a request asks for. Raises Refused, which names the field."""
    told = {name: value for name, value in _flat(body).items() if value is not None and value != ""}
    model = _model(told.pop("model", None), models)
    if needs_prompt and not str(told.get("prompt", "")).strip() and "prompts" not in told:
        raise bad("prompt", "prompt is missing", "missing_required_parameter")
    options = _guidance(told, model)
    options |= _loras(told, loras)
    options |= _shape(told, model)
    every = whole(told.pop("preview_every", None), 0, "preview_every", 0, MAX_STEPS)
    sources: dict[str, Any] = {}
    for name, value in told.items():
        if name in _NEUTRAL:
            continue
        flag = _flag(name, model)
        if FLAGS[flag].kind in FILE_KINDS:
            sources[flag] = value
        else:
            options[flag] = _value(flag, value)
    return Wanted(model, options, sources, every)


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that are in a block; those outside count."""
    inner = {}
    for name in _BLOCKS:
        if (block := body.get(name)) is not None:
            if not isinstance(block, dict):
                raise bad(name, f"{name} must be an object of fields")
            inner |= block
    return inner | {name: value for name, value in body.items() if name not in _BLOCKS}


def _model(name: Any, models: Mapping[str, Model]) -> Model:
    if name is None:
        return next(iter(models.values()))
    if not isinstance(name, str) or name not in models:
        raise Refused(404, f"no model {shown(name)}; there are: {', '.join(models)}", "model_not_found", "model")
    return models[name]


def _flag(name: str, model: Model) -> str:
    """The flag that a field sets. Raises Refused for what no request may say."""
    if flags := _REFERENCES.get(name):
        return next((flag for flag in flags if flag in model.kind.inputs), flags[0])
    flag = _SAME.get(name, name)
    if PART_OF.get(flag) == "load":
        raise bad(name, f"{name} says what is loaded, which is for the server to say; model chooses among what it has")
    if not is_open(flag) or flag in LORA_FLAGS:
        raise bad(name, f"unknown field {shown(name)}", "unknown_parameter")
    if flag in EXTEND and not model.options.get("use_prompt_extend"):
        raise bad(name, f"{name}: prompts are not extended by this server")
    return flag


def is_open(flag: str) -> bool:
    """Whether a request may set it, be it as a file that is sent."""
    return PART_OF.get(flag) == "sample" and FLAGS[flag].kind != "path" and flag not in _CLOSED


def _value(flag: str, value: Any) -> Any:
    kind = FLAGS[flag].kind
    if kind in ("flag", "bool") and isinstance(value, str):
        value = _TRUTH.get(value.lower(), value)
    if kind == "texts":  # as text it would be the path of a file
        value = value.splitlines() if isinstance(value, str) else value
        value = [line for line in value if line] if isinstance(value, list) else [value]
    try:
        return of_kind(value, flag, kind)
    except UsageError as error:
        raise bad(flag, str(error)) from error


def _shape(told: dict[str, Any], model: Model) -> dict[str, Any]:
    """width, height, num_frames and seconds, of which num_frames counts, as size and frame_num."""
    options: dict[str, Any] = {}
    if "width" in told or "height" in told:
        width, height = (_number(told, side, True) for side in ("width", "height"))
        if width is None or height is None:
            raise bad("width" if width is None else "height", "width and height belong together")
        told.setdefault("size", f"{width}x{height}")
    frames, seconds = _number(told, "num_frames", True), _number(told, "seconds")
    if "frame_num" in told or (frames is None and seconds is None):
        return options
    if {"audio", "src_pose"} & {*model.kind.inputs}:
        name = "seconds" if frames is None else "num_frames"
        raise bad(name, f"{name}: a video of {model.name} is as long as what it is made from")
    if frames is None:
        fps = told.get("fps", model.options.get("fps", model.spec.sampling.fps))
        fps = whole(fps, 0, "fps", 1, 240)
        frames = round(seconds * fps / 4) * 4 + 1
    elif frames % 4 != 1:
        frames = frames // 4 * 4 + 1  # as diffusers does
    return {"frame_num": frames}


def _number(told: dict[str, Any], name: str, is_whole: bool = False) -> Any:
    """Taken out of the fields; None where it is not there."""
    value = told.pop(name, None)
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < 1e6 or (is_whole and number != int(number)):
        raise bad(name, f"{name} must be a {'whole ' if is_whole else ''}number above 0, not {shown(value)}")
    return int(number) if is_whole else number


def _guidance(told: dict[str, Any], model: Model) -> dict[str, Any]:
    """guidance_scale is for both experts; guidance_scale_2 is the low-noise one's, as in diffusers."""
    names = ("guidance_scale", "guidance_scale_2", "guidance_scale_low", "guidance_scale_high")
    given = {name: told.pop(name) for name in names if name in told}
    for name, value in given.items():
        given[name] = _value("sample_guide_scale", value)
    if not given:
        return {}
    if given.keys() == {"guidance_scale"}:
        return {"sample_guide_scale": given["guidance_scale"]}
    if "experts" not in model.spec:
        name = next(name for name in names[1:] if name in given)
        raise bad(name, f"{name} is for models with two experts; {model.name} has one: use guidance_scale")
    low, high = _usual_guidance(model)
    both = given.get("guidance_scale")
    low = given.get("guidance_scale_low", given.get("guidance_scale_2", low if both is None else both))
    high = given.get("guidance_scale_high", high if both is None else both)
    return {"sample_guide_scale": [low, high]}


def _usual_guidance(model: Model) -> tuple[Any, Any]:
    usual = model.options.get("sample_guide_scale", model.spec.sampling.guide_scale)
    usual = usual.split(",") if isinstance(usual, str) else usual
    parts = list(usual) if isinstance(usual, (list, tuple)) else [usual]
    return parts[0], parts[-1]


def _loras(told: dict[str, Any], loras: Loras) -> dict[str, Any]:
    """LoRAs by flag, as [path, strength] each: "name", "name:0.8", ["name", 0.8], {name, scale}, or a list of these."""
    found = {}
    for flag in LORA_FLAGS:
        if flag in told:
            found[flag] = [_lora(flag, one, loras) for one in each_lora(told.pop(flag))]
    return found


def each_lora(value: Any) -> list[Any]:
    """The LoRAs of a field, which has one or a list of them."""
    is_one = not isinstance(value, list) or (len(value) == 2 and isinstance(value[1], (int, float)))
    return [value] if is_one else value


def _lora(flag: str, value: Any, loras: Loras) -> list[Any]:
    name, strength = value, 1.0
    if isinstance(value, dict):
        name = next((value[one] for one in _LORA_NAMES if one in value), None)
        strength = next((value[one] for one in _LORA_SCALES if one in value), 1.0)
    elif isinstance(value, list) and len(value) == 2:
        name, strength = value
    if not isinstance(name, str):
        raise bad(flag, f"{flag} must be the name of a LoRA, with or without a strength, not {shown(value)}")
    path = loras.path(name)
    if path is None and ":" in name:
        name, _, strength = name.rpartition(":")
        path = loras.path(name)
    if path is None:
        there = ", ".join(loras.names()) or "none"
        raise bad(flag, f"{flag}: no LoRA {shown(name)}; there are: {there}")
    try:
        return [str(path), float(strength)]
    except (TypeError, ValueError) as error:
        raise bad(flag, f"{flag}: the strength must be a number, not {shown(strength)}") from error
