"""The names of options, and of what some of them allow. cli.py has a flag for each option."""

from __future__ import annotations

from cache.options import OPTIONS as CACHE_OPTIONS

DEFAULT_TASK = "t2v-tiny"
SOLVER_NAMES = ("unipc", "dpm++", "euler")
DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32")
VAE_DTYPE_NAMES = ("fp32", "bf16")
FILE_FLAGS = ("dit", "high", "low", "vae", "t5", "tokenizer", "clip")
GGUF_FLAGS = {"gguf": "dit", "gguf_high": "high", "gguf_low": "low", "t5_gguf": "t5"}  # -> the component they replace
LORA_FLAGS = {"lora": None, "lora_high": "high", "lora_low": "low"}  # -> the expert that they are for, None: each
ATTENTION_NAMES = ("sdpa", "flash_attn2", "flash_attn3", "sage_attn2")  # all but the first compute in 16 bits alone
GGUF_MODES = ("auto", "resident", "stream")
CACHE_FILES = ("cache_coefficients", "cache_trace")
PATH_OPTIONS = ("ckpt_dir", *FILE_FLAGS, *GGUF_FLAGS, *CACHE_FILES, "image", "first_frame", "last_frame", "save_file")
LoraChoice = tuple[tuple[str, float], ...]  # (absolute path, strength) each
MAX_PROMPT_CHARS = 10_000  # the prompt travels in the mp4; models read 512 tokens at most
MAX_SEED = 2**63 - 1
AREA_BELOW_720P = 832 * 624  # px

OFFLOAD_NAMES = ("auto", "none", "model", "block", "phase")
# Where weights lie, and how several processes share the work: the video is the same, and does not store them.
OFFLOAD_OPTIONS = ("offload", "offload_model", "resident_blocks", "vae_offload", "vram_gb", "ram_gb")
RANK_OPTIONS = ("ulysses_size", "ring_size", "cfg_parallel", "dit_fsdp", "t5_fsdp", "dist_timeout")
MAX_RANKS = 4096
# Options a Request is built from. cli.py has a flag for each; replay and Python callers give the same names.
OPTIONS = (
    *("task", "size", "frame_num", "fps", "ckpt_dir", *FILE_FLAGS, *GGUF_FLAGS, "gguf_mode", *LORA_FLAGS),
    *("prompt", "negative_prompt", "seed"),
    *("image", "first_frame", "last_frame", "sample_solver", "sample_steps", "sample_shift", "sample_guide_scale"),
    *("preset", "boundary_step_index", "trim_first_frames"),
    *("denoising_step_list", "save_file", "t5_cpu", "convert_model_dtype", "device", "dtype"),
    *("attention", "vae_dtype", "vae_tile_px"),
    *OFFLOAD_OPTIONS,
    *CACHE_OPTIONS,
    *RANK_OPTIONS,
)

# Fields of Request that are not called like their option.
FIELD_OF = {
    "sample_solver": "solver",
    "sample_steps": "steps",
    "sample_shift": "shift",
    "image": "image_option",
    "last_frame": "last_image",
    "ckpt_dir": "ckpt_option",
}
