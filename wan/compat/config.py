"""Hyperparameters of a transformer as other projects write them, and the YAML files of VideoX-Fun. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wan.errors import SwanError, UsageError
from wan.tasks import KINDS

# Hyperparameters by their official names; a number may be whole only.
_WHOLE = ("text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers")
_HYPERPARAMETERS = (*_WHOLE, "model_type", "patch_size", "eps", "clip")
_ALIASES = {  # of VideoX-Fun and diffusers; the official name wins where both are given
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
}
# Parts of the architecture that every released model has alike.
_FIXED = {
    "window_size": ([-1, -1],),
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
    "rope_max_seq_len": (1024,),
}
# Follow from the tensors, or say how another loader names or finds them.
_TOLD_BY_THE_FILE = (
    *("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "use_ggml_ops", "dequant_dtype", "patch_dtype"),
    *("dict_mapping", "transformer_subpath", "transformer_low_noise_model_subpath"),
    *("transformer_high_noise_model_subpath", "cross_attn_type", "vace_layers", "vace_in_dim", "vace_in_channels"),
)


def hyperparameters(config: Mapping[str, Any] | str | os.PathLike | None, name: str = "config") -> dict[str, Any]:
    """The settings of `config` under the official names, as `WanModel` takes them; keys that say nothing are left out.

    config: a mapping, or the path of a JSON or YAML file, in the terms of the official config.json, VideoX-Fun or
    diffusers. `name` stands for it in messages. Raises UsageError for a key or a value that cannot be honoured.
    """
    if isinstance(config, (str, os.PathLike)):
        config, name = read_yaml(config), str(config)
    given = {key: value for key, value in dict(config or {}).items() if not key.startswith("_") and value is not None}
    for key, allowed in _FIXED.items():
        value = given.pop(key, allowed[0])
        if (list(value) if isinstance(value, (list, tuple)) else value) not in allowed:
            raise UsageError(f"{name}: {key} {value!r} is not supported; released models have {allowed[0]!r}")
    head_dim = given.pop("attention_head_dim", None)
    given = {_ALIASES[key]: value for key, value in given.items() if key in _ALIASES} | {
        key: value for key, value in given.items() if key not in (*_ALIASES, *_TOLD_BY_THE_FILE)
    }
    if unknown := sorted(set(given) - set(_HYPERPARAMETERS)):
        raise UsageError(f"{name}: unknown hyperparameter {', '.join(unknown)}; known: {', '.join(_HYPERPARAMETERS)}")
    for key in _WHOLE:
        if key in given and (type(given[key]) is not int or given[key] < 1):
            raise UsageError(f"{name}: {key} must be a whole number above 0, not {given[key]!r}")
    if "eps" in given:
        try:
            given["eps"] = float(given["eps"])  # YAML takes 1e-6, without a point, for text
        except (TypeError, ValueError):
            raise UsageError(f"{name}: eps must be a number, not {given['eps']!r}") from None
    if head_dim and "num_heads" in given:
        given.setdefault("dim", head_dim * given["num_heads"])
    if given.get("model_type", "t2v") not in KINDS:
        raise UsageError(f"{name}: model_type must be one of {', '.join(KINDS)}, not {given['model_type']!r}")
    if "patch_size" in given:
        sizes = given["patch_size"]
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 3 or any(type(size) is not int for size in sizes):
            raise UsageError(f"{name}: patch_size must be three whole numbers, not {sizes!r}")
        given["patch_size"] = list(sizes)
    return given


@dataclass(frozen=True)
class FunConfig:
    """What a VideoX-Fun YAML file says about a run. None: the file does not say.

    files: sub-path by component (vae, t5, tokenizer, clip); stride: (temporal, spatial) of the VAE;
    dit: hyperparameters; boundary: of two experts; warnings: lines about keys without effect
    """

    name: str = "config"
    files: dict[str, str] = field(default_factory=dict)
    shift: float | None = None
    stride: tuple[int | None, int | None] = (None, None)
    dit: dict[str, Any] = field(default_factory=dict)
    boundary: float | None = None
    warnings: tuple[str, ...] = ()


_SUBPATHS = {
    "vae": ("vae_kwargs", "vae_subpath"),
    "t5": ("text_encoder_kwargs", "text_encoder_subpath"),
    "tokenizer": ("text_encoder_kwargs", "tokenizer_subpath"),
    "clip": ("image_encoder_kwargs", "image_encoder_subpath"),
}
# Keys without effect here: the shapes of an encoder are read from its file, the others name nothing that is loaded.
_SILENT = {
    "vae_kwargs": {"vae_type"},
    "text_encoder_kwargs": {
        *("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets", "dropout"),
        *("tokenizer_type", "text_encoder_type"),
    },
    "scheduler_kwargs": {"scheduler_subpath", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"},
    "image_encoder_kwargs": set(),
}
# Keys whose only value that this sampler or encoder knows is the one here.
_ONLY = {
    "text_encoder_kwargs": {"shared_pos": False},
    "scheduler_kwargs": {"num_train_timesteps": 1000, "use_dynamic_shifting": False},
}
_READ = {
    "vae_kwargs": {"vae_subpath", "temporal_compression_ratio", "spatial_compression_ratio"},
    "text_encoder_kwargs": {"text_encoder_subpath", "tokenizer_subpath", "text_length"},
    "scheduler_kwargs": {"shift"},
    "image_encoder_kwargs": {"image_encoder_subpath"},
}


def read_fun_config(path: str | os.PathLike | None) -> FunConfig:
    """Read a VideoX-Fun YAML file such as its `config/wan2.1/wan_civitai.yaml`. None: nothing is said.

    Raises UsageError where there is no such file or a value cannot be honoured, SwanError where it is no such YAML.
    """
    if path is None:
        return FunConfig()
    data = read_yaml(path)
    name, warnings = str(path), []
    sections = {section: _section(data, section, name) for section in (*_READ, "transformer_additional_kwargs")}
    for key in sorted(set(data) - set(sections) - {"format", "pipeline"}):
        warnings.append(f"{name}: {key} has no effect")
    for section, read in _READ.items():
        only = _ONLY.get(section, {})
        for key, value in sections[section].items():
            if key in only and value not in (only[key], None):
                raise UsageError(f"{name}: {section}.{key} must be {only[key]}, not {value!r}")
            if key not in read | _SILENT[section] | set(only):
                warnings.append(f"{name}: {section}.{key} has no effect")
    transformer = dict(sections["transformer_additional_kwargs"])
    if sections["text_encoder_kwargs"].get("text_length", 512) not in (512, None):
        warnings.append(f"{name}: text_encoder_kwargs.text_length has no effect: a model reads what it was trained on")
    single = transformer.pop("transformer_combination_type", None) == "single"
    boundary = transformer.pop("boundary", None)
    vae = sections["vae_kwargs"]
    return FunConfig(
        name=name,
        files=_subpaths(sections, name),
        shift=_shift(sections["scheduler_kwargs"].get("shift"), name),
        stride=(vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")),
        dit=hyperparameters(transformer, f"{name}: transformer_additional_kwargs"),
        boundary=None if single else boundary,
        warnings=tuple(warnings),
    )


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The table in a YAML or JSON file. Raises UsageError where there is no file, SwanError where it is no table."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"no config file {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SwanError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise SwanError(f"{path}: must hold a table of keys, not a {type(data).__name__}")
    return data or {}


def _section(data: Mapping[str, Any], section: str, name: str) -> Mapping[str, Any]:
    value = data.get(section)
    if value is not None and not isinstance(value, dict):
        raise SwanError(f"{name}: {section} must be a table of keys, not {value!r}")
    return value or {}


def _subpaths(sections: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    found = {}
    for part, (section, key) in _SUBPATHS.items():
        value = sections[section].get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise UsageError(f"{name}: {section}.{key} must be a path, not {value!r}")
        if value:
            found[part] = value
    return found


def _shift(value: Any, name: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
        raise UsageError(f"{name}: scheduler_kwargs.shift must be a number above 0, not {value!r}")
    return value
