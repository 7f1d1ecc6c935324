"""Tasks: one YAML file each in configs/tasks, read and checked against a schema. Imports no torch.

A task names the shapes of its models, the files of its checkpoint and the official sampling defaults.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from wan.errors import SwanError, UsageError

KINDS = ("t2v", "i2v", "flf2v", "ti2v", "vace", "s2v", "animate")  # see wan.tasks.kinds
OF_ANIMATE = ("motion_encoder_dim", "face_px", "face_dim", "motion_channels")  # in "dit"
REPO = Path(__file__).resolve().parents[2]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, in C, where PyYAML was built with it

# Key -> type, a tuple of types, or a nested table. A key that ends in "?" may be left out.
SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("name", "title", "kind"), str),
    "hub?": list,
    **dict.fromkeys(("checkpoint?", "prompt?", "image?", "audio?", "src_root_path?", "dtype?", "negative_prompt"), str),
    "vae_stride": list,
    "boundary?": float,
    # Names of cache coefficients (cache/data): in general, for runs from an image, and for those of 720p.
    **dict.fromkeys(("coefficients?", "coefficients_image?", "coefficients_720p?"), str),
    "dit": {
        "model_type": str,
        "patch_size": list,
        **dict.fromkeys(("text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim"), int),
        "num_heads": int,
        "num_layers": int,
        "eps": float,
        "clip?": bool,
        "vace_layers?": list,
        "vace_in_dim?": int,
        "audio_inject_layers?": list,
        **dict.fromkeys(("audio_dim?", "num_audio_token?", "cond_dim?", "motion_frames?"), int),
        "enable_adain?": bool,
        "enable_framepack?": bool,
        **{f"{key}?": int for key in OF_ANIMATE},
    },
    "vae": {
        "version": str,
        **dict.fromkeys(("dim", "dec_dim?", "z_dim"), int),
        "dim_mult": list,
        "num_res_blocks": int,
        **dict.fromkeys(("temporal_downsample", "latent_mean?", "latent_std?"), list),
    },
    "text": dict.fromkeys(("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets"), int),
    # As `wan.models.audio.audio_model` takes them; by default those of XLSR-53.
    "wav2vec?": dict.fromkeys(
        ("dim", "dim_ffn", "num_layers", "num_heads", "conv_dim", "position_width", "position_groups"), int
    ),
    "files": {"t5": str, "vae": str, "tokenizer": str, "clip?": str, "wav2vec?": str, "base?": str, "relighting?": str},
    "experts?": {"low": str, "high": str},
    "sampling": {
        "steps": int,
        "shift": float,
        "shift_480p?": float,
        "guide_scale": (float, int, list),
        "solver": str,
        "frame_num": int,
        "infer_frames?": int,
        "fps": int,
        "size": str,
        "sizes": list,
    },
}


def config_dir(kind: str) -> Path:
    """The folder of "tasks" or "presets": beside the package in a checkout, inside it when pip-installed."""
    for folder in (REPO / "configs" / kind, Path(__file__).resolve().parents[1] / "configs" / kind):
        if folder.is_dir():
            return folder
    raise SwanError(f"configs/{kind} is missing from this installation")


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(path.stem for path in config_dir("tasks").glob("*.yaml"))


def load_task(name: str) -> EasyDict:
    """The checked contents of configs/tasks/NAME.yaml.

    Raises UsageError for an unknown name (lists the valid ones) and SwanError, naming file and key, for a
    task file that does not follow the schema.
    """
    if name not in task_names():
        raise UsageError(f"unknown task {name!r}; tasks: {', '.join(task_names())}")
    return read_task(config_dir("tasks") / f"{name}.yaml")


def read_task(path: Path) -> EasyDict:
    """Read and check one task file. Raises SwanError that names the file and the key at fault."""
    return EasyDict(_task(path, _read(path)))


@lru_cache(maxsize=256)
def _task(path: Path, text: str) -> dict[str, Any]:
    data = _parse(path, text)
    _check(data, SCHEMA, path, "")
    _check_values(data, path)
    return data


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in config_dir("presets").glob("*.yaml"))


def load_preset(name: str, spec: EasyDict) -> dict[str, Any]:
    """Options, by their flags, that configs/presets/NAME.yaml sets for a task. Raises UsageError if there is none."""
    if name not in preset_names():
        raise UsageError(f"unknown --preset {name!r}; choose one of: {', '.join(preset_names())}")
    path = config_dir("presets") / f"{name}.yaml"
    data = _parse(path, _read(path))
    _check(data, {"title": str, "options": dict, "expert_options": dict}, path, "")
    return data["options"] | (data["expert_options"] if "experts" in spec else {})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SwanError(f"{path}: {' '.join(str(error).split())}") from error


def _parse(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SwanError(f"{path}: {' '.join(str(error).split())}") from error


def _check(data: Any, schema: dict[str, Any], path: Path, prefix: str) -> None:
    if not isinstance(data, dict):
        raise SwanError(f"{path}: {prefix.rstrip('.') or 'the file'} must be a table of keys")
    known = {key.rstrip("?") for key in schema}
    for key in data:
        if key not in known:
            raise SwanError(f"{path}: unknown key {prefix}{key}; allowed: {', '.join(sorted(known))}")
    for entry, kind in schema.items():
        key = entry.rstrip("?")
        if key not in data:
            if entry.endswith("?"):
                continue
            raise SwanError(f"{path}: key {prefix}{key} is missing")
        if isinstance(kind, dict):
            _check(data[key], kind, path, f"{prefix}{key}.")
        elif not isinstance(data[key], kind) or (isinstance(data[key], bool) and kind is not bool):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise SwanError(f"{path}: {prefix}{key} must be {names}, not {data[key]!r}")


def _check_values(data: dict[str, Any], path: Path) -> None:
    """What a type cannot say: names that must agree, and lists of a fixed length."""
    two_experts = "experts" in data
    pair = isinstance(data["sampling"]["guide_scale"], list) and len(data["sampling"]["guide_scale"]) == 2
    of_s2v = {bool(data["dit"].get("audio_inject_layers")), "wav2vec" in data["files"], data["kind"] == "s2v"}
    of_s2v.add("infer_frames" in data["sampling"])
    problems = {
        f"name must be {path.stem!r}": data["name"] != path.stem,
        f"kind must be one of {', '.join(KINDS)}": data["kind"] not in KINDS,
        "vae_stride must be three numbers": len(data["vae_stride"]) != 3,
        "dit.patch_size must be three numbers": len(data["dit"]["patch_size"]) != 3,
        "vae.version must be '2.1' or '2.2'": data["vae"]["version"] not in ("2.1", "2.2"),
        "image, audio and src_root_path are for tasks with a checkpoint, of kinds that have such inputs": any(
            key in data and ("checkpoint" not in data or data["kind"] not in kinds)
            for key, kinds in {"image": ("i2v", "s2v"), "audio": ("s2v",), "src_root_path": ("animate",)}.items()
        ),
        "either hub or checkpoint is needed": not data.get("hub") and not data.get("checkpoint"),
        "kind vace and dit.vace_layers go together": (data["kind"] == "vace") != bool(data["dit"].get("vace_layers")),
        "kind s2v, dit.audio_inject_layers, files.wav2vec and sampling.infer_frames go together": len(of_s2v) > 1,
        f"kind animate and dit.{', '.join(OF_ANIMATE)} go together": any(
            (data["kind"] == "animate") != (key in data["dit"]) for key in OF_ANIMATE
        ),
        "experts and boundary go together": two_experts != ("boundary" in data),
        "sampling.guide_scale must be [low, high] with experts, else one number": two_experts != pair,
    }
    for problem, wrong in problems.items():
        if wrong:
            raise SwanError(f"{path}: {problem}")


def grid_px(spec: EasyDict) -> int:
    """Width and height of a video must be multiples of this many pixels: VAE stride times patch."""
    return spec.vae_stride[1] * spec.dit.patch_size[1]


def embedded_checkpoint(spec: EasyDict) -> Path | None:
    """The folder of the weights that come with Swan, or None for a task whose weights are downloaded."""
    return REPO / spec.checkpoint if spec.get("checkpoint") else None
