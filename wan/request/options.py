"""The names of options, and of what some of them allow. cli.py has a flag for each option."""

from __future__ import annotations

from wan.cache.options import OPTIONS as CACHE_OPTIONS

DEFAULT_TASK = "t2v-tiny"
SOLVER_NAMES = ("unipc", "dpm++", "euler")
DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32")
T5_DTYPE_NAMES = DTYPE_NAMES
VAE_DTYPE_NAMES = ("fp32", "bf16")
FILE_FLAGS = ("dit", "high", "low", "vae", "t5", "tokenizer", "clip")
GGUF_FLAGS = {"gguf": "dit", "gguf_high": "high", "gguf_low": "low", "t5_gguf": "t5"}  # -> the component they replace
LORA_FLAGS = {"lora": None, "lora_high": "high", "lora_low": "low"}  # -> the expert that they are for, None: each
ATTENTION_NAMES = ("sdpa", "flash_attn2", "flash_attn3", "sage_attn2")  # all but the first compute in 16 bits alone
GGUF_MODES = ("auto", "resident", "stream")
CACHE_FILES = ("cache_coefficients", "cache_trace")
MAX_STRENGTH = 1000  # of a LoRA; usual ones are below 2, those of sliders below 20
_CACHE_KINDS = {"flag": "flag", "bool": "flag", "whole": "number", "number": "number", "name": "name", "file": "path"}
LoraChoice = tuple[tuple[str, float], ...]  # (absolute path, strength) each
MAX_CHARS = {"text": 10_000, "name": 200, "path": 4_096}  # by kind; of a prompt models read 512 tokens at most
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
AREA_BELOW_720P = 832 * 624  # px

OFFLOAD_NAMES = ("auto", "none", "model", "block", "phase")
# Where weights lie, and how several processes share the work: the video is the same, and does not store them.
OFFLOAD_OPTIONS = ("offload", "offload_model", "resident_blocks", "vae_offload", "vram_gb", "ram_gb")
RANK_OPTIONS = ("ulysses_size", "ring_size", "cfg_parallel", "dit_fsdp", "t5_fsdp", "dist_timeout")
MAX_RANKS = 4096
# Options a Request is built from, with the kinds of their values (see `values.of_kind`). cli.py has a flag for each;
# replay and Python callers give the same names.
KINDS = {
    **dict.fromkeys(("task", "size"), "name"),
    **dict.fromkeys(("frame_num", "fps"), "number"),
    **dict.fromkeys(("ckpt_dir", *FILE_FLAGS, *GGUF_FLAGS), "path"),
    "gguf_mode": "name",
    **dict.fromkeys(LORA_FLAGS, "loras"),
    **dict.fromkeys(("prompt", "negative_prompt"), "text"),
    "seed": "number",
    **dict.fromkeys(("image", "first_frame", "last_frame"), "path"),
    "sample_solver": "name",
    **dict.fromkeys(("sample_steps", "sample_shift"), "number"),
    "sample_guide_scale": "numbers",
    "preset": "name",
    **dict.fromkeys(("boundary_step_index", "trim_first_frames"), "number"),
    "denoising_step_list": "numbers",
    "save_file": "path",
    **dict.fromkeys(("t5_cpu", "convert_model_dtype"), "flag"),
    **dict.fromkeys(("device", "dtype", "attention", "t5_dtype", "vae_dtype"), "name"),
    "vae_tile_px": "number",
    "offload": "name",
    "offload_model": "flag",
    "resident_blocks": "number",
    "vae_offload": "flag",
    **dict.fromkeys(("vram_gb", "ram_gb"), "number"),
    **{name: _CACHE_KINDS[option.kind] for name, option in CACHE_OPTIONS.items()},
    **dict.fromkeys(("ulysses_size", "ring_size"), "number"),
    **dict.fromkeys(("cfg_parallel", "dit_fsdp", "t5_fsdp"), "flag"),
    "dist_timeout": "number",
}
OPTIONS = tuple(KINDS)
# What a video stores, and all that is taken from one: not where to write, and no second name for another option.
STORED = tuple(
    name
    for name in OPTIONS
    if name not in {"save_file", "cache_trace", "first_frame", "preset", "convert_model_dtype"}
    and name not in {*OFFLOAD_OPTIONS, *RANK_OPTIONS, *GGUF_FLAGS}
)
# Stored names of files, which a video of somebody else may not choose. Pictures are known by their hashes.
STORED_FILES = ("ckpt_dir", *FILE_FLAGS, *LORA_FLAGS, "cache_coefficients")
STORED_PICTURES = ("image", "last_frame")

# Fields of Request that are not called like their option.
FIELD_OF = {
    "sample_solver": "solver",
    "sample_steps": "steps",
    "sample_shift": "shift",
    "image": "image_option",
    "last_frame": "last_image",
    "ckpt_dir": "ckpt_option",
}
