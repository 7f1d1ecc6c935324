"""The frozen audio encoder of S2V, wav2vec2 (arXiv 2006.11477) from transformers: features for each frame of a video.

Source: behaviour of the official Wan2.2 `AudioEncoder`. Shapes: S samples, T steps at 50 a second, N layers, D width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from wan.audio import FEATURES_PER_S, STRIDES, WIDTHS, AudioFile, features_of, steps_of
from wan.weights.assign import load_weights
from wan.weights.infer import count, encoder_heads, no_encoder, our_shapes
from wan.weights.source import Source

_HEAD_DIM = 64  # of the released models
_HOP = math.prod(STRIDES)  # samples from step to step
_SEEN = 1 + sum((width - 1) * math.prod(STRIDES[:i]) for i, width in enumerate(WIDTHS))  # by one step
_CHUNK_STEPS = 1000  # that the convolutions make at a time, which changes no number
WINDOW_STEPS, MARGIN_STEPS = 6000, 500  # that attend to each other: two minutes, and ten seconds around them


class AudioEncoder(nn.Module):
    """Audio -> features of all layers, for each frame of a video.

    The steps of two minutes attend to each other, as officially those of the whole audio do; of a longer one each two
    minutes, and ten seconds before and after them, so that memory does not grow with the square of its length.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, audio: AudioFile, at: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N + 1, D, len(at)] on the CPU, of frames that look `at` steps of one window: see `by_window`."""
        start, (mean, deviation) = int(at[0]) // WINDOW_STEPS * WINDOW_STEPS, audio.level
        first = max(0, start - MARGIN_STEPS)
        last = min(start + WINDOW_STEPS + MARGIN_STEPS, steps_of(audio.samples))
        samples = torch.from_numpy(audio.read(first * _HOP, first * _HOP + samples_of(last - first)))
        states_NTD = self.hidden_states((samples - mean) / deviation)
        return _between(states_NTD, (at - first).to(states_NTD.device)).transpose(1, 2).to("cpu", dtype)

    def hidden_states(self, samples: Tensor) -> Tensor:
        """[S], normalised -> [N + 1, T, D]: what enters the first layer, and what leaves each; the last one normed."""
        extractor, weight = self.model.feature_extractor, self.model.feature_projection.projection.weight
        steps, parts = steps_of(len(samples)), []
        for start in range(0, steps, _CHUNK_STEPS):
            stop = min(start + _CHUNK_STEPS, steps)
            part = samples[start * _HOP :][: samples_of(stop - start)].to(weight.device, weight.dtype)
            parts.append(extractor(part[None]).transpose(1, 2))
        # Layer by layer: of the states that `encoder` gives, transformers 4 norms the last one, and 5 does not.
        encoder = self.model.encoder
        hidden, _ = self.model.feature_projection(torch.cat(parts, dim=1))
        states = [hidden + encoder.pos_conv_embed(hidden)]
        for layer in encoder.layers:
            out = layer(states[-1])
            states.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat([*states[:-1], encoder.layer_norm(states[-1])])


def samples_of(steps: int) -> int:
    """That so many steps see."""
    return (steps - 1) * _HOP + _SEEN


def steps_of_frames(count: int, fps: float) -> Tensor:
    """[frames]: the step, and the part of a step, where each frame of a video looks that is as long as so many samples.
    Features are made at 30 a second, of which each frame takes the nearest."""
    steps = steps_of(count)
    heard = features_of(steps)
    return torch.from_numpy(frame_indices(heard, fps)) * ((steps - 1) / max(heard - 1, 1))


def by_window(at: Tensor) -> tuple[Tensor, ...]:
    """`steps_of_frames` by the windows in which they are heard."""
    return at.split(torch.bincount((at // WINDOW_STEPS).long()).tolist())


def frame_indices(heard: int, fps: float) -> np.ndarray:
    """Which of `heard` features, at 30 a second, each frame of a video takes: the nearest, the even one of two."""
    indices = np.round(np.arange(math.ceil(heard / FEATURES_PER_S * fps) + 1) * (FEATURES_PER_S / fps))
    return indices[indices < heard].astype(np.int64)


def _between(states_NTD: Tensor, at: Tensor) -> Tensor:
    """States at fractional steps: [N, len(at), D]."""
    before = at.floor().long()
    after = (before + 1).clamp(max=states_NTD.shape[1] - 1)
    return torch.lerp(states_NTD[:, before], states_NTD[:, after], (at - before).to(states_NTD.dtype)[:, None])


def load_audio_encoder(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
) -> AudioEncoder:
    """From a transformers checkpoint of wav2vec2.

    num_heads: not visible in the shapes; default from a config.json beside the file, else from the usual head width.
    """
    model = empty_audio_encoder(source, num_heads)
    load_weights(model, source, "wav2vec", device=device, dtype=dtype)
    return AudioEncoder(model)


def empty_audio_encoder(source: Source, num_heads: int | None = None) -> nn.Module:
    """wav2vec2 of the shapes in `source`, on the meta device. Raises SwanError if that is none."""
    shapes = our_shapes(source, "wav2vec")
    try:
        dim, conv_dim = shapes["feature_projection.projection.weight"]
        _, per_group, position_width = shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
        return audio_model(
            dim=dim,
            dim_ffn=shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
            num_layers=count(shapes, "encoder.layers."),
            num_heads=num_heads or encoder_heads(source, dim, _HEAD_DIM),
            conv_dim=conv_dim,
            position_width=position_width,
            position_groups=dim // per_group,
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise no_encoder(source, "a wav2vec2 encoder", error) from None


def audio_model(
    dim: int = 1024,
    dim_ffn: int = 4096,
    num_layers: int = 24,
    num_heads: int = 16,
    conv_dim: int = 512,
    position_width: int = 128,
    position_groups: int = 16,
) -> nn.Module:
    """wav2vec2 on the meta device, in the form with a layer norm after each convolution and before each layer; by
    default of the size of XLSR-53."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=dim,
        intermediate_size=dim_ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        conv_dim=[conv_dim] * len(WIDTHS),
        conv_kernel=WIDTHS,
        conv_stride=STRIDES,
        conv_bias=True,
        num_conv_pos_embeddings=position_width,
        num_conv_pos_embedding_groups=position_groups,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        layer_norm_eps=1e-5,
        mask_time_prob=0.0,  # of training
        layerdrop=0.0,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        return Wav2Vec2Model(config)
