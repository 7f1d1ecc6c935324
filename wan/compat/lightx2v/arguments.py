"""Arguments of the pipeline class: the keys that they set, and which of them somebody gave. No torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# Argument -> the keys that it sets, where that is not the key of its name.
ARGUMENTS = {
    "text_encoder_offload": ("t5_cpu_offload",),
    "image_encoder_offload": ("clip_cpu_offload",),
    "vae_offload": ("vae_cpu_offload",),
    "text_encoder_quantized": ("t5_quantized",),
    "image_encoder_quantized": ("clip_quantized",),
    "text_encoder_quantized_ckpt": ("t5_quantized_ckpt",),
    "image_encoder_quantized_ckpt": ("clip_quantized_ckpt",),
    "cache_method": ("feature_caching",),
    "attn_mode": ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type"),
    "num_frames": ("target_video_length",),
    "height": ("target_height",),
    "width": ("target_width",),
    "guidance_scale": ("sample_guide_scale",),
}


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Of a method's `locals()`."""
    return {name: value for name, value in names.items() if name not in ("self", "inputs", "__class__")}


@functools.cache
def defaults_of(method: Callable[..., Any]) -> dict[str, Any]:
    """Of its arguments."""
    return {name: one.default for name, one in inspect.signature(method).parameters.items()}


def as_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that arguments set."""
    return {key: value for name, value in arguments.items() for key in ARGUMENTS.get(name, (name,))}


def differ(one: Any, other: Any) -> bool:
    """Whether two values of an argument do; a list is as a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(map(differ, one, other))
    return type(one) is not type(other) and not _are_numbers(one, other) or bool(one != other)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
