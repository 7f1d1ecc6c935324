"""What options allow, and which of them belong together."""

from __future__ import annotations

DEFAULT_TASK = "t2v-tiny"
SOLVER_NAMES = ("unipc", "dpm++", "euler", "dmd", "rcm", "rcm-ode")
RCM_NAMES = ("rcm", "rcm-ode")  # whose own steps are told by --sigma_max, and have no shift
MOST_RCM_STEPS = 4
DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32", "mixed")  # mixed: matrices in bf16, all that is computed in fp32
T5_DTYPE_NAMES = DTYPE_NAMES
VAE_DTYPE_NAMES = ("fp32", "bf16")
FILE_FLAGS = ("dit", "high", "low", "vae", "tae", "t5", "tokenizer", "clip", "wav2vec")
GGUF_FLAGS = {"gguf": "dit", "gguf_high": "high", "gguf_low": "low", "t5_gguf": "t5"}  # -> the component they replace
LORA_FLAGS = {"lora": None, "lora_high": "high", "lora_low": "low"}  # -> the expert that they are for, None: each
GGUF_MODES = ("auto", "resident", "stream")
MATMUL_NAMES = ("bf16", "fp8", "int8", "auto")
MAX_STRENGTH = 1000  # of a LoRA; usual ones are below 2, those of sliders below 20
LoraChoice = tuple[tuple[str, float], ...]  # (absolute path, strength) each
MAX_CHARS = {"text": 10_000, "name": 200, "path": 4_096}  # by kind; of a prompt models read 512 tokens at most
FILE_KINDS = ("picture", "pictures", "file")  # of options that name inputs
MAX_PICTURES = 100  # of one option
MAX_TEXTS = 1000
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
AREA_BELOW_720P = 832 * 624  # px

RESIDENCY_NAMES = ("auto", "stage", "keep")
OFFLOAD_NAMES = ("auto", "none", "model", "block", "phase")
AUDIO_SYNCS = ("exact", "official")
MAX_RANKS = 4096
# Stored names of files, which a video of somebody else may not choose. Pictures are known by their hashes.
VIDEO_FLAGS = ("video", "continue_from", "src_video", "src_mask", "inpaint", "extend", "pose_video", "audio")
VIDEO_FLAGS += ("src_pose", "src_face", "src_ref", "src_bg")
STORED_FILES = ("ckpt_dir", *FILE_FLAGS, *LORA_FLAGS, "cache_coefficients", *VIDEO_FLAGS, "src_ref_images")
STORED_PICTURES = ("image", "last_frame")
