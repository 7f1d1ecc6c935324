"""Every key that a configuration of LightX2V can hold, and what becomes of it here. No torch.

verdict: acts (why names the flags it sets), idle (it has no effect, and why: told, but for the values in `fine`, which
ask for nothing), refused (but for those in `fine`), told (the model has it: told where that differs).
Source: lightx2v/pipeline.py, utils/set_config.py, utils/input_info.py, the runners of Wan and its 275 configurations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """kind: see `given.Given`. when: of one that acts, why it does nothing where nobody asks for it. spec: of one that
    is told, where the task has it."""

    kind: str
    verdict: str
    why: str
    fine: tuple[Any, ...] = ()
    when: str = "with this model and task"
    spec: str = ""

    @property
    def flags(self) -> list[str]:
        return re.findall(r"--(\w+)", self.why)


def _acts(kind: str, why: str, when: str = "with this model and task") -> Key:
    return Key(kind, "acts", why, when=when)


def _idle(kind: str, why: str, *fine: Any) -> Key:
    return Key(kind, "idle", why, (False, *fine))


def _refused(kind: str, why: str, *fine: Any) -> Key:
    return Key(kind, "refused", why, (False, *fine))


def _told(kind: str, spec: str) -> Key:
    return Key(kind, "told", "the model has its own", spec=spec)


def _of(models: str, *names: str) -> dict[str, Key]:
    return {name: _refused("any", f"is of {models}, which is not here") for name in names}


_KERNELS = "it chooses among LightX2V's kernels; here there is one, computed in fp32"
_SPARSE = "it is of attention that leaves out a part, and the back end that runs here takes its own settings"
_TIME = "without feature_caching Tea or Custom"
_MAG = "without feature_caching Mag"
_FIRST = "without feature_caching FirstBlock, DualBlock or DynamicBlock"
_QUANTISED = "without dit_quantized true"
_OFFLOAD = "without cpu_offload true"

KEYS: dict[str, Key] = {
    # Models and files
    "model_cls": _acts("text", "--task, with task"),
    "task": _acts("text", "--task, with model_cls"),
    "support_tasks": _acts("list", "tasks that generate(task=) may ask of the same model", "but in a pipeline"),
    "model_path": _acts("text", "--ckpt_dir"),
    "dit_original_ckpt": _acts("text", "--dit"),
    "high_noise_original_ckpt": _acts("text", "--high"),
    "low_noise_original_ckpt": _acts("text", "--low"),
    "dit_quantized_ckpt": _acts("text", "--dit", _QUANTISED),
    "high_noise_quantized_ckpt": _acts("text", "--high", _QUANTISED),
    "low_noise_quantized_ckpt": _acts("text", "--low", _QUANTISED),
    "t5_original_ckpt": _acts("text", "--t5", "beside t5_quantized true"),
    "t5_quantized_ckpt": _acts("text", "--t5", "without t5_quantized true"),
    "t5_tokenizer_path": _acts("text", "--tokenizer"),
    "clip_original_ckpt": _acts("text", "--clip", "for a model without an image encoder, or with clip_quantized true"),
    "clip_quantized_ckpt": _acts("text", "--clip", "without clip_quantized true, or an image encoder"),
    "vae_path": _acts("text", "--vae"),
    "use_lightvae": _acts("flag", "--vae, of the folder where vae_path names none"),
    "use_tae": _acts("flag", "--tae, of the folder where tae_path names none"),
    "tae_path": _acts("text", "--tae", "without use_tae true"),
    "dit_quantized": _acts("flag", "--dit, --high and --low, which must be quantised"),
    "t5_quantized": _acts("flag", "--t5, which must be quantised"),
    "clip_quantized": _acts("flag", "--clip, which must be quantised", "for a model without an image encoder"),
    "dit_quant_scheme": _acts("text", "what dit_quantized must be: the file tells how to read it", _QUANTISED),
    "t5_quant_scheme": _acts("text", "what t5_quantized must be", "without t5_quantized true"),
    "clip_quant_scheme": _acts("text", "what clip_quantized must be", "without clip_quantized true"),
    "lora_configs": _acts("list", "--lora, --lora_high and --lora_low"),
    "lora_dynamic_apply": _idle("flag", "LoRAs can be switched either way; quantised weights take them when used"),
    "transformer_model_name": _refused("text", "it chooses among the models of HunyuanVideo-1.5", ""),
    "sf_model_path": _refused("text", "it is of self-forcing models, which make frame after frame", ""),
    "need_scaled": _idle("flag", "the name of the tiny VAE's file tells"),
    "vae_type": _idle("text", "the file of the VAE tells", "wan"),
    "vae_name": _idle("text", "the file of the VAE is found, or named by vae_path"),
    "weight_auto_quant": _refused("flag", "weights are quantised beforehand, by python -m wan.convert"),
    # What is sampled
    "infer_steps": _acts("whole", "--sample_steps"),
    "denoising_step_list": _acts("list", "--denoising_step_list and --sample_solver", "but for distilled models"),
    "sample_shift": _acts("number", "--sample_shift"),
    "sample_guide_scale": _acts("numbers", "--sample_guide_scale"),
    "enable_cfg": _acts("flag", "--sample_guide_scale"),
    "boundary": _acts("number", "--boundary", "but for models of two experts that go by the noise level"),
    "boundary_step_index": _acts("whole", "--boundary_step_index", "but for distilled models of two experts"),
    "seed": _acts("whole", "--seed"),
    "num_train_timesteps": _refused("whole", "all models here were trained with 1000", 1000),
    "enable_dynamic_cfg": _refused("flag", "guidance is no input of the networks here"),
    "cfg_scale": _idle("number", "it is of enable_dynamic_cfg"),
    # The video
    "target_height": _acts("whole", "--size"),
    "target_width": _acts("whole", "--size"),
    "target_shape": _acts("list", "--size"),
    "max_area": _acts("whole", "--size"),
    "target_video_length": _acts("whole", "--frame_num"),
    "fps": _acts("whole", "--fps"),
    "target_fps": _acts("whole", "--fps", "but for wan2.2_s2v; fps is that of the others"),
    "aspect_ratio": _idle("text", "the size is that of height and width"),
    "resize_mode": _idle("text", "the aspect ratio is that of the picture, the area that of height and width"),
    "fixed_shape": _idle("list", "it is of resize_mode"),
    "bucket_shape": _idle("table", "it is of resize_mode"),
    "fixed_area": _idle("any", "it is of resize_mode"),
    "auto_target_shape": _idle("flag", "the size is that of the pose video", True),
    "video_duration": _idle("number", "clips are made until the audio ends, or num_repeat of them"),
    # What it is made from
    "prompt": _acts("text", "--prompt"),
    "negative_prompt": _acts("text", "--negative_prompt"),
    "sample_neg_prompt": _acts("text", "--negative_prompt", "beside negative_prompt"),
    "image_path": _acts("picture", "--image"),
    "last_frame_path": _acts("picture", "--last_frame"),
    "src_video": _acts("picture", "--src_video"),
    "src_mask": _acts("picture", "--src_mask"),
    "src_ref_images": _acts("picture", "--src_ref_images and --src_ref"),
    "src_pose_path": _acts("picture", "--src_pose and --pose_video"),
    "src_face_path": _acts("picture", "--src_face"),
    "src_bg_path": _acts("picture", "--src_bg"),
    "src_mask_path": _acts("picture", "--src_mask"),
    "replace_flag": _acts("flag", "--replace_flag"),
    "refert_num": _acts("whole", "--refert_num"),
    "audio_path": _acts("text", "--audio"),
    "infer_frames": _acts("whole", "--infer_frames"),
    "num_repeat": _acts("whole", "--num_clip"),
    "motion_frames": _told("whole", "dit.motion_frames"),
    "drop_first_motion": Key("flag", "refused", "clips always begin after the frames that they are given", (True,)),
    "save_result_path": _acts("text", "--save_file"),
    "return_result_tensor": _acts("flag", "a tensor is returned, and nothing is written", "but in a pipeline"),
    "video_path": _idle("picture", "it is of super-resolution, or its sound is for Animate, and not taken", ""),
    "sr_ratio": _idle("number", "it is of super-resolution", 2.0),
    "action_path": _idle("any", "it is of world models", ""),
    "image_strength": _idle("any", "it is of LTX-2"),
    "i2i_denoise_strength": _idle("any", "it is of models of pictures; see --strength for videos"),
    "image_frame_idx": _idle("any", "it is of LTX-2"),
    "prompt_ref": _idle("text", "it is of Animate 2", "人物动作的参考视频"),
    # Memory and devices
    "cpu_offload": _acts("flag", "--offload"),
    "offload_granularity": _acts("text", "--offload", _OFFLOAD),
    "offload_ratio": _acts("number", "--resident_blocks", "without cpu_offload true, by block or phase"),
    "t5_cpu_offload": _acts("flag", "--t5_offload"),
    "clip_cpu_offload": _acts("flag", "--clip_offload", "for a model without an image encoder"),
    "vae_cpu_offload": _acts("flag", "--vae_offload"),
    "unload_modules": _acts("flag", "--residency"),
    "lazy_load": _acts("flag", "--residency"),
    "t5_lazy_load": _idle("flag", "weights are read from the disk where memory is short, see --dry_run"),
    "use_tiling_vae": _acts("flag", "--vae_tile_px"),
    "vae_dtype": _acts("text", "--vae_dtype"),
    "convert_model_dtype": _acts("flag", "--convert_model_dtype"),
    "vae_offload_cache": _idle("flag", "what a causal layer keeps of earlier frames lies with the VAE"),
    "vae_weight_dtype": _idle("text", "the VAE's weights are of the type that it computes in"),
    "clean_cuda_cache": _idle("flag", "what is free is given back after each stage"),
    "rotary_chunk": _idle("flag", "positions are made in slices, always"),
    "use_stream_vae": _idle("flag", "the VAE always works frame by frame"),
    "use_compile": _idle("flag", "networks are not compiled"),
    "enable_reuse": _idle("flag", "models stay in memory between videos, and what a video was made from does not"),
    # Attention
    "self_attn_1_type": _acts("text", "--attention"),
    "cross_attn_1_type": _acts("text", "--attention"),
    "cross_attn_2_type": _acts("text", "--attention"),
    "adapter_attn_type": _acts("text", "--attention"),
    "clip_attn_type": _idle("text", "the image encoder has attention of its own", "torch_sdpa"),
    # Caches
    "feature_caching": _acts("text", "--teacache, --magcache, --fbcache or --easycache"),
    "coefficients": _acts("list", "--teacache_polynomial", _TIME),
    "teacache_thresh": _acts("number", "--teacache_thresh", _TIME),
    "use_ret_steps": _acts("flag", "--teacache_policy and --teacache_last_steps", _TIME),
    "magcache_K": _acts("whole", "--mag_K", _MAG),
    "magcache_thresh": _acts("number", "--mag_thresh", _MAG),
    "magcache_retention_ratio": _acts("number", "--mag_retention", _MAG),
    "magcache_ratios": _acts("list", "--mag_ratios", _MAG),
    "magcache_calibration": _refused("flag", "ratios are measured by python -m wan.calibrate"),
    "residual_diff_threshold": _acts("number", "--fb_thresh", _FIRST),
    "downsample_factor": _acts("whole", "--fb_downsample", _FIRST),
    # Several processes
    "parallel": _acts("table", "--cfg_parallel, --ulysses_size, --ring_size and --dit_fsdp"),
    "cfg_parallel": _idle("flag", "parallel says it"),
    "seq_parallel": _idle("flag", "parallel says it"),
    # What the model has
    **{
        name: _told("whole", f"dit.{name}")
        for name in (
            *("text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers"),
        )
    },
    "eps": _told("number", "dit.eps"),
    "patch_size": _told("list", "dit.patch_size"),
    "num_channels_latents": _told("whole", "vae.z_dim"),
    "vae_stride": _told("list", "vae_stride"),
    "use_image_encoder": _told("flag", "files.clip"),
    "use_31_block": Key("flag", "refused", "the last layer of the image encoder but one is what models know", (True,)),
    "window_size": _refused("list", "attention is to all tokens", [-1, -1]),
    "qk_norm": Key("flag", "refused", "all models have it", (True,)),
    "cross_attn_norm": Key("flag", "refused", "all models have it", (True,)),
    # Kernels
    "rope_type": _idle("text", _KERNELS, "torch_complex_rope"),
    **dict.fromkeys(
        ("modulate_type", "rms_norm_type", "layer_norm_type", "norm_modulate_backend"),
        _idle("text", _KERNELS, "torch"),
    ),
    "tp_rms_norm_type": _idle("text", _KERNELS),
    "mxfp8_fuse_enable": _idle("flag", _KERNELS),
    "mxint8_fuse_enable": _idle("flag", _KERNELS),
    **{
        name: _idle("any", _SPARSE)
        for name in (
            *("general_sparse_attn_setting", "dynamic_sparse_attn_setting", "draft_attn_sparsity_ratio"),
            *("nbhd_attn_setting", "rainfusion_attn_setting", "sol_attn_setting", "sparge_attn_setting"),
            *("spas_flash_attn4_setting", "spas_sage_attn2_setting", "spas_sage_attn3_setting"),
            *("sparge", "sparge_ckpt"),
        )
    },
    # Around the model
    "use_prompt_enhancer": _idle("flag", "prompts are taken as they are: see use_prompt_extend"),
    "sub_servers": _idle("table", "nothing is asked of other machines, so prompts are taken as they are"),
    "lightx2v_path": _idle("text", "it is where LightX2V lies", ""),
    "comment": _idle("any", "it is a comment"),
    "video_frame_interpolation": _refused("table", "frames between frames are not made here"),
    "video_super_resolution": _refused("table", "videos are not enlarged here"),
    "prompt_travel": _refused("table", "a video has one prompt; a film of clips has --prompts"),
    "changing_resolution": _refused("flag", "all steps are of one resolution"),
    "resolution_rate": _idle("list", "it is of changing_resolution"),
    "changing_resolution_steps": _idle("list", "it is of changing_resolution"),
    "dummy_model": _refused("flag", "weights are those of the checkpoint"),
    "skip_fp8_block_index": _idle("list", "it is of LTX-2", [0, 43, 44, 45, 46, 47]),
    "audio_fps": _idle("whole", "it is of LTX-2", 24000),
    "double_precision_rope": _idle("flag", "it is of LTX-2", True),
    "distilled_sigma_values": _idle("list", "it is of LTX-2; --sigmas takes such a list"),
    "text_encoder_quant_scheme": _idle("text", "it is of other models: that of Wan has quant_scheme"),
    # Other models
    **_of(
        "SekoTalk",
        *("adapter_quantized", "adapter_quant_scheme", "adapter_model_path", "audio_adapter_cpu_offload"),
        *("audio_encoder_cpu_offload", "audio_encoder_path", "audio_sr", "ref_state", "prev_frame_length"),
        *("clip_configs", "default_input_info", "f2v_process", "audio_type"),
    ),
    **_of(
        "InfiniteTalk",
        *("infinitetalk_mode", "infinitetalk_size", "infinitetalk_vae_scale", "infinitetalk_context_tokens"),
        *("infinitetalk_audio_output_dim", "audio_window", "motion_frame", "audio_sample_rate", "norm_output_audio"),
        *("sample_text_guide_scale", "sample_audio_guide_scale", "enable_text_cfg", "audio_cross_attn_type"),
        "use_timestep_transform",
    ),
    **_of(
        "a model that makes frame after frame (self-forcing, CausVid, SekoTalk's)",
        *("ar_config", "causal_rope_type", "num_fragments", "num_frames", "num_frame_per_block", "num_blocks"),
        *("frame_seq_length", "audio_feature_dim", "audio_projection_dim", "audio_num_tokens", "look_ahead"),
        *("projection_transformer_layers", "audio_feat_window_neighbor_frame", "audio_feat_fps"),
    ),
    **_of(
        "Animate 2",
        *("log_scale", "refer_offset_t", "refer_offset_h", "refer_offset_w", "refer_stride", "sparse_type"),
        *("use_img_emb", "audio_mux_prefer_copy"),
    ),
    **_of("Wan-Dancer", "dancer_stage", "music_inject_layers"),
    **_of(
        "models of pictures",
        *("prompt_template_encode", "prompt_template_encode_start_idx", "CONDITION_IMAGE_SIZE"),
        *("USE_IMAGE_ID_IN_PROMPT", "attn_type"),
    ),
}

_ONE = "here the tokens of all processes are attended to in one way"
PARALLEL: dict[str, Key] = {
    "cfg_p_size": _acts("whole", "--cfg_parallel"),
    "seq_p_size": _acts("whole", "--ulysses_size and --ring_size"),
    "seq_p_attn_type": _acts("text", "--ulysses_size and --ring_size", "without a seq_p_size above 1"),
    "tensor_p_size": _acts("whole", "--dit_fsdp and --ulysses_size"),
    "vae_parallel": Key("flag", "idle", "rows of pictures are always shared out", (True,)),
    **{
        name: _idle("any", f"{_ONE}, in the type of the computation")
        for name in (
            *("seq_p_quant_scheme", "seq_p_fp8_comm", "seq_p_fp4_comm", "seq_p_head_parallel", "seq_p_tensor_fusion"),
            *("seq_p_prepost_backend", "seq_p_a2a_backend", "tp_load_mode"),
        )
    },
}
LORA: dict[str, Key] = {
    "path": _acts("text", "--lora"),
    "strength": _acts("number", "the strength"),
    "name": _acts("text", "the expert: high_noise_model or low_noise_model"),
    "alpha": _idle("number", "the file says it, or the rank is meant"),
}
