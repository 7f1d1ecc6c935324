"""LightX2V's keys: each acts, or is told or refused by its name, whatever its value; what they mean in our options."""

import json
import os
from pathlib import Path

import pytest

from wan.compat.lightx2v.keys import KEYS
from wan.compat.lightx2v.models import CLASSES
from wan.compat.lightx2v.translate import translate
from wan.errors import SwanError, UsageError
from wan.options import FLAGS
from wan.tasks import load_task

FILE = "config.json"
FACTS = Path(os.environ.get("SWAN_SHARED", "/nowhere"), "facts/lightx2v_config_keys.json")
# A few of them, where the facts are not at hand: key -> values.
FEW = {
    "enable_cfg": [True, False],
    "infer_steps": [40, 4],
    "self_attn_1_type": ["sage_attn2", "general_sparse_attn"],
    "text_len": [512],
    "parallel": [{"seq_p_size": 4, "seq_p_attn_type": "ulysses", "cfg_p_size": 2}, {"cfg_p_size": 2}],
    "dit_quant_scheme": ["fp8-sgl", "nvfp4"],
    "feature_caching": ["NoCaching", "Tea", "Mag", "Custom", "Ada", "DualBlock"],
    "coefficients": [[[1.0, 2.0], [3.0]]],
    "infinitetalk_mode": ["single"],
    "use_31_block": [True, False],
    "num_train_timesteps": [1000],
    "vae_dtype": ["torch.float32", "torch.bfloat16"],
    "dim": [5120],
}
# What a key is of, where that is not video from text with one expert: task, and the keys beside it.
TEA, MAG = {"feature_caching": "Tea"}, {"feature_caching": "Mag"}
PACKED = {"dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}
T5 = {"t5_quantized": True, "t5_quant_scheme": "fp8", "t5_quantized_ckpt": "a.pth"}
CLIP = {"clip_quantized": True, "clip_quant_scheme": "fp8", "clip_quantized_ckpt": "a.pth"}
OF = {
    **dict.fromkeys(("coefficients", "teacache_thresh", "use_ret_steps"), ("t2v-14B", TEA)),
    **dict.fromkeys(("magcache_K", "magcache_thresh", "magcache_retention_ratio", "magcache_ratios"), ("t2v-14B", MAG)),
    **dict.fromkeys(("residual_diff_threshold", "downsample_factor"), ("t2v-14B", {"feature_caching": "FirstBlock"})),
    **dict.fromkeys(("high_noise_original_ckpt", "low_noise_original_ckpt", "boundary"), ("i2v-A14B", {})),
    **dict.fromkeys(("high_noise_quantized_ckpt", "low_noise_quantized_ckpt"), ("i2v-A14B", PACKED)),
    "dit_quantized": ("t2v-14B", {"dit_quant_scheme": "fp8-sgl", "dit_quantized_ckpt": "a.safetensors"}),
    "dit_quantized_ckpt": ("t2v-14B", PACKED),
    "dit_quant_scheme": ("t2v-14B", {"dit_quantized": True}),
    "t5_quantized": ("t2v-14B", {**T5, "t5_quantized": None}),
    "t5_quant_scheme": ("t2v-14B", {**T5, "t5_quant_scheme": None}),
    "t5_quantized_ckpt": ("t2v-14B", {**T5, "t5_quantized_ckpt": None}),
    "clip_quantized": ("i2v-14B", {**CLIP, "clip_quantized": None}),
    "clip_quant_scheme": ("i2v-14B", {**CLIP, "clip_quant_scheme": None}),
    "clip_quantized_ckpt": ("i2v-14B", {**CLIP, "clip_quantized_ckpt": None}),
    "boundary_step_index": ("i2v-A14B", {"denoising_step_list": [1000, 500, 250, 100], "infer_steps": 4}),
    "denoising_step_list": ("t2v-14B", {"infer_steps": None}),
    "offload_granularity": ("t2v-14B", {"cpu_offload": True}),
    "offload_ratio": ("t2v-14B", {"cpu_offload": True}),
    "tae_path": ("t2v-14B", {"use_tae": True}),
    "use_tae": ("t2v-14B", {"tae_path": "a.pth"}),
    "clip_cpu_offload": ("i2v-14B", {}),
    "clip_original_ckpt": ("i2v-14B", {}),
    "use_image_encoder": ("i2v-14B", {}),
    **dict.fromkeys(("infer_frames", "num_repeat", "max_area", "target_fps", "motion_frames"), ("s2v-14B", {})),
    **dict.fromkeys(("replace_flag", "refert_num"), ("animate-14B", {})),
    "target_height": ("t2v-14B", {"target_width": 640}),
    "target_width": ("t2v-14B", {"target_height": 640}),
    "sample_guide_scale": ("i2v-A14B", {"enable_cfg": True}),
    "enable_cfg": ("t2v-14B", {"sample_guide_scale": 4.0}),
}
BASE = {"infer_steps": 30}
# What LightX2V does where nothing is said.
DEFAULTS = {"feature_caching": "NoCaching", "offload_granularity": "block", "boundary_step_index": 2}


def values():
    """(key, value) of all that LightX2V's configurations hold, in so far as the facts tell."""
    told = FEW
    if FACTS.is_file():
        told = {key: list(map(parsed, one["values"])) for key, one in json.loads(FACTS.read_text())["keys"].items()}
    return [(key, value) for key, of in told.items() for value in of]


def parsed(text):
    """A value as the facts have it: JSON, perhaps cut short."""
    try:
        return json.loads(text)
    except ValueError:
        return {"[": [{"path": "a"}] if "path" in text else [[1.0], [2.0]], "{": {"any": 1}}.get(text[0], "a.file")


def outcome(config, spec):
    """(options, schemes, notes, error) of a configuration."""
    try:
        one = translate(config, FILE, spec=None if {"model_cls", "task"} & config.keys() else load_task(spec))
    except UsageError as error:
        return None, None, (), str(error)
    return one.options, one.schemes, one.notes, ""


def test_no_key_is_ignored():
    """Whatever its value, a key changes our options, or is named by a line, or agrees with what is there anyway."""
    for key, value in values():
        spec, beside = OF.get(key, ("t2v-14B", {}))
        config = {name: one for name, one in {**BASE, **beside}.items() if name != key}
        without, with_it = outcome(config, spec), outcome({**config, key: value}, spec)
        named = [line for line in (*with_it[2], with_it[3]) if line.startswith(f"{FILE}: ") and key in line]
        asks_nothing = value in (None, False, "") or value in KEYS[key].fine or DEFAULTS.get(key) == value
        assert with_it[:2] != without[:2] or named or asks_nothing or agrees(key, value, spec), (key, value, with_it)
        assert not any("\n" in line for line in named)


def agrees(key, value, spec):
    """Whether it says what the model has."""
    has = load_task(spec)
    for part in filter(None, KEYS[key].spec.split(".")):
        has = has.get(part) if has else None
    return KEYS[key].verdict == "told" and (has == value or (value is True and has is not None))


def test_every_key_that_acts_acts():
    """With some value, in the configuration that it is of: our options are others."""
    some = {"flag": True, "whole": 3, "number": 0.5, "numbers": 2.0, "text": "a.file", "picture": "a.png"}
    some |= {"list": [1.0], "table": {"cfg_p_size": 2}}
    own = {
        "offload_granularity": "phase",
        "feature_caching": "Tea",
        "vae_dtype": "torch.bfloat16",
        "lora_configs": [{"path": "a", "strength": 1.0}],
        "target_shape": [480, 640],
        "max_area": 720896,
        "use_lightvae": None,  # needs a file that is there
        "self_attn_1_type": "sage_attn2",
        **dict.fromkeys(("cross_attn_1_type", "cross_attn_2_type", "adapter_attn_type"), "flash_attn3"),
        "support_tasks": None,  # of the pipeline
        "return_result_tensor": None,
        "model_cls": None,  # see below
        "task": None,
    }
    kinds = {"image_path": "i2v-14B", "last_frame_path": "flf2v-14B", "src_video": "vace-14B", "src_mask": "vace-14B"}
    kinds |= {"src_ref_images": "vace-14B", "audio_path": "s2v-14B"}
    kinds |= dict.fromkeys(("src_pose_path", "src_face_path", "src_bg_path", "src_mask_path"), "animate-14B")
    replaced = dict.fromkeys(("src_bg_path", "src_mask_path"), {"replace_flag": True})
    for key, one in KEYS.items():
        value = own.get(key, some.get(one.kind))
        if one.verdict != "acts" or value is None:
            continue
        spec, beside = OF.get(key, (kinds.get(key, "t2v-14B"), replaced.get(key, {})))
        config = {name: given for name, given in {**BASE, **beside}.items() if name != key}
        without, with_it = outcome(config, spec), outcome({**config, key: value}, spec)
        assert not with_it[3] and with_it[:2] != without[:2], (key, with_it)
        assert not [line for line in with_it[2] if "no effect" in line], (key, with_it)


def test_flags_that_the_table_names_exist():
    named = {flag for key in KEYS.values() if key.verdict == "acts" for flag in key.flags}
    assert named <= FLAGS.keys()


def test_the_page_names_every_key_that_acts():
    page = (Path(__file__).parents[2] / "docs/lightx2v.md").read_text()
    assert [key for key, one in KEYS.items() if one.verdict == "acts" and f"`{key}`" not in page] == []
    assert [name for name in CLASSES if f"`{name}`" not in page] == []


WRONG = [
    ({"infer_stepz": 4}, "unknown key 'infer_stepz'; is it infer_steps?"),
    ({"": 4}, "unknown key ''"),
    ({"infer_steps": "40"}, "infer_steps must be a whole number, not '40'"),
    ({"infer_steps": 2.5}, "infer_steps must be a whole number, not 2.5"),
    ({"infer_steps": True}, "infer_steps must be a whole number, not True"),
    ({"enable_cfg": "yes"}, "enable_cfg must be true or false, not 'yes'"),
    ({"sample_shift": float("nan")}, "sample_shift must be a number, not nan"),
    ({"parallel": 3}, "parallel must be a table of keys, not 3"),
    ({"parallel": {"cfg_p_size": 3}}, "parallel: cfg_p_size 3: guidance has two branches: it must be 1 or 2"),
    ({"parallel": {"cfg_size": 2}}, "parallel: unknown key 'cfg_size'; is it cfg_p_size?"),
    ({"parallel": {"seq_p_size": 2, "seq_p_attn_type": "star"}}, "parallel: seq_p_attn_type 'star': must be ulysses"),
    ({"lora_configs": [{"strength": 1.0}]}, "number 1 has no path"),
    ({"lora_configs": ["a"]}, "must be a list of {path, strength}"),
    (
        {"lora_configs": [{"path": "a"}, {"path": "b", "name": "x"}]},
        "lora_configs 2: name 'x': must be high_noise_model",
    ),
    (
        {"denoising_step_list": [1000, 500], "infer_steps": 4, "model_cls": "wan2.1_distill", "task": "t2v"},
        "contradicts",
    ),
    (
        {"cpu_offload": True, "offload_granularity": "layer"},
        "offload_granularity 'layer': must be block, phase or model",
    ),
    ({"cpu_offload": True, "offload_ratio": 3}, "offload_ratio 3: must be from 0 to 1"),
    ({"feature_caching": "Coffee"}, "feature_caching 'Coffee': must be one of: NoCaching, Tea, "),
    (
        {**TEA, "coefficients": [[], [1.0]], "use_ret_steps": True},
        "coefficients [[], [1.0]]: has none for use_ret_steps",
    ),
    ({**TEA, "coefficients": [[1], [1], [1]]}, "coefficients [[1], [1], [1]]: must be one list of numbers, or two"),
    ({"target_width": 832}, "target_width 832: needs target_height beside it"),
    ({"target_shape": [832]}, "target_shape [832]: must be [height, width]"),
    ({"sample_guide_scale": [1, 2, 3], "enable_cfg": True}, "sample_guide_scale [1, 2, 3]: must be one number"),
    ({"sample_guide_scale": [3, 4], "enable_cfg": True}, "sample_guide_scale [3, 4]: must be one number"),
    ({"vae_dtype": "torch.float16"}, "vae_dtype 'torch.float16': must be one of: torch.float32, torch.bfloat16"),
    ({"dit_quantized": True}, "dit_quantized True: dit_quant_scheme must say how"),
    ({"t5_quantized": True}, "t5_quantized True: t5_quant_scheme must say how"),
    ({"t5_quantized": True, "t5_quant_scheme": "int8", "model_path": "x"}, "x holds no models_t5_umt5-xxl-enc-int8."),
    ({"use_tae": True, "model_path": "x"}, "use_tae True: x holds no lighttaew2_1.safetensors or"),
    ({"infinitetalk_mode": "single"}, "infinitetalk_mode 'single': is of InfiniteTalk, which is not here"),
    ({"magcache_calibration": True}, "magcache_calibration True: ratios are measured by python -m wan.calibrate"),
    ({"num_train_timesteps": 500}, "num_train_timesteps 500: all models here were trained with 1000"),
    ({"use_31_block": False}, "use_31_block False: "),
    ({"self_attn_1_type": "coffee"}, "self_attn_1_type 'coffee': there is no such attention"),
    ({"task": "t2v"}, "task 't2v': it is told by model_cls, which is not given"),
    ({"model_cls": "wan2.1", "task": "vace"}, "task 'vace' is none of model_cls wan2.1, which has: t2v, i2v, flf2v"),
    ({"model_cls": "hunyuan_video_1.5"}, "HunyuanVideo-1.5 is another family of models"),
    ({"model_cls": "seko_talk"}, f"model_cls 'seko_talk' is not here; there are: {', '.join(CLASSES)}"),
    ({"model_cls": "wan2.1_mean_flow_distill"}, "time_embedding_r"),
    ({"model_cls": "wan2.1"}, "task is needed: model_cls wan2.1 has t2v, i2v, flf2v"),
    ({"enable_cfg": True, "sample_guide_scale": []}, "sample_guide_scale []: must be one number"),
    ({"target_shape": ["a", 64]}, "target_shape ['a', 64]: must be [height, width], two whole numbers"),
    ({"parallel": {"seq_p_size": -2}}, "parallel: seq_p_size -2: must be at least 1"),
    ({**MAG, "magcache_ratios": [[], [1.0, 0.9]]}, "magcache_ratios [[], [1.0, 0.9]]: has none with the prompt"),
]


@pytest.mark.parametrize("config, line", WRONG)
def test_wrong_keys_are_one_line_with_the_file(config, line):
    spec = None if {"model_cls", "task"} & config.keys() and "infer_steps" not in config else load_task("t2v-14B")
    with pytest.raises(SwanError) as caught:
        translate(config, FILE, spec=spec)
    assert str(caught.value).startswith(f"{FILE}: ") and line in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


TWO = {"model_cls": "wan2.2_moe", "task": "i2v"}
DISTILLED = {"model_cls": "wan2.2_moe_distill", "task": "i2v"}
MEANS = [
    ({"enable_cfg": False, "sample_guide_scale": 5}, {"sample_guide_scale": 1}),
    ({"enable_cfg": True, "sample_guide_scale": 5}, {"sample_guide_scale": 5}),
    ({"sample_guide_scale": 5}, {"sample_guide_scale": 1}),  # LightX2V's default is no guidance
    ({**TWO, "enable_cfg": True, "sample_guide_scale": [4.0, 3.0]}, {"sample_guide_scale": [3.0, 4.0]}),  # low, high
    ({**TWO, "boundary": 0.9}, {"boundary": 0.9, "task": "i2v-A14B"}),
    (
        {
            **DISTILLED,
            "infer_steps": 4,
            "boundary": 0.9,
            "high_noise_original_ckpt": "h",
            "low_noise_original_ckpt": "l",
        },
        {"denoising_step_list": [1000, 750, 500, 250], "sample_solver": "euler", "boundary_step_index": 2}
        | {"high": "h", "low": "l", "sample_steps": None, "boundary": None},
    ),
    (
        {**TWO, "dit_quantized": True, "dit_quant_scheme": "int8-vllm", "high_noise_quantized_ckpt": "q"}
        | {"high_noise_original_ckpt": "h", "low_noise_original_ckpt": "l"},
        {"high": "q", "low": "l"},
    ),
    ({"dit_quantized": False, "dit_quantized_ckpt": "q", "dit_original_ckpt": "o"}, {"dit": "o"}),
    ({"target_height": 480, "target_width": 832, "target_video_length": 33}, {"size": "832*480", "frame_num": 33}),
    ({"target_height": 480, "target_width": 832, "target_shape": [64, 96]}, {"size": "96*64"}),
    ({"target_height": 64.0, "target_width": 96}, {"size": "96*64"}),
    ({"cpu_offload": False}, {"offload": "none", "resident_blocks": None}),
    ({"cpu_offload": True, "offload_ratio": 0.8}, {"offload": "block", "resident_blocks": 8}),
    (
        {"cpu_offload": True, "offload_granularity": "model", "t5_cpu_offload": True},
        {"offload": "model", "t5_offload": True},
    ),
    ({"lazy_load": True}, {"residency": "stage"}),
    ({"self_attn_1_type": "sage_attn3", "cross_attn_1_type": "flash_attn3"}, {"attention": "sage_attn3,auto"}),
    ({"cross_attn_1_type": "torch_sdpa"}, {"attention": "sdpa"}),
    ({"unload_modules": False}, {"residency": "keep"}),
    (
        {**TEA, "coefficients": [[1.0, 2.0], [3.0]], "use_ret_steps": True, "teacache_thresh": 0.2},
        {"teacache": True, "teacache_policy": "polynomial_projection", "teacache_polynomial": [1.0, 2.0]}
        | {"teacache_thresh": 0.2, "teacache_last_steps": 0, "cache_max_skips": 30},
    ),
    ({**TEA, "coefficients": [1.0, 2.0]}, {"teacache_policy": "polynomial", "teacache_polynomial": [1.0, 2.0]}),
    ({"feature_caching": "Custom", "coefficients": [[], [3.0]]}, {"teacache": True, "cache_predictor": "first"}),
    ({**MAG, "magcache_ratios": [[1.0, 0.9], [1.0, 0.8]], "magcache_K": 3}, {"mag_ratios": [1.0, 0.9], "mag_K": 3}),
    ({"feature_caching": "TaylorSeer"}, {"teacache": True, "cache_predictor": "first", "cache_max_skips": 3}),
    ({"feature_caching": "Ada"}, {"easycache": True}),
    ({"feature_caching": "DynamicBlock", "residual_diff_threshold": 0.003}, {"fbcache": True, "fb_thresh": 0.003}),
    ({**TEA, "coefficients": [1.0], "infer_steps": 4}, {"cache_force": True}),
    ({"parallel": {"cfg_p_size": 2}}, {"cfg_parallel": True, "ring_size": 1, "ulysses_size": 1}),
    ({"parallel": {"seq_p_size": 4, "seq_p_attn_type": "ring"}}, {"ring_size": 4, "ulysses_size": 1}),
    ({"parallel": {"tensor_p_size": 2, "seq_p_size": 2}}, {"dit_fsdp": True, "ulysses_size": 4}),
    (
        {"lora_configs": [{"name": "high_noise_model", "path": "h", "strength": 0.5}, {"path": "b"}]},
        {"lora_high": [("h", 0.5)], "lora": [("b", 1.0)]},
    ),
    ({"use_tiling_vae": True, "vae_dtype": "torch.bfloat16"}, {"vae_tile_px": 256, "vae_dtype": "bf16"}),
    ({"model_cls": "wan2.2", "task": "t2v", "image_path": "a.png"}, {"image": None, "task": "ti2v-5B"}),
    ({"model_cls": "wan2.2", "task": "i2v", "image_path": "a.png"}, {"image": "a.png"}),
    ({**TWO, "task": "flf2v", "image_path": "a", "last_frame_path": "b"}, {"last_frame": "b", "task": "i2v-A14B"}),
    (
        {"model_cls": "wan2.2_s2v", "audio_path": "a.wav", "num_repeat": 2, "max_area": 720896, "target_fps": 16},
        {"audio": "a.wav", "num_clip": 2, "size": "1024*704", "fps": 16, "task": "s2v-14B"},
    ),
]


@pytest.mark.parametrize("config, options", MEANS)
def test_what_keys_mean(config, options):
    spec = load_task("i2v-A14B" if "model_cls" not in config and "lora_configs" in config else "t2v-14B")
    if "model_cls" in config:
        spec = load_task("i2v-A14B") if "moe" in config["model_cls"] else None
        spec = load_task("s2v-14B") if "s2v" in config["model_cls"] else spec
    made = translate({**BASE, **config} if "infer_steps" not in config else config, FILE, spec=spec).options
    assert {name: made.get(name) for name in options} == options


def test_options_beside_it_go_first():
    made = translate({"infer_steps": 30, "sample_shift": 3.0}, FILE, {"sample_steps": 7, "prompt": None})
    assert made.options == {"sample_steps": 7, "sample_shift": 3.0, "task": "t2v-tiny"}
    assert (
        made.names == {"sample_shift": "sample_shift", "task": "model_cls and task"} or "sample_steps" not in made.names
    )


def test_files_of_the_folder(tmp_path):
    """Where no path is given, LightX2V's names in the folders where it looks, its quantised ones first."""
    (tmp_path / "int8").mkdir()
    for name in ("models_t5_umt5-xxl-enc-fp8.pth", "int8/models_t5_umt5-xxl-enc-int8.pth", "lighttaew2_1.safetensors"):
        (tmp_path / name).touch()
    for name in ("distill_fp8", "distill_int8", "fp8", "experts/int8/high_noise_model", "experts/int8/low_noise_model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "gguf").mkdir()
    for name in ("a-Q4_K_S.gguf", "a-Q8_0.gguf"):
        (tmp_path / "gguf" / name).touch()
    for folder, scheme, files in (
        ("", "fp8-sgl", {"dit": "distill_fp8"}),
        ("", "nvfp4", {}),
        ("gguf", "gguf-Q8_0", {"dit": "gguf/a-Q8_0.gguf"}),
        ("experts", "int8-vllm", {one: f"experts/int8/{one}_noise_model" for one in ("high", "low")}),
    ):
        config = {"model_path": str(tmp_path / folder), "dit_quantized": True, "dit_quant_scheme": scheme}
        made = translate(config, FILE, spec=load_task("t2v-14B")).options
        paths = {flag: str(tmp_path / name) for flag, name in files.items()}
        assert {flag: made[flag] for flag in ("dit", "high", "low") if flag in made} == paths
    config = {"model_path": str(tmp_path), "t5_quantized": True, "use_tae": True}
    for scheme, name in {
        "int8-vllm": "int8/models_t5_umt5-xxl-enc-int8.pth",
        "fp8": "models_t5_umt5-xxl-enc-fp8.pth",
    }.items():
        made = translate({**config, "t5_quant_scheme": scheme}, FILE, spec=load_task("t2v-14B"))
        assert made.options["t5"] == str(tmp_path / name)
        assert made.options["tae"] == str(tmp_path / "lighttaew2_1.safetensors")
