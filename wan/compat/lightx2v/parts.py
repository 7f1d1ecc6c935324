"""What groups of keys mean, each for the options that they set together; see `translate`. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from easydict import EasyDict

from wan.cache.options import MIN_STEPS
from wan.compat.lightx2v.given import Given
from wan.compat.lightx2v.keys import LORA, PARALLEL
from wan.compat.lightx2v.models import CLASSES
from wan.models.attention_names import lightx2v_attention
from wan.options.names import MATMUL_NAMES
from wan.tasks import grid_px
from wan.weights.locate import LIGHTX2V_FOLDERS

Options = dict[str, Any]  # by flags; None: not set

_STEP_LIST = [1000, 750, 500, 250]  # of LightX2V's step-distilled models
_BOUNDARY_STEP = 2
_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
_TILE_PX = 256
_T5 = "models_t5_umt5-xxl-enc"
_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
_SUFFIXES = (".safetensors", ".pth")
_LIGHT = {"2.1": ("lightvaew2_1",), "2.2": ()}
_TINY = {"2.1": ("lighttaew2_1", "taew2_1"), "2.2": ("lighttaew2_2", "taew2_2")}


def files(at: Given) -> Options:
    """Where the transformer lies. A quantised file goes before the original one."""
    is_packed, folder = bool(at("dit_quantized")), at("model_path")
    scheme, found = at("dit_quant_scheme") if is_packed else None, {"ckpt_dir": folder}
    for flag, name in (("dit", "dit"), ("high", "high_noise"), ("low", "low_noise")):
        packed = _in_folder(at(f"{name}_quantized_ckpt"), scheme) if is_packed else None
        found[flag] = packed or (at(f"{name}_original_ckpt") or None)
    if not any(found[flag] for flag in ("dit", "high", "low")):
        found |= _of_scheme(folder, scheme)
    return found


def _of_scheme(folder: str | None, scheme: str | None) -> Options:
    """What a folder without a path of its own holds in a scheme, where it holds several."""
    inner = _in_folder(folder, scheme)
    if inner == folder:
        return {}
    experts = {name: os.path.join(inner, f"{name}_noise_model") for name in ("high", "low")}
    return experts if all(map(os.path.isdir, experts.values())) else {"dit": inner}


def _in_folder(path: str | None, scheme: str | None) -> str | None:
    """Of a folder with a model in several precisions what the scheme names: LightX2V's folder, or a GGUF file."""
    if path is None or scheme is None or not os.path.isdir(path):
        return path
    family, _, kind = scheme.partition("-")
    names = sorted(os.listdir(path))
    if family == "gguf":
        found = [name for name in names if name.endswith(".gguf") and kind in name]
    else:
        found = [name for name in (f"distill_{family}", family) if name in names]
    return os.path.join(path, found[0]) if found else path


def _encoders(at: Given, spec: EasyDict) -> Options:
    found: Options = {"tokenizer": at("t5_tokenizer_path")}
    for part, stem in (("t5", _T5), ("clip", _CLIP)):
        if part not in spec.files:
            continue
        if not at(f"{part}_quantized"):
            found[part] = at(f"{part}_original_ckpt")
            continue
        scheme = at(f"{part}_quant_scheme")
        if scheme is None:
            at.refuse(f"{part}_quantized", f"{part}_quant_scheme must say how")
        stems = [f"{stem}-{scheme.split('-')[0]}"]
        packed = at(f"{part}_quantized_ckpt") or at.ours.get(part)
        found[part] = packed or _find(at, f"{part}_quantized", stems)
    return found


def schemes(at: Given, spec: EasyDict) -> dict[str, tuple[str, str]]:
    """Component ("dit" for all experts) -> the key and the scheme that it says."""
    said = {}
    for part in ("dit", *(one for one in ("t5", "clip") if one in spec.files)):
        if at(f"{part}_quantized") and (scheme := at(f"{part}_quant_scheme")):
            said[part] = f"{part}_quant_scheme", scheme
    if at("dit_quantized") and "dit" not in said:
        at.refuse("dit_quantized", "dit_quant_scheme must say how")
    _tell_products(at, *said.get("dit", ("", "")))
    return said


def _tell_products(at: Given, key: str, scheme: str) -> None:
    """What follows a type in LightX2V's schemes, as fp8-vllm, is whose kernels multiply in 8 bits."""
    name, _, kernels = scheme.partition("-")
    if kernels and name in MATMUL_NAMES and at.ours.get("matmul") is None:
        at.note(key, f"weights are dequantised; --matmul {name} multiplies in 8 bits, with kernels of torch")


def _vae(at: Given, spec: EasyDict) -> Options:
    found: Options = {"vae": at("vae_path")}
    if at("use_lightvae") and not (found["vae"] or at.ours.get("vae")):
        found["vae"] = _find(at, "use_lightvae", _LIGHT[spec.vae.version])
    if at("use_tae"):
        found["tae"] = at("tae_path") or at.ours.get("tae") or _find(at, "use_tae", _TINY[spec.vae.version])
    tiles = at("use_tiling_vae")
    dtype = at("vae_dtype")
    if dtype is not None and dtype not in _DTYPES:
        at.refuse("vae_dtype", f"must be one of: {', '.join(_DTYPES)}")
    return {**found, "vae_tile_px": _TILE_PX if tiles else None, "vae_dtype": _DTYPES.get(dtype)}


def _find(at: Given, key: str, stems: Sequence[str]) -> str:
    """A file of the model's folder by its name, where LightX2V looks for it."""
    folder = at.ours.get("ckpt_dir") or at("model_path") or "."
    names = [stem + suffix for stem in stems for suffix in _SUFFIXES]
    for inner in (*LIGHTX2V_FOLDERS, "."):
        for name in names:
            if os.path.isfile(path := os.path.normpath(os.path.join(folder, inner, name))):
                return path
    if not names:
        at.refuse(key, "there is none for this model")
    at.refuse(key, f"{folder} holds no {' or '.join(names)}; name the file")


def is_distilled(at: Given) -> bool:
    """Whether a list of steps is used: by the model class; where none is given, by a list of as many steps as asked."""
    if (name := at("model_cls")) is not None:
        return CLASSES[name].is_distilled
    listed = at("denoising_step_list")
    return listed is not None and at("infer_steps") in (None, len(listed))


def _sampling(at: Given, spec: EasyDict) -> Options:
    options: Options = {"sample_shift": at("sample_shift"), "seed": at("seed")}
    options["sample_guide_scale"] = _guidance(at, spec)
    steps, has_two = at("infer_steps"), "experts" in spec
    if not is_distilled(at):
        if at("model_cls") is None and at("denoising_step_list"):
            at.note("denoising_step_list", f"has no effect: infer_steps is {steps}, so this is no distilled model")
        return options | {"sample_steps": steps, "boundary": at("boundary") if has_two else None}
    listed = list(at("denoising_step_list") or _STEP_LIST)
    if steps not in (None, len(listed)) and not at.is_default("infer_steps"):
        at.refuse("infer_steps", f"contradicts denoising_step_list, which has {len(listed)} steps")
    options |= {"denoising_step_list": listed, "sample_solver": "euler"}
    if has_two:
        at_step = at("boundary_step_index")
        options["boundary_step_index"] = _BOUNDARY_STEP if at_step is None else at_step
    return options


def _guidance(at: Given, spec: EasyDict) -> Any:
    """LightX2V guides where enable_cfg says so, and lists the high-noise expert first."""
    scale, guides = at("sample_guide_scale"), at("enable_cfg")
    parts = list(scale) if isinstance(scale, (list, tuple)) else [scale]
    if not parts or len(parts) > 2 or (len(set(parts)) > 1 and "experts" not in spec):
        at.refuse("sample_guide_scale", f"must be one number{', or [HIGH, LOW]' if 'experts' in spec else ''}")
    if guides is None and scale is not None and set(parts) != {1}:
        at.note("sample_guide_scale", "has no effect: without enable_cfg true LightX2V does not guide")
    if not guides and (guides is False or scale is not None):
        return 1
    return parts[::-1] if len(set(parts)) > 1 else parts[0]


def _shape(at: Given, spec: EasyDict) -> Options:
    options: Options = {"size": _size(at, spec)}
    if spec.kind == "s2v":
        return options | {"fps": at("target_fps")}
    return options | {"frame_num": at("target_video_length"), "fps": at("fps")}


def _size(at: Given, spec: EasyDict) -> str | None:
    if spec.kind == "animate":  # that of the pose video
        return None
    if spec.kind == "s2v" and (area := at("max_area")) is not None:
        return _of_area(at, area, grid_px(spec))
    height, width = at("target_height"), at("target_width")
    if shape := at("target_shape"):
        if len(shape) != 2:
            at.refuse("target_shape", "must be [height, width]")
        height, width = shape
    if (height is None) != (width is None):
        lacks = "target_width" if width is None else "target_height"
        at.refuse("target_height" if width is None else "target_width", f"needs {lacks} beside it")
    if height is None:
        return None
    if not all(isinstance(side, Real) and side == int(side) for side in (height, width)):
        at.refuse("target_shape", "must be [height, width], two whole numbers")
    return f"{int(width)}*{int(height)}"


def _of_area(at: Given, area: int, multiple: int) -> str:
    """Of an area in pixels its most square sides, for only the area counts."""
    for height in range(math.isqrt(area) // multiple * multiple, 0, -multiple):
        if area % height == 0 and area // height % multiple == 0:
            return f"{area // height}*{height}"
    at.refuse("max_area", f"must be a product of two multiples of {multiple}")


def _inputs(at: Given, spec: EasyDict) -> Options:
    """What the kind of task takes; a key of another kind is one that nobody asks for."""
    negative = at("negative_prompt")
    options = {"prompt": at("prompt") or None, "save_file": at("save_result_path") or None}
    options["negative_prompt"] = at("sample_neg_prompt") if negative is None else negative
    takes = {
        "i2v": ("image_path", "last_frame_path"),
        "flf2v": ("image_path", "last_frame_path"),
        "ti2v": ("image_path",),
        "vace": ("src_video", "src_mask", "src_ref_images"),
        "s2v": ("image_path", "audio_path", "src_pose_path", "infer_frames", "num_repeat"),
        "animate": ("src_pose_path", "src_face_path", "src_ref_images", "replace_flag", "refert_num"),
    }.get(spec.kind, ())
    flags = {"image_path": "image", "last_frame_path": "last_frame", "audio_path": "audio", "num_repeat": "num_clip"}
    flags |= {"src_pose_path": "pose_video" if spec.kind == "s2v" else "src_pose", "src_face_path": "src_face"}
    flags |= {"src_ref_images": "src_ref" if spec.kind == "animate" else "src_ref_images"}
    left_out = ["image_path"] if at("task") == "t2v" else ["last_frame_path"] if at("task") == "i2v" else []
    options |= {flags.get(key, key): at(key) or None for key in takes if key not in left_out}
    if options.get("replace_flag"):
        options |= _replaced(at)
    return options


def _replaced(at: Given) -> Options:
    """Background and mask; beside the pose video under the names that LightX2V's preprocessing gives them."""
    found = {"src_bg": at("src_bg_path"), "src_mask": at("src_mask_path")}
    pose = at("src_pose_path")
    for name, path in found.items():
        beside = os.path.join(os.path.dirname(str(pose)), f"{name}.mp4")
        if path is None and pose and os.path.isfile(beside):
            found[name] = beside
            at.note("replace_flag", f"{name}_path is not given: {beside} is taken")
    return found


def _offload(at: Given, spec: EasyDict) -> Options:
    options: Options = {"t5_offload": at("t5_cpu_offload"), "vae_offload": at("vae_cpu_offload")}
    if "clip" in spec.files:
        options["clip_offload"] = at("clip_cpu_offload")
    unloads = [name for name in ("unload_modules", "lazy_load") if at(name) is not None]
    if unloads:
        options["residency"] = "stage" if any(map(at, unloads)) else "keep"
    options["convert_model_dtype"] = at("convert_model_dtype") or None
    if not (offloads := at("cpu_offload")):
        return options | {"offload": None if offloads is None else "none"}
    options["offload"] = way = at("offload_granularity") or "block"
    if way not in ("block", "phase", "model"):
        at.refuse("offload_granularity", "must be block, phase or model")
    if way != "model" and (ratio := at("offload_ratio")) is not None:
        if not 0 <= ratio <= 1:
            at.refuse("offload_ratio", "must be from 0 to 1")
        options["resident_blocks"] = round((1 - ratio) * spec.dit.num_layers)
    return options


def _loras(at: Given, spec: EasyDict) -> Options:
    chosen: dict[str, list[tuple[str, float]]] = {}
    for number, entry in enumerate(at("lora_configs") or (), 1):
        if not isinstance(entry, Mapping):
            at.refuse("lora_configs", "must be a list of {path, strength}")
        one = at.inner("lora_configs", entry, LORA, number)
        path, strength, name = one("path"), one("strength"), one("name")
        flag = {None: "lora", "high_noise_model": "lora_high", "low_noise_model": "lora_low"}.get(name)
        if flag is None:
            one.refuse("name", "must be high_noise_model or low_noise_model")
        if not path:
            at.refuse("lora_configs", f"number {number} has no path")
        chosen.setdefault(flag, []).append((path, 1.0 if strength is None else strength))
        at.notes += one.notes
    return chosen


def _cache(at: Given, spec: EasyDict) -> Options:
    """What LightX2V's rules are here. Of its eight, six are refused by LightX2V itself (August 2026)."""
    name = at("feature_caching")
    if name in (None, "", "NoCaching"):
        return {}
    makers = {"Tea": _tea, "Custom": _tea, "Mag": _mag, "FirstBlock": _first_block, "DualBlock": _first_block}
    makers |= {"DynamicBlock": _first_block, "TaylorSeer": _taylor, "Ada": _ada}
    if name not in makers:
        at.refuse("feature_caching", f"must be one of: NoCaching, {', '.join(makers)}")
    options = makers[name](at)
    steps = len(at("denoising_step_list") or _STEP_LIST) if is_distilled(at) else at("infer_steps")
    if steps is not None and steps < MIN_STEPS:
        at.note("feature_caching", f"harms a run of {steps} steps, each of which changes much")
        options["cache_force"] = True
    return options


def _tea(at: Given) -> Options:
    """TeaCache by its published code: five steps are computed first, or the first and the last; no skips are too many.
    Custom adds to it that residuals are extrapolated."""
    keeps, listed, most = bool(at("use_ret_steps")), at("coefficients"), at("infer_steps") or 1000
    if listed and isinstance(listed[0], (list, tuple)):  # [for the projection, for the embedding]
        if len(listed) != 2:
            at.refuse("coefficients", "must be one list of numbers, or two")
        listed = listed[not keeps]
        if not listed:
            at.refuse("coefficients", f"has none for use_ret_steps {str(keeps).lower()}")
    options = {"teacache": True, "teacache_policy": "polynomial_projection" if keeps else "polynomial"}
    options |= {"teacache_thresh": at("teacache_thresh"), "teacache_polynomial": listed or None}
    options |= {"teacache_last_steps": 0 if keeps else 1, "cache_max_skips": most}
    return options | ({"cache_predictor": "first"} if at("feature_caching") == "Custom" else {})


def _mag(at: Given) -> Options:
    """MagCache; of the two lists of ratios the one with the prompt, for without it follows."""
    ratios = at("magcache_ratios") or None
    if ratios and isinstance(ratios[0], (list, tuple)):
        ratios = ratios[0]
        if not ratios:
            at.refuse("magcache_ratios", "has none with the prompt, which come first")
    options = {"mag_thresh": at("magcache_thresh"), "mag_K": at("magcache_K"), "mag_ratios": ratios}
    return {"magcache": True, **options, "mag_retention": at("magcache_retention_ratio")}


def _first_block(at: Given) -> Options:
    if (name := at("feature_caching")) != "FirstBlock":
        at.note("feature_caching", f"is FirstBlock here: {name} measures other blocks for the same decision")
    options = {"fb_thresh": at("residual_diff_threshold"), "fb_downsample": at("downsample_factor")}
    return {"fbcache": True, "fb_metric": "residual_rel_l1", **options}


def _taylor(at: Given) -> Options:
    """One step of four is computed, the others are extrapolated."""
    at.note("feature_caching", "extrapolates what all blocks add together, and not each part of them")
    limits = {"cache_max_skips": 3, "teacache_warmup": 1, "teacache_last_steps": 0}
    return {"teacache": True, "teacache_thresh": 1e30, "cache_predictor": "first", **limits}


def _ada(at: Given) -> Options:
    at.note("feature_caching", "is EasyCache here, which measures too how fast results change, of the whole network")
    return {"easycache": True}


def _parallel(at: Given, spec: EasyDict) -> Options:
    said = at("parallel")
    if not said:
        return {}
    one = at.inner("parallel", said, PARALLEL)
    sizes = {name: one(name) for name in ("cfg_p_size", "seq_p_size", "tensor_p_size")}
    for name, size in sizes.items():
        if size is not None and size < 1:
            one.refuse(name, "must be at least 1")
    sizes = {name: size or 1 for name, size in sizes.items()}
    if sizes["cfg_p_size"] not in (1, 2):
        one.refuse("cfg_p_size", "guidance has two branches: it must be 1 or 2")
    options: Options = {"cfg_parallel": True} if sizes["cfg_p_size"] == 2 else {}
    ring, ulysses = 1, sizes["tensor_p_size"]
    if sizes["seq_p_size"] > 1:
        way = one("seq_p_attn_type") or "ulysses"
        if way not in ("ulysses", "ulysses-4090", "ring", "kv_all_gather"):
            one.refuse("seq_p_attn_type", "must be ulysses or ring")
        if way == "kv_all_gather":
            one.note("seq_p_attn_type", "is ring here: keys and values go round, and are not gathered")
        ring, ulysses = (1, ulysses * sizes["seq_p_size"]) if "ulysses" in way else (sizes["seq_p_size"], ulysses)
    if sizes["tensor_p_size"] > 1:
        options["dit_fsdp"] = True
        one.note("tensor_p_size", "shares out weights and tokens here, and no products: --dit_fsdp")
    at.notes += one.unused()
    return options | {"ring_size": ring, "ulysses_size": ulysses}


def _attention(at: Given, spec: EasyDict) -> Options:
    """One back end computes all attention here; LightX2V's default, which nobody gave, is left to us."""
    names = {name: at(name) for name in ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type")}
    names["adapter_attn_type"] = at("adapter_attn_type")
    said = [(name, value) for name, value in names.items() if value is not None and not at.is_default(name)]
    if not said:
        return {}
    (first, value), told = said[0], {said[0][1]}
    if (ours := lightx2v_attention(value)) is None:
        at.refuse(first, "there is no such attention")
    for name, other in said[1:]:
        if other not in told:
            at.note(name, f"has no effect: one back end computes all attention, that of {first}, {value}")
        told.add(other)
    return {"attention": ours}


PARTS: tuple[Callable[[Given, EasyDict], Options], ...] = (
    *(_encoders, _vae, _sampling, _shape, _inputs, _offload, _loras, _cache, _parallel, _attention),
)
