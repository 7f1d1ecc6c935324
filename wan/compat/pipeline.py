"""The pipeline object that load_gguf_pipeline of gguf_loader returns, made of the stages of WanPipeline."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from wan.compat.config import FunConfig, hyperparameters, read_fun_config
from wan.compat.request import check_config, guidance, text_request
from wan.compat.sampler import DEFAULT_SAMPLER, sampler, solver_of
from wan.compat.transformer import WanTransformerGGUF, diffusers_config, warn_of_dtypes
from wan.distributed.parallel import Parallel
from wan.errors import UsageError
from wan.memory.experts import Check, Experts
from wan.models.encoders import TextEncoder
from wan.models.text import PromptTokenizer
from wan.models.vae_base import VideoVAE
from wan.options import LoadOptions, Request, check_device
from wan.options.names import MAX_SEED
from wan.pipeline import Progress, WanPipeline
from wan.plan.runs import DTYPES, KEPT
from wan.tasks.kinds import kind_of
from wan.weights.checkpoint import Checkpoint

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in KEPT}
# Options of build_request -> arguments of a call, for messages.
_NAMES = {
    "sample_guide_scale": "guidance_scale",
    "sample_steps": "num_inference_steps",
    "sample_shift": "shift",
    "frame_num": "num_frames",
    "ckpt_dir": "base_model_path",
    "dit": "gguf_path",
    "size": "width*height",
    **{name: name for name in ("prompt", "negative_prompt", "device", "dtype", "gguf_mode", "vae_tile_px")},
}
# Arguments of VideoX-Fun's call that may be given, if only with the value that says nothing.
_WITHOUT_EFFECT = {
    "num_videos_per_prompt": 1,
    "eta": 0.0,
    "max_sequence_length": 512,
    "comfyui_progressbar": False,
    "callback_on_step_end_tensor_inputs": ["latents"],
}
_NOT_SUPPORTED = (
    *("timesteps", "latents", "prompt_embeds", "negative_prompt_embeds", "callback_on_step_end", "attention_kwargs"),
)


@dataclass
class PipelineOutput:
    """`videos`: fp32 [1, 3, T, H, W] in 0..1, or latents [1, z, T', h, w] where these were asked for."""

    videos: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.videos,)[index]

    @property
    def frames(self) -> np.ndarray:
        """As diffusers has it: [1, T, H, W, 3] in 0..1."""
        return self.videos.permute(0, 2, 3, 4, 1).cpu().numpy()


class _Expert(Experts):
    """The one transformer of a pipeline, which may be replaced."""

    def loaded(self) -> list[nn.Module]:
        return list(self._models.values())

    def put(self, model: nn.Module) -> None:
        self._models["model"] = model


def _part(name: str) -> Any:
    """A model of a pipeline as an attribute: loaded when it is first read, and it may be replaced."""

    def get(self: GGUFPipeline) -> nn.Module:
        with self._model(name) as model:
            return model

    def put(self: GGUFPipeline, model: nn.Module) -> None:
        self._models[name] = model

    return property(get, put)


class GGUFPipeline(WanPipeline):
    """Called as VideoX-Fun's WanPipeline is. Parts are loaded when first needed; they may be moved and replaced.

    Each part computes on the device it is on. With `enable_model_cpu_offload`, parts are released after use and read
    from their files anew.

    scheduler: a scheduler of VideoX-Fun or diffusers, the name of a sampler, or None for UniPC; read at each call
    vae_tile_px: see `--vae_tile_px` of generate.py
    """

    def __init__(self, checkpoint: Checkpoint, load: LoadOptions, parallel: Parallel | None = None):
        super().__init__(checkpoint, load, parallel)
        self.experts = _Expert(self._load_expert, lambda: self.device, keep_all=True)
        self.scheduler: Any = None
        self.vae_tile_px = 0
        self.request_of: Callable[[dict[str, Any]], Request]  # options of a call -> request

    @property
    def transformer(self) -> WanTransformerGGUF:
        return self.experts["model"]

    @transformer.setter
    def transformer(self, model: nn.Module) -> None:
        self.experts.put(model)

    text_encoder: TextEncoder = _part("t5")
    vae: VideoVAE = _part("vae")

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self.text_encoder.tokenizer

    def to(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None) -> GGUFPipeline:
        """Move the parts to a device; a dtype is that of transformer and text encoder. Returns the pipeline."""
        for arg in args:
            device, dtype = (device, arg) if isinstance(arg, torch.dtype) else (arg, dtype)
        if device is not None:
            self.device = torch.device(device)
        if dtype is not None:
            self.load = replace(self.load, dtype=DTYPE_NAMES[dtype], t5_dtype=DTYPE_NAMES[dtype])
        for part in [*self._models.values(), *self.experts.loaded()]:
            part.to(device=device, dtype=None if isinstance(part, VideoVAE) else dtype)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep one model at a time on `device` (default: the first accelerator)."""
        self.to(device or check_device("auto"))
        self.placement = replace(self.placement, offload="model", released=("t5", "model", "vae"))

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 720,
        num_frames: int = 49,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        generator: torch.Generator | None = None,
        shift: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        progress: Progress | None = None,
        **other: Any,
    ) -> PipelineOutput | Tensor:
        """Make one video, in the terms and with the defaults of VideoX-Fun.

        Args:
            height, width: px; num_frames: 4n + 1
            guidance_scale: up to 1: no guidance
            generator: its seed is that of the video, as `--seed` of generate.py; a generator that was used before
                gives the next random one. None: random.
            shift: default: that of the scheduler, else of the config file, else of the task
            output_type: "latent", or "pil" for the decoded video (so do "np" and "pt")
            return_dict: False returns the tensor itself
            progress: called with (stage, steps done, steps in all)
            other: further arguments of VideoX-Fun's call, as far as they ask for nothing

        Raises UsageError or SwanError, one line.
        """
        _check_other(other, output_type)
        solver, own_shift = self._sampler()
        request = self.request_of(
            {
                "prompt": _one(prompt, "prompt"),
                "negative_prompt": _one(negative_prompt, "negative_prompt") or "",
                "size": f"{width}*{height}",
                "frame_num": num_frames,
                "sample_steps": num_inference_steps,
                "sample_guide_scale": guidance(guidance_scale),
                "sample_solver": solver,
                "sample_shift": own_shift if shift is None else shift,
                "seed": _seed(generator),
                "vae_tile_px": self.vae_tile_px,
            }
        )
        report = progress or (lambda stage, done, total: None)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            film = kind_of(self.spec).film(self.spec, request.sample)
            [(_, latents)] = self._sample(request, film, Counter(), report)
        videos = latents if output_type == "latent" else torch.from_numpy(self.decode_latents(latents))
        return PipelineOutput(videos) if return_dict else videos

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Latents [B, z, T', h, w] -> fp32 videos [B, 3, T, H, W] in 0..1."""
        with self._model("vae") as vae, torch.no_grad(), self.checks.decoding(vae):
            device = next(vae.parameters()).device
            with torch.autocast(device.type, enabled=False):
                video = vae.decode(latents.to(device), tile_px=self.vae_tile_px)
            return (video / 2 + 0.5).clamp_(0, 1).float().cpu().numpy()

    def _sampler(self) -> tuple[str, float | None]:
        if self.scheduler is None or isinstance(self.scheduler, str):
            solver, warning = sampler(self.scheduler or DEFAULT_SAMPLER)
            if warning:
                warnings.warn(warning, stacklevel=3)
            return solver, None
        return solver_of(self.scheduler)

    def _load_expert(self, name: str, device: torch.device, check: Check) -> WanTransformerGGUF:
        model = super()._load_expert(name, device, check)
        return WanTransformerGGUF(model, {**self.spec.dit, **diffusers_config(model, self.spec.dit)})


def load_gguf_pipeline(
    gguf_path: str | os.PathLike,
    base_model_path: str | os.PathLike,
    config_path: str | os.PathLike | None = None,
    scheduler: Any = None,
    *,
    pipeline_class: type | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    dequant_dtype: torch.dtype | None = None,
    patch_dtype: torch.dtype | None = None,
    transformer_config: Mapping[str, Any] | None = None,
    gguf_mode: str = "auto",
    vae_tile_px: int = 0,
) -> GGUFPipeline:
    """A text-to-video pipeline: the transformer of a GGUF file with the other parts of `base_model_path`.

    base_model_path: folder in the official or diffusers layout, or a hub id.
    config_path: a VideoX-Fun YAML file; what it does not say is as in the official release.
    scheduler, vae_tile_px: see `GGUFPipeline`. gguf_mode: see `--gguf_mode` of generate.py.
    device: where parts are loaded; "auto" is the first accelerator, else the CPU.
    dequant_dtype, patch_dtype: without effect, see `load_gguf_transformer`.
    transformer_config: hyperparameters, which must be those of the file's model.

    Finds and checks all files; loads nothing yet. Raises UsageError or SwanError, one line.
    """
    if pipeline_class is not None:
        raise UsageError("pipeline_class: build that pipeline yourself, with load_gguf_transformer(...) in it")
    warn_of_dtypes(dequant_dtype, patch_dtype)
    config = read_fun_config(config_path)
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, not {dtype}")
    fixed = {"device": check_device(str(device)), "dtype": DTYPE_NAMES[dtype], "gguf_mode": gguf_mode}
    fixed |= {"t5_dtype": DTYPE_NAMES[dtype]}
    fixed |= {"offload_model": False, "save_file": str(Path(tempfile.gettempdir(), "unused.mp4"))}

    def request_of(options: Mapping[str, Any]) -> tuple[Request, EasyDict]:
        return text_request(gguf_path, base_model_path, config, fixed | dict(options), _NAMES)

    request, spec = request_of({"prompt": "any", "vae_tile_px": vae_tile_px})
    name = "transformer_config"
    check_config(FunConfig(name, dit=hyperparameters(transformer_config, name)), spec)
    for warning in request.warnings:
        warnings.warn(warning, stacklevel=2)
    pipe = GGUFPipeline.from_request(request, spec)
    pipe.request_of = lambda options: request_of(options)[0]
    pipe.scheduler, pipe.vae_tile_px = scheduler, vae_tile_px
    pipe._sampler()  # an unknown scheduler is an error now
    return pipe


def _one(text: str | list[str] | None, name: str) -> str | None:
    if isinstance(text, (list, tuple)):
        if len(text) != 1:
            raise UsageError(f"{name}: one video a call, so one text, not {len(text)}")
        return text[0]
    return text


def _check_other(other: Mapping[str, Any], output_type: str) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise UsageError(f"output_type must be pil, np, pt or latent, not {output_type!r}")
    for name, value in other.items():
        if name not in (*_WITHOUT_EFFECT, *_NOT_SUPPORTED):
            raise UsageError(f"unknown argument {name}")
        if value is not None and (name in _NOT_SUPPORTED or value != _WITHOUT_EFFECT[name]):
            raise UsageError(f"{name} is not supported here")


def _seed(generator: torch.Generator | None) -> int:
    """The seed of a fresh generator, else a number drawn from it; -1 (random) for None. Marks the generator as used."""
    if generator is None:
        return -1
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    is_fresh = torch.equal(fresh.get_state(), generator.get_state())
    drawn = int(torch.randint(2**32, (1,), generator=generator, device=generator.device))
    return seed % (MAX_SEED + 1) if is_fresh else drawn
