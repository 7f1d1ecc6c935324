"""Options beside options that count for more: what a user gives beside a preset, a stored run, a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.cache.options import POLICIES as CACHES
from wan.options.names import GGUF_FLAGS, RCM_NAMES
from wan.options.values import listed
from wan.tasks import load_preset

# What says how many steps there are, or where -> what of the other options that replaces.
_REPLACED = {
    "sample_steps": ("denoising_step_list", "sigmas", "phases", "boundary_step_index"),
    "denoising_step_list": ("sample_steps", "sigmas", "phases", "boundary_step_index", "sigma_max"),
    "sigmas": ("sample_steps", "denoising_step_list", "phases", "boundary_step_index", "sigma_max", "sample_shift"),
    "phases": ("sample_steps", "boundary_step_index", "boundary"),
    "boundary": ("boundary_step_index",),
    "boundary_step_index": ("boundary",),
}
_STEPS = {*_REPLACED, "sigma_max"}


def left_beside(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that those `given`, none of them None, do not replace by what they mean."""
    left = dict(options)
    for one, replaced in _REPLACED.items():
        if one in given and not (one == "sample_steps" and _says_the_same(left, given[one])):
            left = {name: value for name, value in left.items() if name not in replaced}
    if given.get("sample_solver", "") not in ("", left.get("sample_solver")):
        if given["sample_solver"] not in RCM_NAMES:
            left.pop("sigma_max", None)
        elif "denoising_step_list" not in {*left, *given}:  # its own steps are not shifted
            left.pop("sample_shift", None)
    for flag in GGUF_FLAGS.keys() & given:
        left.pop(GGUF_FLAGS[flag], None)
    if any(given.get(name) and not left.get(name) for name in ("cache", *CACHES)):  # another, with its own settings
        left = {name: value for name, value in left.items() if name not in CACHE_OPTIONS}
    return left


def _says_the_same(options: Mapping[str, Any], steps: Any) -> bool:
    """Whether a list of steps has that many."""
    listed_steps = options.get("denoising_step_list") or options.get("sigmas")
    return listed_steps is not None and "phases" not in options and str(len(listed(listed_steps))) == str(steps)


def beside(
    options: Mapping[str, Any], given: Mapping[str, Any], spec: EasyDict
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is left of earlier options beside those `given`, and these with their preset's, which says the steps."""
    if "preset" in given:
        options = {name: value for name, value in options.items() if name not in _STEPS}
    given = with_preset(given, spec)
    return left_beside(options, given), given


def with_preset(given: Mapping[str, Any], spec: EasyDict) -> dict[str, Any]:
    """The options `given`, none of them None, with what is left of their preset. UsageError for an unknown one."""
    if "preset" not in given:
        return dict(given)
    return left_beside(load_preset(given["preset"], spec), given) | given
