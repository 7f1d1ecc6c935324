"""What the models of a run compute and hold: each is built on the meta device and run there, see `Tally`.

Blocks of a network are alike, and so are chunks of a video. So two blocks are run, and as many chunks as it takes until
nothing new is kept; what grows with their number is told from the difference of two runs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from wan.denoise import denoise
from wan.distributed.grid import Grid
from wan.distributed.parallel import Parallel
from wan.models.audio import MARGIN_STEPS, WINDOW_STEPS, AudioEncoder, audio_model, samples_of
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel
from wan.models.dit.adapters.animate import FACE_EVERY
from wan.models.dit.sequence import Group, Times
from wan.models.encoders import clip_model, text_model
from wan.models.ops.sliced import counted_for
from wan.models.vae import empty_vae
from wan.plan.tally import Tally
from wan.solvers import make_solver

# By the names of the options: what is computed in, and what matrices are kept in where that is less.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "mixed": torch.float32}
KEPT = {"mixed": torch.bfloat16}
PARTS = ("self_attn", "cross_attn", "ffn")  # of a block, in the order of their use
_BLOCKS, _STEPS = 2, 3  # the second block holds the first one's input, the third step the results of two
_CHUNKS = 3  # of the VAE, of which later ones keep no more
_ENCODERS = {"t5": text_model, "clip": clip_model, "wav2vec": audio_model}
_AFTER_BLOCKS = ("vace_layers", "audio_inject_layers")  # of a configuration: blocks that something is put after
_CACHED = lru_cache(maxsize=256)


@dataclass(frozen=True)
class Count:
    """peak: bytes that are made on the way, at most; flops: of all."""

    peak: int
    flops: float


@dataclass(frozen=True)
class Forward:
    """FLOPs of one forward of a DiT: `linear` by part of all blocks and of what adapters put after them, and of what is
    outside ("rest"); `attention` by part."""

    linear: Mapping[str, float]
    attention: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, float]:
        found = {"linear": sum(self.linear.values())}
        return found | {f"{part.partition('_')[0]}_attention": self.attention[part] for part in PARTS[:2]}

    def of_part(self, part: str) -> float:
        return self.linear[part] + self.attention.get(part, 0.0)


# Models


def build(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device, without values. kind: "dit", "vae" or an encoder; config: as the task has it, or of a
    VAE as its file tells it."""
    if kind in _ENCODERS:
        return _ENCODERS[kind](**config).to("meta")
    if kind == "vae":
        return empty_vae(config)
    with torch.device("meta"):
        return WanModel(**config)


def in_type(model: nn.Module, dtype: str) -> nn.Module:
    """The model, whose parameters have the type of the run, or stay in fp32."""
    stays = getattr(model, "keep_fp32", lambda name: False)
    for name, one in model.named_parameters():
        one.requires_grad_(False)
        one.data = one.data.to(torch.float32 if stays(name) else DTYPES[dtype])
    return model


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# The DiT


def forward_flops(spec: EasyDict, latent: tuple[int, ...]) -> Forward:
    """Of one sample. latent: [z, T, h, w]."""
    return _forward(key(spec.dit), tuple(latent[1:]))


def denoising_bytes(
    spec: EasyDict,
    latent: tuple[int, ...],
    dtype: str,
    device: str,
    grid: Grid,
    solver: str,
    is_guided: bool,
    has_image: bool,
) -> int:
    """The most that one rank holds while it samples, beside weights and what a cache keeps."""
    has_clean_frame = has_image and spec.kind == "ti2v"
    return _denoising(key(spec.dit), tuple(latent), dtype, device, grid, solver, is_guided, has_clean_frame)


def token_count(spec: EasyDict, latent: tuple[int, ...]) -> int:
    """Tokens of one sample, with those that are put beside the video's. latent: [z, T, h, w]."""
    return _tokens(key(spec.dit), tuple(latent))


@_CACHED
def _tokens(dit: str, latent: tuple[int, ...]) -> int:
    model = _few_blocks(json.loads(dit), "bf16")
    x, grid = model.embed_patches(_empty(1, model.patch_embedding.in_channels, *latent[1:]))
    groups = [Group(grid)]
    for adapter in model.adapters:
        x, groups = adapter.embed(adapter.empty_inputs(_empty(1, *latent)), x, groups)
    return sum(group.count for group in groups)


@_CACHED
def _forward(dit: str, size: tuple[int, ...]) -> Forward:
    config = json.loads(dit)
    layers, model = config["num_layers"], _few_blocks(config, "bf16")
    tally = Tally()
    places = {}
    for unit in model.units().values():
        where = "block" if unit in model.blocks else "after"
        places[unit] = f"{where} rest"
        for part in unit.parts:
            owner = getattr(unit, part)
            places |= {module: f"{where} {part}" for module in (owner, *owner.children())}  # some are not called
    with torch.inference_mode(), counted_for("cpu"), tally, tally.places(places):
        _predict(model, _empty(1, config["out_dim"], *size), torch.tensor([500.0]))
    # What adapters put after blocks: as many as the whole network has are like those of this one.
    after, few_after = (len(one.units()) - len(one.blocks) for one in (build("dit", config), model))
    times = {"block": layers / len(model.blocks), "after": after / max(few_after, 1)}
    found = {kind: Counter(rest=tally.flops["rest", kind]) for kind in ("matmul", "attention")}
    for (place, kind), flops in tally.flops.items():
        where, _, part = place.partition(" ")
        if part:
            found[kind][part] += flops * (1 if part == "before_proj" else times[where])  # of the first hint alone
    found["attention"]["cross_attn"] += found["attention"].pop("rest")  # what adapters look at
    return Forward(found["matmul"], found["attention"])


@_CACHED
def _denoising(
    dit: str,
    latent: tuple[int, ...],
    dtype: str,
    device: str,
    grid: Grid,
    solver: str,
    is_guided: bool,
    has_clean_frame: bool,
) -> int:
    config, parallel = json.loads(dit), Parallel.imagined(*grid)
    model = _few_blocks(config, dtype, parallel)
    tokens = math.prod(size // patch for size, patch in zip(latent[1:], model.patch_size))
    with torch.inference_mode(), counted_for(device), Tally() as tally:

        def predict(latent: Tensor, times: Times, ctx: Any) -> Tensor:
            if ctx.step < _STEPS - 1:  # what is held grows up to the last one
                return torch.empty_like(latent)
            if has_clean_frame:
                timestep = times.t.float().repeat(1, tokens)
                timestep[:, : tokens // latent.shape[2]] = 0
                times = Times.of(timestep)
            return _predict(model, latent, times)

        steps = make_solver(solver, steps=_STEPS, shift=3.0, draw=lambda shape: _empty(*shape))
        denoise(predict, steps, _empty(1, *latent), guide_scale=5.0 if is_guided else 1.0, parallel=parallel)
    return tally.peak


def _few_blocks(config: dict[str, Any], dtype: str, parallel: Parallel | None = None) -> WanModel:
    few = {**config, "num_layers": min(_BLOCKS, config["num_layers"])}
    few |= {key: [0] for key in _AFTER_BLOCKS if key in config}
    if "motion_encoder_dim" in config:
        few["num_layers"] = min(FACE_EVERY, config["num_layers"])  # or none would be followed by a look at the face
    model = in_type(build("dit", few), dtype)
    model.parallel = parallel or Parallel()
    return model


def _predict(model: WanModel, latent: Tensor, times: Tensor | Times) -> Tensor:
    text = _empty(1, model.text_len, model.text_embedding["0"].in_features)
    condition = model.patch_embedding.in_channels - latent.shape[1]
    y = _empty(1, condition, *latent.shape[2:]) if condition else None
    clip_fea = None
    if model.img_emb is not None:
        clip_fea = _empty(1 if model.img_emb.emb_pos is None else 2, CLIP_TOKENS, CLIP_DIM)
    inputs = {name: value for adapter in model.adapters for name, value in adapter.empty_inputs(latent).items()}
    return model(latent, times, text, y=y, clip_fea=clip_fea, **inputs)


# The VAE


def decoding(
    vae: Mapping[str, Any], latent: tuple[int, ...], dtype: str, device: str, tile_px: int = 0, ranks: int = 1
) -> Count:
    """Of a whole latent [z, T, h, w], until there are the pixels of the video in 8 bits."""
    run = lambda chunks: _vae(key(vae), "decode", chunks, latent[2:], dtype, device, tile_px, ranks)  # noqa: E731
    return _as_long(run, latent[1])


def encoding(
    vae: Mapping[str, Any],
    frames: int,
    rows: int,
    columns: int,
    dtype: str,
    device: str,
    tile_px: int = 0,
    ranks: int = 1,
) -> Count:
    """Of a video of 4n+1 frames of rows x columns pixels, with that video itself."""
    run = lambda chunks: _vae(key(vae), "encode", chunks, (rows, columns), dtype, device, tile_px, ranks)  # noqa: E731
    return _as_long(run, 1 + (frames - 1) // 4)


def sketching(vae: Mapping[str, Any], latent: tuple[int, ...], dtype: str, device: str) -> Count:
    """Of a preview by a TAE, see `TAE.sketch`."""
    return _as_long(lambda chunks: _vae(key(vae), "sketch", chunks, latent[2:], dtype, device, 0, 1), latent[1])


def _as_long(run: Callable[[int], Count], chunks: int) -> Count:
    if chunks <= _CHUNKS + 1:
        return run(chunks)
    first, second, more = run(_CHUNKS), run(_CHUNKS + 1), chunks - _CHUNKS
    peak = first.peak + more * (second.peak - first.peak)
    return Count(peak, first.flops + more * (second.flops - first.flops))


@_CACHED
def _vae(
    vae: str, way: str, chunks: int, size: tuple[int, ...], dtype: str, device: str, tile_px: int, ranks: int
) -> Count:
    model = in_type(build("vae", json.loads(vae)), dtype)
    group, run = Parallel.imagined(ulysses=ranks).world, _FirstTile()
    with torch.inference_mode(), counted_for(device), Tally() as tally:
        if way == "decode":
            run.model, model.decode_raw = model.decode_raw, run
            video = model.decode(_empty(1, model.z_dim, chunks, *size), tile_px, group)[0]
            video.add_(1).mul_(127.5).clamp_(0, 255).to(torch.uint8)
        elif way == "sketch":
            model.sketch(_empty(1, model.z_dim, chunks, *size)).add(1).mul(127.5).to(torch.uint8)
            run.tiles = 1
        else:
            run.model, model.encode_raw = model.encode_raw, run
            model.encode(_empty(1, 3, 4 * chunks - 3, *size), tile_px, group)
    return Count(tally.peak, sum(tally.flops.values()) * run.tiles)


class _FirstTile:
    """Runs the first tile alone: the others are like it."""

    model: Callable[..., Tensor]
    tiles = 0

    def __call__(self, x: Tensor, group: Any) -> Tensor:
        self.tiles += 1
        if self.tiles == 1:
            out = self.model(x, group=group)
            self.shape = out.shape
            return out
        return _empty(*self.shape)


# The encoders


@_CACHED
def _text(text: str, prompts: int, tokens: int, dtype: str) -> Count:
    config = json.loads(text)
    layers = config["num_layers"]
    model = in_type(build("t5", {**config, "num_layers": min(_BLOCKS, layers)}), dtype)
    ids = _empty(prompts, tokens, dtype=torch.long)
    with torch.inference_mode(), Tally() as tally:
        # In four axes, as its attention takes it: what has no values cannot be asked whether it hides anything.
        model(input_ids=ids, attention_mask=_empty(prompts, 1, tokens, tokens, dtype=DTYPES[dtype]))
    return Count(tally.peak, sum(tally.flops.values()) / len(model.encoder.block) * layers)


def text_encoding(text: EasyDict, prompts: int, tokens: int, dtype: str) -> Count:
    """Of so many prompts, each as long as the longest, of `tokens` tokens."""
    return _text(key(text), prompts, tokens, dtype)


@_CACHED
def image_looking(images: int, dtype: str) -> Count:
    """Of CLIP's encoder."""
    model = in_type(build("clip", {}), dtype)
    size = model.embeddings.image_size
    with torch.inference_mode(), Tally() as tally:
        pixels = _empty(images, 3, size, size).to(DTYPES[dtype])
        model(pixel_values=pixels, output_hidden_states=True)
    return Count(tally.peak, sum(tally.flops.values()))


@_CACHED
def hearing(wav2vec: str, steps: int) -> Count:
    """Of so many steps of the audio encoder, in windows, see `AudioEncoder`."""
    window = min(steps, WINDOW_STEPS + 2 * MARGIN_STEPS)
    encoder = AudioEncoder(in_type(build("wav2vec", json.loads(wav2vec)), "fp32"))
    with torch.inference_mode(), Tally() as tally:
        encoder.hidden_states(_empty(samples_of(window)))
    return Count(tally.peak, sum(tally.flops.values()) * steps / window)


def key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
