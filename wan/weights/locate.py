"""Find the files of each component: a folder in the layout of the official code, diffusers, LightX2V or mlx-video, or a
hub id. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from wan.errors import SwanError, UsageError
from wan.files import visible_files, visible_names
from wan.weights.source import WEIGHT_SUFFIXES, weight_files

OVERRIDES = ("dit", "high", "low", "vae", "tae", "t5", "tokenizer", "clip", "wav2vec")

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_DIFFUSERS = {
    "model": "transformer",
    "high": "transformer",  # Wan2.2: the first transformer is the high-noise expert
    "low": "transformer_2",
    "vae": "vae",
    "t5": "text_encoder",
    "clip": "image_encoder",
    "wav2vec": "audio_encoder",
    "tokenizer": "tokenizer",
}
MLX_FILES = {  # of mlx-video, all in one folder
    "model": "model.safetensors",
    "high": "high_noise_model.safetensors",
    "low": "low_noise_model.safetensors",
    "vae": "vae.safetensors",
    "t5": "t5_encoder.safetensors",
}
_MLX_VAE_ENCODER = "vae_encoder.safetensors"  # there in some versions
# Of LightX2V, below the checkpoint's folder: the same parts in several precisions, distilled or not.
LIGHTX2V_FOLDERS = ("distill_fp8", "distill_int8", "distill_models", "fp8", "int8", "original")
_LIGHTX2V_DISTILLED = "distill_model.pt"  # its first distilled transformer
_LIGHTX2V_BLOCK = re.compile(r"(non_)?block(_\d+)?\.safetensors")  # one file for each block
EXPERT = re.compile(r"(high|low)[-_. ]?noise", re.IGNORECASE)  # in names of files
_LIGHT_VAE = re.compile(r"(taew|lighttae|lightvae)\w*\.", re.IGNORECASE)  # and no transformer
_WAV2VEC_FILES = ("config.json", "model*.safetensors*", "pytorch_model*.bin")
_TWINS = ("t5", "clip")  # parts that LightX2V also quantises
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class CheckpointFiles:
    """Files of each component. Every list can be given to `open_source`; what is missing is [] or None."""

    dit: dict[str, list[Path]]  # "model", or "high" and "low"
    vae: list[Path]
    t5: list[Path]
    tokenizer: Path | None  # a folder
    clip: list[Path] | None  # only for tasks with an image encoder
    wav2vec: list[Path] | None = None  # only for tasks with an audio encoder
    tae: list[Path] | None = None  # only if one is given
    folder: Path | None = None  # the checkpoint's, downloaded if need be; None if single files are all of it


class MissingPart(SwanError):
    """A component that is not in its folder."""


def locate(
    ckpt_dir: str | PathLike | None,
    spec: Mapping[str, Any],
    overrides: Mapping[str, str | PathLike] | None = None,
    partial: bool = False,
) -> CheckpointFiles:
    """Find every file that task `spec` needs.

    ckpt_dir: a folder in the layout of the official code, diffusers, LightX2V or mlx-video, or a hub id
    `org/name[@revision]`, which is downloaded (or found in the cache) by huggingface_hub. None if `overrides` name
    everything.
    spec: `name`, `files` (official file names of `t5`, `vae`, `tokenizer` and perhaps `clip` and `wav2vec`; `base`: the
    rest of a transformer of which the folder has a part) and, for two experts, `experts` (`low`, `high` folder names).
    overrides: a file or folder for any of OVERRIDES; "dit" is for one expert.
    partial: what is missing may be; of a hub id, what is in its cache is found, and nothing is downloaded.

    With a TAE, which decodes, the VAE may be missing, and is not downloaded for a task that makes videos from text.

    Raises UsageError for a folder or an override that does not exist, SwanError for what is missing in the folder.
    """
    given = _check_overrides(overrides or {}, spec)
    experts = dict(spec.get("experts") or {"model": "."})
    parts = [*experts, "vae", "t5", "tokenizer", *(part for part in ("clip", "wav2vec") if spec["files"].get(part))]
    parts += ["tae"] if "tae" in given else []
    optional = {"vae"} if "tae" in given else set()
    wanted = [part for part in parts if part not in given and not (part in optional and spec.get("kind") == "t2v")]
    root = _resolve(ckpt_dir, spec, wanted, partial) if wanted else None
    found: dict[str, Any] = {}
    for part in parts:
        if part in given:
            found[part] = given[part] if part == "tokenizer" else files_at(given[part])
        elif not partial and part not in optional:
            found[part] = _find(root, part, spec)
        elif root is not None:
            with contextlib.suppress(MissingPart):
                found[part] = _find(root, part, spec)
    return CheckpointFiles(
        dit={name: found.get(name, []) for name in experts},
        vae=found.get("vae", []),
        t5=found.get("t5", []),
        tokenizer=found.get("tokenizer"),
        clip=found.get("clip"),
        wav2vec=found.get("wav2vec"),
        tae=found.get("tae"),
        folder=root,
    )


def _check_overrides(overrides: Mapping[str, str | PathLike], spec: Mapping[str, Any]) -> dict[str, Path]:
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise UsageError(f"cannot override {', '.join(unknown)}; allowed: {', '.join(OVERRIDES)}")
    two = bool(spec.get("experts"))
    wrong = [name for name in ("dit",) if two and name in overrides]
    wrong += [name for name in ("high", "low") if not two and name in overrides]
    if wrong:
        needs = "two experts, give high and low" if two else "one transformer, give dit"
        raise UsageError(f"task {spec['name']} has {needs}, not {' and '.join(wrong)}")
    result = {}
    for name, value in overrides.items():
        path = Path(value).expanduser()
        if not path.exists():
            raise UsageError(f"{name}: no such file or folder: {path}")
        result["model" if name == "dit" else name] = path
    return result


def _resolve(
    ckpt_dir: str | PathLike | None, spec: Mapping[str, Any], wanted: Iterable[str], partial: bool
) -> Path | None:
    """The checkpoint folder, downloaded if need be; or, of a hub id, as it is in the cache, None if it is not."""
    if ckpt_dir is None or not str(ckpt_dir):
        if partial:
            return None
        raise UsageError(f"task {spec['name']} needs a checkpoint folder or hub id for: {', '.join(wanted)}")
    folder = Path(ckpt_dir).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{folder} is a file, not a checkpoint folder")
    hub_id = _HUB_ID.fullmatch(str(ckpt_dir))
    if hub_id is None:
        raise UsageError(f"no such checkpoint folder: {folder} (a hub id would be org/name)")
    if partial:
        return _in_cache(hub_id["repo"], hub_id["revision"])
    return _download(hub_id["repo"], hub_id["revision"], spec, list(wanted))


def _download(repo: str, revision: str | None, spec: Mapping[str, Any], wanted: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SwanError(f"no folder {repo} here, and huggingface_hub is not installed to download it") from None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_patterns(spec, wanted)))
    except Exception as error:  # network, authentication, unknown repository, offline: all end the run the same way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = f"{repo}@{revision}" if revision else repo
        raise SwanError(f"no folder {repo} here, and it cannot be had from the hub as {where}: {reason}") from error


def _in_cache(repo: str, revision: str | None) -> Path | None:
    """The folder of what has been downloaded, perhaps in part; None if nothing has. No network."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or no library for it
        return None


def _patterns(spec: Mapping[str, Any], wanted: list[str]) -> list[str]:
    """What to download: the files of the `wanted` parts in either layout. A repository has one of the two."""
    official = {**spec["files"], **(spec.get("experts") or {}), "model": "diffusion_pytorch_model*"}
    folders = {"tokenizer", "wav2vec", *(spec.get("experts") or ())}
    patterns = ["config.json", "model_index.json"]
    for part in wanted:
        names = _WAV2VEC_FILES if part == "wav2vec" else ("*",)  # it has a language model beside it
        patterns += [f"{official[part]}/{name}" for name in names] if part in folders else [official[part]]
    patterns += [f"{_DIFFUSERS[part]}/*" for part in wanted]
    return patterns + [MLX_FILES[part] for part in wanted if part in MLX_FILES]


def _find(root: Path, part: str, spec: Mapping[str, Any]) -> Any:
    """Files of a part, or the folder of the tokenizer: at the top, else in the one folder of LightX2V that has it."""
    try:
        return _find_in(root, part, spec)
    except MissingPart as missing:
        found = {}
        for name in LIGHTX2V_FOLDERS:
            with contextlib.suppress(MissingPart):
                found[name] = _find_in(root / name, part, spec)
        if not found:
            raise missing
        if len(found) > 1 and part != "tokenizer":  # which is the same everywhere
            raise _unclear(root, part, [f"{name}/" for name in found]) from None
        return next(iter(found.values()))


def _find_in(root: Path, part: str, spec: Mapping[str, Any]) -> Any:
    diffusers = root / _DIFFUSERS[part]
    if part == "tokenizer":
        return _find_tokenizer(root, spec)
    if part == "model":
        found = _root_dit(root, spec)
        base = root / spec["files"].get("base", "")
        if found and base.is_file():  # of a folder that has the branch alone
            found = [base, *found]
        looked_for = "diffusion_pytorch_model*.safetensors"
    elif part in ("high", "low"):
        folder = root / spec["experts"][part]
        found = weight_files(folder) if folder.is_dir() else []
        looked_for = f"{spec['experts'][part]}/*.safetensors"
    elif part == "wav2vec":
        folder = _official(root, spec, part)
        found = weight_files(folder) if folder.is_dir() else []
        looked_for = f"{spec['files'][part]}/"
    else:
        official = _official(root, spec, part)
        same = [official.with_suffix(suffix) for suffix in (official.suffix, *WEIGHT_SUFFIXES)]
        found = [path for path in same if path.is_file()][:1] or _quantised_twins(root, part, spec)
        if len(found) > 1:
            raise _unclear(root, part, [path.name for path in found])
        looked_for = spec["files"][part]
    if not found and diffusers.is_dir():
        found = weight_files(diffusers)
    if not found and part in MLX_FILES and (root / MLX_FILES[part]).is_file():
        more = [root / _MLX_VAE_ENCODER] if part == "vae" else []
        found = [root / MLX_FILES[part], *(path for path in more if path.is_file())]
    if not found and part in ("high", "low"):
        found = _named_expert(root, part)
    if not found:
        raise _missing(root, part, f"{looked_for} and {_DIFFUSERS[part]}/")
    return found


def _root_dit(root: Path, spec: Mapping[str, Any]) -> list[Path]:
    """Weights of a single transformer at the top of the folder, that is, all that are no other component."""
    named = visible_files(root, "diffusion_pytorch_model*.safetensors.index.json")
    named = named or visible_files(root, "diffusion_pytorch_model*.safetensors")
    if named or (root / _DIFFUSERS["model"]).is_dir():
        return named
    if indexes := visible_files(root, "*.safetensors.index.json"):
        return indexes[:1] if len(indexes) == 1 else weight_files(root)  # which refuses several
    if (root / MLX_FILES["model"]).is_file():
        return [root / MLX_FILES["model"]]
    others = {Path(name).stem for name in spec["files"].values()}
    others |= {path.stem for part in _TWINS for path in _quantised_twins(root, part, spec)}
    rest = [one for name in ("*.safetensors", "*.gguf", _LIGHTX2V_DISTILLED) for one in visible_files(root, name)]
    rest = [path for path in rest if path.stem not in others and not _LIGHT_VAE.match(path.name)]
    if rest and all(_LIGHTX2V_BLOCK.fullmatch(path.name) for path in rest):
        return rest
    if len(rest) > 1:
        names = ", ".join(path.name for path in rest[:4])
        raise SwanError(f"{root}: cannot tell which file is the transformer ({names}); name it with --dit")
    return rest


def _named_expert(root: Path, part: str) -> list[Path]:
    """Weights of an expert at the top of the folder, told by its name: `wan2.2_i2v_A14b_high_noise_*.safetensors`."""
    files = visible_files(root, "*.safetensors") + visible_files(root, "*.gguf")
    files = [path for path in files if "lora" not in path.name.lower()]
    found = [path for path in files if (told := EXPERT.search(path.name)) and told[1].lower() == part]
    if len(found) > 1:
        raise _unclear(root, part, [path.name for path in found])
    return found


def _official(root: Path, spec: Mapping[str, Any], part: str) -> Path:
    """Where a part lies by its task. An embedded task takes some from the folder of another one (../NAME/FILE), where
    that is there; a folder that was converted from it has them all."""
    name = Path(spec["files"][part])
    if name.parts[0] == ".." and not (root / name).parent.is_dir():
        name = Path(*name.parts[2:])
    return root / name


def _quantised_twins(root: Path, part: str, spec: Mapping[str, Any]) -> list[Path]:
    """Files of LightX2V in place of an official encoder: `X-fp8.pth` or `X-int8.pth` for `X-bf16.pth` or `X.pth`."""
    if part not in _TWINS or part not in spec["files"]:
        return []
    official = _official(root, spec, part)
    stem = official.stem.removesuffix("-bf16")
    return [path for path in visible_files(official.parent, f"{stem}-*") if path.suffix in WEIGHT_SUFFIXES]


def _find_tokenizer(root: Path, spec: Mapping[str, Any]) -> Path:
    folders = [_official(root, spec, "tokenizer"), root / _DIFFUSERS["tokenizer"]]
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    looked_for = " and ".join(f"{os.path.relpath(folder, root)}/" for folder in folders)
    raise _missing(root, "tokenizer", f"{looked_for} with {' or '.join(TOKENIZER_FILES)}")


def files_at(path: Path) -> list[Path]:
    """A weight file that was named, or those of a folder."""
    if not path.is_dir():
        return [path]
    files = weight_files(path)
    if not files:
        raise SwanError(f"{path}: no weight files in it")
    return files


def _unclear(root: Path, part: str, names: Iterable[str]) -> SwanError:
    flag = "dit" if part == "model" else part
    return SwanError(f"{root}: cannot tell which of {', '.join(names)} to take; name it with --{flag}")


def _missing(root: Path, part: str, looked_for: str, limit: int = 12) -> MissingPart:
    names = [name + ("/" if os.path.isdir(root / name) else "") for name in visible_names(root)]
    there = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "nothing"
    what = {"model": "the transformer", "high": "the high-noise expert", "low": "the low-noise expert"}.get(part, part)
    return MissingPart(f"{root}: {what} is missing; looked for {looked_for}, found {there}")
