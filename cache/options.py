"""Options of the caches by their flags, their checks, and the manager they make. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wan.cache.choices import QUALITIES, choose
from wan.cache.coefficients import load_coefficients
from wan.cache.policies import POLICIES
from wan.cache.policies.teacache import RESCALES
from wan.cache.policy import Option, count

if TYPE_CHECKING:
    from wan.cache.manager import CacheManager, Ranks

MIN_STEPS = 10
MOST_NUMBERS = 1000  # of one option
PREDICTORS = ("zero", "first", "damped")

COMMON = {
    "cache_max_skips": count(5, "at most N skips in a row", 1),
    "cache_predictor": Option(
        "name",
        "zero",
        "a skipped step adds the last residual (zero, default), or extrapolates two on a line (first) or with a slope"
        " that fades (damped)",
        ", ".join(PREDICTORS),
    ),
    "cache_device": Option(
        "name", "auto", "where residuals are kept: auto (default: with the model), cpu, cuda, cuda:N"
    ),
    "cache_coefficients": Option("file", None, "coefficients measured by wan.calibrate"),
    "cache_force": Option("flag", False, f"allow a cache in runs of fewer than {MIN_STEPS} steps"),
}
OPTIONS: dict[str, Option] = {}
for _policy in POLICIES.values():
    OPTIONS |= {_policy.name: Option("flag", False, _policy.help), **_policy.flags}
OPTIONS |= COMMON
OPTIONS |= {
    "cache": Option("name", None, "auto: the cache that we measured to be best for the model and its steps", "auto"),
    "cache_quality": Option(
        "name",
        None,
        "of --cache auto, how near to the video without a cache: "
        + ", ".join(f"{name} ({db} dB)" for name, db in QUALITIES.items())
        + "; default medium",
        ", ".join(QUALITIES),
    ),
}


def check_options(
    given: Mapping[str, Any], steps: int, *, model: str | None = None, solver: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """(all options of the cache that is on, warnings) of what was given (None: not). {} if no cache is on.

    model: under which it was measured; solver: what --cache auto goes by, beside the steps.
    Raises ValueError, one line that names the flag and what is allowed.
    """
    flags = {name for name, option in OPTIONS.items() if option.kind == "flag"}
    given = {name: value for name, value in given.items() if value is not None and (value or name not in flags)}
    given, warnings = choose(given, model, solver, steps)
    on = [name for name in POLICIES if name in given]
    used = {*on, *(flag for name in on for flag in POLICIES[name].flags), *(COMMON if on else ())}
    for name in on:
        used -= set(POLICIES[name].idle)
        if idle := next((flag for flag in given if flag in POLICIES[name].idle), None):
            raise ValueError(f"--{idle} has no effect with --{name}")
    if idle := next((name for name in given if name not in used), None):
        owners = [name for name, policy in POLICIES.items() if idle in policy.flags] or list(POLICIES)
        raise ValueError(f"--{idle} has no effect without {' or '.join(f'--{name}' for name in owners)}")
    if not on:
        return {}, []
    if len(on) > 1 and on != ["fbcache", "teacache"]:
        raise ValueError(f"{' and '.join(f'--{name}' for name in on)} cannot go together; choose one")
    if steps < MIN_STEPS and not given.get("cache_force"):
        raise ValueError(f"--{on[0]} harms a run of {steps} steps, each of which changes much; --cache_force allows it")
    options = {name: _value(name, given.get(name)) for name in OPTIONS if name in used}
    if len(on) == 2:
        warnings.append("--fbcache and --teacache: fbcache, which measures the change, decides alone")
    rescale = options.get("teacache_policy", "linear")
    if rescale not in RESCALES:
        warnings.append(f"unknown --teacache_policy {rescale!r}; linear is used (known: {', '.join(RESCALES)})")
        options["teacache_policy"] = "linear"
    if options.get("teacache_polynomial") and options["teacache_policy"] == "linear":
        raise ValueError("--teacache_polynomial has no effect with --teacache_policy linear; name a polynomial")
    if options["cache_coefficients"] and not policy_of(options).needs(options):
        raise ValueError(f"--cache_coefficients has no effect: {policy_of(options).name}, as it is set, needs none")
    return options, warnings


def _value(name: str, given: Any) -> Any:
    option = OPTIONS[name]
    if given is None:
        return option.default
    if option.kind in ("number", "whole"):
        convert = int if option.kind == "whole" else float
        try:
            if isinstance(given, bool) or (convert is int and isinstance(given, float) and given != int(given)):
                raise ValueError
            value = convert(given)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"--{name} must be {option.allowed}, not {given!r}") from None
        if not option.fits(value):
            raise ValueError(f"--{name} must be {option.allowed}, not {given}")
        return value
    if option.kind == "numbers":
        try:
            values = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
        except (TypeError, ValueError, OverflowError):
            values = []
        if not 1 <= len(values) <= MOST_NUMBERS or not all(map(option.fits, values)):
            raise ValueError(f"--{name} must be {option.allowed}, at most {MOST_NUMBERS}, not {given!r:.100}")
        return values
    if option.kind in ("flag", "bool"):
        if not isinstance(given, bool):
            raise ValueError(f"--{name} must be true or false, not {given!r}")
        return given
    if option.kind == "name" and option.allowed and given not in option.allowed.split(", "):
        raise ValueError(f"unknown --{name} {given!r}; choose one of: {option.allowed}")
    return str(given)


def check_coefficients(options: Mapping[str, Any], model: str | None, experts: tuple[str, ...]) -> dict[str, Any]:
    """The coefficients of `model` for the policy in `options`, {} where it needs none.

    Raises ValueError where they are not known for every expert.
    """
    *path, by_expert = policy_of(options).needs(options) or [None]
    if by_expert is None:
        return {}
    found = load_coefficients(model, options["cache_coefficients"])
    for key in path:
        found = found.get(key, {})
    if lacking := [expert for expert in experts if expert not in found.get(by_expert, {})]:
        whose = f"expert {lacking[0]} of " if len(experts) > 1 else ""
        how = "measure them with python -m wan.calibrate and give --cache_coefficients FILE"
        raise ValueError(f"no {' '.join(path)} coefficients are known for {whose}{model or 'this model'}; {how}")
    return found


def policy_of(options: Mapping[str, Any]):
    """The class of the policy that decides."""
    return next(policy for name, policy in POLICIES.items() if options.get(name))


def make_manager(
    options: Mapping[str, Any], coefficients: Mapping[str, Any], ranks: Ranks | None = None
) -> CacheManager:
    """The manager for checked options and their coefficients. ranks: see `CacheManager`."""
    from wan.cache.manager import CacheManager

    device = options["cache_device"]
    return CacheManager(
        policy_of(options).make(options, coefficients),
        predictor=options["cache_predictor"],
        device=None if device == "auto" else device,
        ranks=ranks,
        own_uncond=options.get("fb_cfg_sep_diff", True),
    )
