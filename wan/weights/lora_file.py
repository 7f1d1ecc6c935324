"""The tensors of a LoRA file, sorted by module: key -> (official path, part). Reads headers only.

A key is prefix + module + suffix. The suffix says what the tensor is, in whichever trainer's words. The module is
looked up whole, under our name or diffusers', be its parts joined by dots or underscores or some of each. Any prefix
goes that names no other network. A file may have a half for each of two experts, which its prefixes tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wan.errors import SwanError, printable
from wan.files import parse_json, read_json
from wan.weights.infer import looks_like
from wan.weights.names import diffusers_dit_name, diffusers_halves, without_wrappers
from wan.weights.source import Source

_ANY = r"(?:\.[^.]+)?"  # the adapter's name, which PEFT may put in
# Part -> the ends of keys that mean it. PEFT: lora_A/B; kohya, musubi: lora_down/up; then LyCORIS and extracted diffs.
_SUFFIXES = {
    "up": rf"\.lora_up\.weight|\.lora_B{_ANY}\.weight|[._]lora\.(?:up|B)\.weight|\.lora_linear_layer\.up\.weight"
    r"|\.lora_B",
    "down": rf"\.lora_down\.weight|\.lora_A{_ANY}\.weight|[._]lora\.(?:down|A)\.weight"
    r"|\.lora_linear_layer\.down\.weight|\.lora_A",
    "mid": r"\.lora_mid\.weight",
    "up_bias": rf"\.lora_B{_ANY}\.bias",
    "alpha": r"\.alpha",
    "dora": rf"\.dora_scale|\.lora_magnitude_vector{_ANY}{_ANY}",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
    "set": r"\.set_weight",
    "reshape": r"\.reshape_weight",
    "w_norm": r"\.w_norm",
    "b_norm": r"\.b_norm",
    **{f"lokr_{one}": rf"\.lokr_{one}" for one in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    **{f"hada_{one}": rf"\.hada_{one}" for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
_KEY = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<{part}>{ends})" for part, ends in _SUFFIXES.items()) + ")")
_REFUSED = {
    "GLoRA": re.compile(r".+\.[ab][12]\.weight"),
    "a Stand-In identity adapter": re.compile(r".+_loras\.(down|up)\.weight"),
}
# What may stand before a module: parts with dots, and `lora_unet_` and the like of trainers that write no dots.
_PREFIX = re.compile(r"(?:[^.]+\.)*(?:(?:lora|lycoris)(?:_+[A-Za-z0-9]+)*_+)?")
_OTHER_NETWORK = re.compile(
    r"(?:^|[._])(?:te\d?|text|text_encoders?|text_model|cond_stage_model|conditioner|clip|t5|umt5|vae|first_stage_model"
    r"|controlnet|audio|motion|face|critic|discriminator)(?=[._]|$)|(?:^|[._])vace_$"
)
# diffusers calls the high-noise expert of Wan2.2 `transformer`, and the other one `transformer_2`.
_HALVES = {
    "low": re.compile(r"(?:^|[._])(?:transformer_2|low_noise_model|low_noise)[._]"),
    "high": re.compile(r"(?:^|[._])(?:transformer_1|high_noise_model|high_noise)[._]"),
    "unnumbered": re.compile(r"(?:^|[._])transformer[._]"),
}
# What a file may hold beside what the model has: t2v and i2v LoRAs are used on each other's models.
_FAMILIES = {
    "the image branch": re.compile(
        r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k"
        r"|image_embedder)([._]|$)"
    ),
    "vace_blocks": re.compile(r"(^|[._])vace_blocks[._]"),
    "a text encoder": re.compile(r"^(lora_te|text_encoder|cond_stage_model|text_encoders)"),
}
_MAX_PARTS = 32  # of a module's name that are looked at
_CONFIG_KEY = "lora_adapter_metadata"  # where diffusers keeps the adapter's configuration


@dataclass(frozen=True)
class Module:
    """What the file holds for one module: part -> key. stem: how the file calls the module."""

    stem: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT keeps beside the tensors, where a file has no `.alpha`.

    alpha_pattern: names of modules, or how they end, in order; the first that fits counts. not_obeyed: patterns that
    are more than names.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    not_obeyed: tuple[str, ...] = ()

    def scale(self, stem: str, rank: int) -> float:
        """By which the product of a module's factors is multiplied: alpha / rank, 1 where nothing is said."""
        parts = stem.rsplit(".", _MAX_PARTS)
        ends = {".".join(parts[first:]) for first in range(len(parts))}
        alpha = next((value for name, value in self.alpha_pattern.items() if name in ends), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)


class _Entry(NamedTuple):
    """A tensor of a module: its key, the module as the file calls it and as we do, what it is, and whose half."""

    key: str
    stem: str
    path: str
    part: str
    half: str


def sort_keys(source: Source, names: Iterable[str], expert: str) -> tuple[dict[str, Module], list[str], bool]:
    """(official path -> its tensors, keys that belong to no part of the model, whether the file has a half for each
    expert), for a model of the parameters `names`.

    A path is a module's, or that of a parameter outside of one; that of a block, for its modulation. Of a layer that
    diffusers has in two it may be followed by ":0" or ":1", see `diffusers_halves`. expert: "high" or "low", whose half
    is taken where there are halves, or "model". Raises SwanError where the file is no LoRA, is one of a kind that
    cannot be merged, holds two tensors for the same part, or halves for a model of one expert.
    """
    table = _table(names)
    longest = max(map(len, table), default=0)
    entries: list[_Entry] = []
    unmatched, known = [], 0
    for key in source.keys():
        for kind, pattern in _REFUSED.items():
            if pattern.fullmatch(key):
                raise SwanError(f"{source.describe()}: holds {kind} ({printable(key)}), which is not supported")
        match = _KEY.fullmatch(key)
        known += match is not None
        found = match and _look_up(match["stem"], table, longest)
        if found is None:
            unmatched.append(key)
        else:
            entries.append(_Entry(key, match["stem"], table[found[1]], match.lastgroup, _half(found[0])))
    if not known:
        raise SwanError(f"{source.describe()}: not a LoRA{looks_like(source)}")
    mine = _of_expert(source, entries, expert)
    modules: dict[str, Module] = {}
    for one in mine:
        keys = modules.setdefault(one.path, Module(one.stem)).keys
        if one.part in keys:
            two = f"{printable(keys[one.part])} and {printable(one.key)}"
            raise SwanError(f"{source.describe()}: {two} are the same part: it holds several adapters")
        keys[one.part] = one.key
    return modules, unmatched, any(one.half in ("low", "high") for one in entries)


def _look_up(stem: str, table: Container[str], longest: int) -> tuple[str, str] | None:
    """(prefix, the rest as it is in `table`) of a module's name; the longest rest that is there."""
    stem = without_wrappers(stem.replace("_orig_mod_", ""))
    flat = stem.replace(".", "_")
    for start in range(max(0, len(flat) - longest), len(flat)):
        if start and flat[start - 1] != "_" or flat[start:] not in table:
            continue
        prefix = stem[:start]
        is_other = _OTHER_NETWORK.search(prefix) or not _PREFIX.fullmatch(prefix)
        return None if is_other else (prefix, flat[start:])
    return None


def _half(prefix: str) -> str:
    return next((half for half, pattern in _HALVES.items() if pattern.search(prefix)), "")


def _of_expert(source: Source, entries: list[_Entry], expert: str) -> list[_Entry]:
    """All of them, or those of one expert's half."""
    halves = {one.half for one in entries}
    if not halves & {"low", "high"}:
        return entries
    if expert not in ("low", "high"):
        both = "halves for the two experts of Wan2.2 (transformer. and transformer_2.)"
        raise SwanError(f"{source.describe()}: a LoRA with {both}, and this task has one transformer: save one of them")
    if neither := halves - {"low", "high", "unnumbered" if "low" in halves else "low"}:
        key = printable(next(one.key for one in entries if one.half in neither))
        raise SwanError(f"{source.describe()}: a LoRA with halves for two experts, and {key} is in neither of them")
    wanted = {"low"} if expert == "low" else {"high", "unnumbered"}
    return [one for one in entries if one.half in wanted]


def families(keys: Iterable[str], names: Iterable[str]) -> str:
    """Keys that were not used, counted: "160 of the image branch, 4 of blocks.*.foo"."""
    starred = {_starred(path) for path in _table(names)}
    longest = max(map(len, starred), default=0)
    counts = Counter(_family(key, starred, longest) for key in keys)
    listed = [f"{count} of {family}" for family, count in counts.most_common(5)]
    return ", ".join(listed) + (f" and others ({len(counts) - 5} kinds)" if len(counts) > 5 else "")


def read_config(source: Source, expert: str = "model", has_halves: bool = False) -> AdapterConfig:
    """The PEFT configuration in the file's metadata, or in the adapter_config.json that belongs to it.

    Raises SwanError where it makes no sense.
    """
    told = _metadata(source, "transformer_2." if has_halves and expert == "low" else "transformer.")
    path = source.paths[0].parent / "adapter_config.json"
    # Other files of the folder are of other adapters.
    if not told and path.is_file() and source.paths[0].stem == "adapter_model":
        told = read_json(path)
    where = f"{source.describe()}: its adapter configuration is damaged"
    if not isinstance(told, dict) or not isinstance(told.get("alpha_pattern") or {}, dict):
        raise SwanError(f"{where} ({'alpha_pattern is' if isinstance(told, dict) else 'it is'} no JSON object)")
    alpha, patterns, not_obeyed = told.get("lora_alpha"), {}, []
    for pattern, value in (told.get("alpha_pattern") or {}).items():
        name = _literal(where, pattern)
        if name is None:
            not_obeyed.append(pattern)
        else:
            patterns[name] = _finite(where, f"alpha_pattern {pattern}", value)
    alpha = None if alpha is None else _finite(where, "lora_alpha", alpha)
    return AdapterConfig(alpha, patterns, told.get("use_rslora") in (True, "true", "True"), tuple(not_obeyed))


def _finite(where: str, name: str, value: Any) -> float:
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SwanError(f"{where} ({printable(name)[:80]} is {printable(repr(value))[:40]}, no finite number)")
    return number


def _literal(where: str, pattern: str) -> str | None:
    """The name that a pattern of PEFT stands for; None if it is more than that. They are regular expressions by
    definition and names in practice, and a file's regular expression can take for ever."""
    name = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    if any(name.count(one) != name.count(other) for one, other in ("()", "[]", "{}")):
        raise SwanError(f"{where} (alpha_pattern {printable(pattern)[:80]} is no name of a module)")
    return None if re.search(r"[\\^$*+?()\[\]{}|]", name) else name


def _metadata(source: Source, half: str = "transformer.") -> dict[str, Any]:
    """Entries of the file's metadata by PEFT's names, be they prefixed (with `half`), packed into one JSON text, or
    texts."""
    metadata: Any = getattr(source, "metadata", {})
    if not isinstance(metadata, Mapping):
        raise SwanError(f"{source.describe()}: its metadata is damaged (no JSON object)")
    found = {name: metadata[name] for name in ("lora_alpha", "alpha_pattern", "use_rslora") if name in metadata}
    for name, value in found.items():
        try:
            found[name] = parse_json(value) if isinstance(value, str) else value
        except ValueError:
            continue  # "True"
    try:
        packed = parse_json(metadata.get(_CONFIG_KEY, "{}"))
        return found | {name.removeprefix(half): value for name, value in packed.items()}
    except (AttributeError, TypeError, ValueError):
        raise SwanError(f"{source.describe()}: its metadata {_CONFIG_KEY} is damaged") from None


def _table(names: Iterable[str]) -> dict[str, str]:
    """Every name that a module may go by -> its official path."""
    table: dict[str, str] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        bare = leaf not in ("weight", "bias")
        paths = [name, module] if bare else [module]  # `blocks.0.diff_m` belongs to blocks.0.modulation
        for path in filter(None, paths):
            for alias in (path, diffusers_dit_name(path)):
                table.setdefault(alias, path)
                table.setdefault(alias.replace(".", "_"), path)
            for number, alias in enumerate(diffusers_halves(path)):
                table |= dict.fromkeys((alias, alias.replace(".", "_")), f"{path}:{number}")
    return table


def _family(key: str, starred: set[str], longest: int) -> str:
    match = _KEY.fullmatch(key)
    stem = match["stem"] if match else key
    for family, pattern in _FAMILIES.items():
        if pattern.search(stem):
            return family
    if match is None:
        return f"an unknown kind ({printable(_starred(key))})"
    if _look_up(_starred(stem), starred, longest):
        return f"layers or parts that this model has not ({printable(_starred(stem))})"
    return printable(_starred(stem))


def _starred(name: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", name)
