"""The frozen encoders of Wan: UMT5 for prompts, CLIP ViT-H for the start image of Wan2.1. Both from transformers.

Shapes: L tokens of one prompt, D width, N images, P = 1 + patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from wan.memory.upload import make_upload
from wan.models.text import PromptTokenizer, check_tokenizer, load_tokenizer
from wan.weights.assign import load_weights
from wan.weights.infer import count, encoder_heads, no_encoder, our_shapes
from wan.weights.source import Source

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_HEAD_DIM = 80  # ViT-H
Shard = Callable[[nn.Module, Sequence[nn.Module]], None]


class TextEncoder(nn.Module):
    """Prompts -> text embeddings of the UMT5 encoder."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PromptTokenizer,
        text_len: int = 512,
        stream_to: torch.device | str | None = None,
    ):
        """stream_to: the device to compute on, to which each layer's weights come when it is their turn."""
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.text_len = text_len
        self._device = stream_to
        if stream_to is not None:
            from accelerate import cpu_offload

            cpu_offload(self.model, torch.device(stream_to))

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """One [L_i, D] tensor per prompt, in the dtype of the model, end token included, padding cut off.

        The model runs on the longest prompt's length, not on `text_len`: padding is masked and changes nothing.
        """
        if not texts:
            return []
        ids, mask = self.tokenizer(texts, self.text_len)
        device = self._device or self.model.shared.weight.device
        mask_BL = torch.tensor(mask)
        lengths = mask_BL.sum(1).tolist()
        longest = max(lengths)
        ids_BL = torch.tensor(ids)[:, :longest].to(device)
        out_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL[:, :longest].to(device)).last_hidden_state
        return [row[:length] for row, length in zip(out_BLD, lengths)]


class _FeedForward(nn.Module):
    """UMT5's, which transformers rounds to the type of its last matrix, as if nothing were kept narrower than it
    computes."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = theirs.wi_0, theirs.wi_1, theirs.wo, theirs.act

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.wo(self.act(self.wi_0(x_BLD)) * self.wi_1(x_BLD))


class ClipEncoder(nn.Module):
    """Images -> tokens of the CLIP image encoder, taken before its last block."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """images: N tensors [3, 1, H, W] in [-1, 1] of any size. Returns [N, P, D], the class token first."""
        weight = self.model.embeddings.patch_embedding.weight
        pixels = self.preprocess(images).to(weight.device, weight.dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    def preprocess(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """The encoder's input: [N, 3, S, S] fp32, stretched to the square size, then CLIP's mean and deviation."""
        size_px = self.model.embeddings.image_size
        square = [
            F.interpolate(image.float().transpose(0, 1), (size_px, size_px), mode="bicubic", align_corners=False)
            for image in images
        ]
        pixels = torch.cat(square) * 0.5 + 0.5  # not clamped: bicubic overshoot stays, as in training
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std


def load_text_encoder(
    source: Source,
    tokenizer_folder: str | Path,
    *,
    text_len: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kept: torch.dtype | None = None,
    stream: bool = False,
    shard: Shard | None = None,
    stream_to: torch.device | str | None = None,
) -> TextEncoder:
    """UMT5 from an official `.pth`, a transformers checkpoint or a GGUF file of any size; shapes come from the file.

    dtype None keeps the type of the file; kept, stream: as in `load_weights`; shard: called with the model and its
    blocks, to share their weights out among ranks, see `distributed.fsdp`; stream_to: see TextEncoder. Raises SwanError
    if `source` is no T5 encoder or the folder has no tokenizer, or that of another one.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    model = empty_text_encoder(source)
    check_tokenizer(tokenizer_folder, len(model.shared.weight))
    share = shard and (lambda model: shard(model, model.encoder.block))
    options = {"dtype": dtype, "kept": kept, "stream": stream, "shard": share, "upload": make_upload(device)}
    load_weights(model, source, "t5", device=device, **options)
    return TextEncoder(model, tokenizer, text_len, stream_to)


def empty_text_encoder(source: Source) -> nn.Module:
    """UMT5 of the shapes in `source`, on the meta device. Raises SwanError if that is no T5 encoder."""
    shapes = our_shapes(source, "t5")
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocab, dim = shapes["shared.weight"]
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        return text_model(
            vocab=vocab,
            dim=dim,
            dim_attn=shapes[f"{attention}.q.weight"][0],
            dim_ffn=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            num_heads=heads,
            num_layers=count(shapes, "encoder.block."),
            num_buckets=buckets,
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise no_encoder(source, "a UMT5 encoder", error) from None


def text_model(
    vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int, num_buckets: int
) -> nn.Module:
    """UMT5 on the meta device, of the shape that a task file has under `text`."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=dim_attn // num_heads,
        d_ff=dim_ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    model.encoder.set_input_embeddings(model.shared)  # one table; not every version ties it by itself
    for block in model.encoder.block:
        block.layer[1].DenseReluDense = _FeedForward(block.layer[1].DenseReluDense)
    return model


def load_clip_encoder(
    source: Source,
    *,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kept: torch.dtype | None = None,
) -> ClipEncoder:
    """CLIP's image encoder from an official open-clip `.pth` or a transformers checkpoint.

    kept: as in `load_weights`; num_heads: not visible in the shapes; default from a config.json beside the file, else
    from ViT-H's head width.
    """
    model = empty_clip_encoder(source, num_heads)
    load_weights(model, source, "clip", device=device, dtype=dtype, kept=kept)
    return ClipEncoder(model)


def empty_clip_encoder(source: Source, num_heads: int | None = None) -> nn.Module:
    """CLIP's image encoder of the shapes in `source`, on the meta device. Raises SwanError if that is none."""
    shapes = our_shapes(source, "clip")
    try:
        dim, _, _, patch_px = shapes["embeddings.patch_embedding.weight"]
        tokens = shapes["embeddings.position_embedding.weight"][-2]
        return clip_model(
            dim=dim,
            dim_ffn=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_layers=count(shapes, "encoder.layers."),
            num_heads=num_heads or encoder_heads(source, dim, _CLIP_HEAD_DIM),
            image_px=math.isqrt(tokens - 1) * patch_px,
            patch_px=patch_px,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise no_encoder(source, "a CLIP image encoder", error) from None


def clip_model(
    dim: int = 1280,
    dim_ffn: int = 5120,
    num_layers: int = 32,
    num_heads: int = 16,
    image_px: int = 224,
    patch_px: int = 14,
) -> nn.Module:
    """CLIP's image encoder on the meta device; by default ViT-H/14, Wan's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=dim_ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        image_size=image_px,
        patch_size=patch_px,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    model = getattr(model, "vision_model", model)  # transformers 4 wraps it once more
    if "position_ids" in model.embeddings._buffers:  # transformers 4; on the meta device it has no values
        model.embeddings.position_ids = torch.arange((image_px // patch_px) ** 2 + 1).unsqueeze(0)
    return model
