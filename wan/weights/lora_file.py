"""The tensors of a LoRA file, sorted by module: key -> (official path, part). Reads headers only.

A key is prefix + module + suffix. The suffix says what the tensor is, in whichever trainer's words. The module is
looked up whole, under our name or diffusers', dotted or with underscores throughout; nothing is replaced in names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wan.errors import SwanError
from wan.files import read_json
from wan.weights.infer import looks_like
from wan.weights.names import diffusers_dit_name
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
_PREFIXES = (
    *("base_model.model.", "model.", "diffusion_model.", "transformer.", "pipe.dit.", "unet."),
    *("lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_", "lora_prior_unet_"),
)
# What a file may hold beside what the model has: t2v and i2v LoRAs are used on each other's models.
_FAMILIES = {
    "the image branch": re.compile(
        r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k"
        r"|image_embedder)([._]|$)"
    ),
    "vace_blocks": re.compile(r"(^|[._])vace_blocks[._]"),
    "a text encoder": re.compile(r"^(lora_te|text_encoder|cond_stage_model|text_encoders)"),
}
_CONFIG_KEY = "lora_adapter_metadata"  # where diffusers keeps the adapter's configuration


@dataclass(frozen=True)
class Module:
    """What the file holds for one module: part -> key. stem: how the file calls the module."""

    stem: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT keeps beside the tensors, where a file has no `.alpha`."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, stem: str, rank: int) -> float:
        """By which the product of a module's factors is multiplied: alpha / rank, 1 where nothing is said."""
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", stem):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)


def sort_keys(source: Source, names: Iterable[str]) -> tuple[dict[str, Module], list[str]]:
    """(official path -> its tensors, keys that belong to no part of the model), for a model of the parameters `names`.

    A path is a module's, or that of a parameter outside of one; that of a block, for its modulation. Raises SwanError
    where the file is no LoRA, is one of a kind that cannot be merged, or holds two tensors for the same part.
    """
    table = _table(names)
    modules: dict[str, Module] = {}
    unmatched, known = [], 0
    for key in source.keys():
        for kind, pattern in _REFUSED.items():
            if pattern.fullmatch(key):
                raise SwanError(f"{source.describe()}: holds {kind} ({key}), which is not supported")
        match = _KEY.fullmatch(key)
        known += match is not None
        path = match and next((table[path] for path in _without_prefixes(match["stem"]) if path in table), None)
        if path is None:
            unmatched.append(key)
            continue
        keys = modules.setdefault(path, Module(match["stem"])).keys
        part = match.lastgroup
        if part in keys:
            raise SwanError(f"{source.describe()}: {keys[part]} and {key} are the same part: it holds several adapters")
        keys[part] = key
    if not known:
        raise SwanError(f"{source.describe()}: not a LoRA{looks_like(source)}")
    return modules, unmatched


def families(keys: Iterable[str], names: Iterable[str]) -> str:
    """Keys that were not used, counted: "160 of the image branch, 4 of blocks.*.foo"."""
    starred = {_starred(path) for path in _table(names)}
    counts = Counter(_family(key, starred) for key in keys)
    listed = [f"{count} of {family}" for family, count in counts.most_common(5)]
    return ", ".join(listed) + (f" and others ({len(counts) - 5} kinds)" if len(counts) > 5 else "")


def read_config(source: Source) -> AdapterConfig:
    """The PEFT configuration in the file's metadata, or in the adapter_config.json that belongs to it.

    Raises SwanError where it makes no sense.
    """
    told = _metadata(source)
    path = source.paths[0].parent / "adapter_config.json"
    # Other files of the folder are of other adapters.
    if not told and path.is_file() and source.paths[0].stem == "adapter_model":
        told = read_json(path)
    try:
        alpha, patterns = told.get("lora_alpha"), told.get("alpha_pattern") or {}
        return AdapterConfig(
            None if alpha is None else float(alpha),
            {re.compile(name).pattern: float(value) for name, value in patterns.items()},
            told.get("use_rslora") in (True, "true", "True"),
        )
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise SwanError(f"{source.describe()}: its adapter configuration is damaged ({error})") from None


def _metadata(source: Source) -> dict[str, Any]:
    """Entries of the file's metadata by PEFT's names, be they prefixed, packed into one JSON text, or texts."""
    metadata: Mapping[str, Any] = getattr(source, "metadata", {})
    found = {name: metadata[name] for name in ("lora_alpha", "alpha_pattern", "use_rslora") if name in metadata}
    for name, value in found.items():
        try:
            found[name] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            continue  # "True"
    try:
        packed = json.loads(metadata.get(_CONFIG_KEY, "{}"))
        return found | {name.removeprefix("transformer."): value for name, value in packed.items()}
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
    return table


def _without_prefixes(stem: str) -> Iterator[str]:
    """The stem, then the stem without each prefix it begins with, and so on."""
    yield stem
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            yield from _without_prefixes(stem[len(prefix) :])


def _family(key: str, starred: set[str]) -> str:
    match = _KEY.fullmatch(key)
    stem = match["stem"] if match else key
    for family, pattern in _FAMILIES.items():
        if pattern.search(stem):
            return family
    if match is None:
        return f"an unknown kind ({_starred(key)})"
    if any(_starred(path) in starred for path in _without_prefixes(stem)):
        return f"layers or parts that this model has not ({_starred(stem)})"
    return _starred(stem)


def _starred(name: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", name)
