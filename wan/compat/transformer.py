"""Our transformer under the calling conventions of diffusers and of VideoX-Fun, for use inside their pipelines."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from wan.compat.config import hyperparameters
from wan.errors import SwanError, UsageError
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel
from wan.weights.assign import load_weights
from wan.weights.infer import infer_dit_config
from wan.weights.source import Source, open_source


@dataclass
class TransformerOutput:
    """What diffusers calls Transformer2DModelOutput: `.sample`, also under [0] and ["sample"]."""

    sample: Tensor

    def __getitem__(self, key: int | str) -> Tensor:
        return self.sample if key == "sample" else (self.sample,)[key]


class WanTransformerGGUF(nn.Module):
    """Holds a WanModel, and takes the place of the transformer of CineWan and VideoX-Fun, which is called as the
    official model is.

    config: hyperparameters, by attribute or key, under the official names and those of diffusers.
    """

    def __init__(self, model: WanModel, config: Mapping[str, Any]):
        super().__init__()
        self.model = model
        self.config = EasyDict(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.patch_embedding.weight.device

    def cache_context(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        """Where diffusers' step caches would act; this transformer has none."""
        return contextlib.nullcontext()

    def forward(
        self,
        x: Tensor | list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int | None = None,
        clip_fea: Tensor | None = None,
        y: Tensor | list[Tensor] | None = None,
    ) -> Tensor:
        """Velocity [B, C_out, F, H, W], fp32. `seq_len`, the padded length, has no effect: nothing is padded here.

        Args:
            x, y: [B, C, F, H, W], or a list of [C, F, H, W] of one size; y is concatenated after x
            t: [B], or [B, tokens]
            context: [M_i, text_dim] each
            clip_fea: [n, 257, 1280]
        """
        x = x if isinstance(x, Tensor) else torch.stack(x)
        return self.velocity(x, t, context, y, clip_fea)

    def velocity(self, x: Tensor, t: Tensor, context, y=None, clip_fea: Tensor | None = None) -> Tensor:
        """The model's prediction, fp32, on the device of `x`. Inputs may be elsewhere than the model.

        The model sets its own precision, so an autocast around it has no effect.
        """
        device = self.device
        if device.type == "meta":
            raise SwanError("offloading layer by layer is not supported; use enable_model_cpu_offload")
        context = [text.to(device) for text in context]
        y = y if y is None else torch.stack([one.to(device) for one in y])
        clip_fea = clip_fea if clip_fea is None else clip_fea.to(device)
        with torch.autocast(device.type, enabled=False):
            return self.model(x.to(device), t, context, y=y, clip_fea=clip_fea).to(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`.to`, `.half`, `.cuda` and their like come here. What the model keeps in fp32 moves, but is not cast."""
        kept = {id(value) for name, value in self.model.named_parameters() if self.model.keep_fp32(name)}

        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return value.to(moved.device) if id(value) in kept else moved

        return super()._apply(move, recurse)


class WanTransformer(WanTransformerGGUF):
    """Takes the place of diffusers' WanTransformer3DModel in its pipelines, and in VideoX-Fun's as well."""

    def forward(
        self,
        hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        **official: Any,
    ) -> TransformerOutput | tuple[Tensor] | Tensor:
        """Velocity [B, C_out, F, H, W], fp32: rounding it to the type of the weights would only lose.

        Args:
            hidden_states: [B, C_in, F, H, W]
            timestep: [B], or [B, tokens]
            encoder_hidden_states: [B, M, text_dim]; zero-padded to the text length the model was trained on (512)
            encoder_hidden_states_image: [n, 257, 1280], n = B, or 2B for a first and a last image
            return_dict: False returns a tuple of one
            attention_kwargs: for diffusers' LoRA scale; there is nothing to scale
            official: all arguments by the names of `WanTransformerGGUF`, in place of those above, give its result
        """
        if hidden_states is None:
            return super().forward(**official)
        if official:
            raise TypeError(f"unexpected arguments: {', '.join(official)}")
        sample = self.velocity(hidden_states, timestep, encoder_hidden_states, clip_fea=encoder_hidden_states_image)
        return TransformerOutput(sample) if return_dict else (sample,)


def load_gguf_transformer(
    gguf_path: str | os.PathLike,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    dequant_dtype: torch.dtype | None = None,
    patch_dtype: torch.dtype | None = None,
    *,
    stream: bool = True,
    attention: str = "sdpa",
) -> WanTransformer:
    """The transformer in a GGUF file (or any other weight file), ready for diffusers' `WanPipeline(transformer=...)`.

    `WanPipeline.from_pretrained` takes no other models than those of diffusers: give it transformer=None, then set
    `pipe.transformer`.

    config: hyperparameters; only the number of heads cannot be told from the file, and is taken for dim / 128.
    dtype: of the computation. Weights are dequantised in fp32 and rounded once to it, so dequant_dtype has no effect;
    nor has patch_dtype, since LoRA patches are not part of the weights.
    stream: keep the weights packed and dequantise them at each use; False dequantises once, now.
    attention: a back end of `wan.models.attention`.

    Raises UsageError for settings that cannot be honoured and SwanError for a file that holds no whole transformer.
    """
    warn_of_dtypes(dequant_dtype, patch_dtype)
    source = open_source(gguf_path)
    arguments = infer_dit_config(source) | hyperparameters(config)
    return WanTransformer(*build_model(source, arguments, device, dtype, stream, attention))


def build_model(
    source: Source,
    arguments: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    stream: bool,
    attention: str = "sdpa",
) -> tuple[WanModel, dict[str, Any]]:
    """WanModel(**arguments) with the weights of `source`, and its hyperparameters for an adapter's `config`.

    Raises UsageError for arguments that no model can have, SwanError that names the tensors which are missing,
    unexpected or mis-shaped.
    """
    _check_place(device, dtype)
    defaults = {name: one.default for name, one in inspect.signature(WanModel).parameters.items()}
    config = {name: value for name, value in defaults.items() if name != "attention"} | dict(arguments)
    if config["dim"] % (2 * config["num_heads"]):
        raise UsageError(f"dim {config['dim']} cannot be divided among {config['num_heads']} heads of even width")
    with torch.device("meta"):
        model = WanModel(**config, attention=attention)
    load_weights(model, source, "dit", device=device, dtype=dtype, stream=stream)
    return model.eval(), config | diffusers_config(model, config)


def _check_place(device: torch.device | str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, not {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None


def warn_of_dtypes(dequant_dtype: torch.dtype | None, patch_dtype: torch.dtype | None) -> None:
    """Say which of the two settings of other loaders has no effect here."""
    if dequant_dtype not in (None, torch.float32):
        warnings.warn("dequant_dtype has no effect: weights are dequantised in fp32 and rounded once", stacklevel=3)
    if patch_dtype is not None:
        warnings.warn("patch_dtype has no effect: LoRA patches are not part of the weights", stacklevel=3)


def diffusers_config(model: WanModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' pipelines read from `transformer.config`, as its WanTransformer3DModel has it."""
    images = model.img_emb is not None
    return {
        "patch_size": model.patch_size,
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": model.head_dim,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": CLIP_DIM if images else None,
        "added_kv_proj_dim": config["dim"] if images else None,
        "pos_embed_seq_len": 2 * CLIP_TOKENS if images and model.img_emb.emb_pos is not None else None,
        "rope_max_seq_len": 1024,
    }
