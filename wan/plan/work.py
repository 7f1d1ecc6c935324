"""How much there is to compute, and how many parameters: exact counts from the shapes of a task. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from easydict import EasyDict

from wan.options import Request
from wan.plan.activations import CLIP_DIM, CLIP_TOKENS
from wan.tasks.kinds import kind_of

CLIP_PARAMS = 632_076_800  # ViT-H/14 of open-clip, the image tower alone


def high_noise_steps(request: Request, spec: EasyDict) -> int:
    """How many steps the high-noise expert takes; 0 for a task with one expert."""
    if "experts" not in spec:
        return 0
    if request.sample.boundary_step_index is not None:
        return min(request.sample.boundary_step_index, request.sample.steps)
    if request.sample.denoising_step_list:
        sigmas = [step / 1000 for step in request.sample.denoising_step_list]
    else:
        start = 0.999 if request.sample.solver == "unipc" else 1.0  # where each solver's schedule begins
        sigmas = [start * (1 - step / request.sample.steps) for step in range(request.sample.steps)]
    shifted = [request.sample.shift * sigma / (1 + (request.sample.shift - 1) * sigma) for sigma in sigmas]
    return sum(sigma >= spec.boundary for sigma in shifted)


# Work


def forward_flops(spec: EasyDict, tokens: int) -> dict[str, float]:
    """FLOPs of one DiT forward on one sample: linear layers, self-attention, cross-attention. 2 per multiply-add."""
    dit = spec.dit
    image_tokens = _image_tokens(spec)
    patch_values = math.prod(dit.patch_size)
    per_token = dit.num_layers * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)  # q k v o, cross q o, ffn
    per_token += patch_values * dit.dim * (dit.in_dim + dit.out_dim)  # patch embedding and head
    per_text_token = dit.num_layers * 2 * dit.dim**2 + dit.text_dim * dit.dim + dit.dim**2  # cross k v, embedding
    per_image_token = dit.num_layers * 2 * dit.dim**2 + CLIP_DIM**2 + CLIP_DIM * dit.dim
    linear = tokens * per_token + dit.text_len * per_text_token + image_tokens * per_image_token
    pairs = tokens * dit.dim * dit.num_layers  # times keys: the products with k and with v
    return {
        "linear": 2.0 * linear,
        "self_attention": 4.0 * pairs * tokens,
        "cross_attention": 4.0 * pairs * (dit.text_len + image_tokens),
    }


def _image_tokens(spec: EasyDict) -> int:
    if "clip" not in spec.files:
        return 0
    return CLIP_TOKENS * kind_of(spec).clip_images


# Work of the encoders and the VAE: what computes in matrix products, convolutions and attention


def text_flops(spec: EasyDict, prompts: int, tokens: int) -> float:
    """FLOPs of encoding so many prompts, each as long as the longest, of `tokens` tokens."""
    text = spec.text
    layer = tokens * (4 * text.dim * text.dim_attn + 3 * text.dim * text.dim_ffn) + 2 * tokens**2 * text.dim_attn
    return 2.0 * prompts * text.num_layers * layer


def clip_flops(images: int) -> float:
    """FLOPs of the image encoder, whose layers are 32 and whose feed-forward is four times as wide."""
    layer = CLIP_TOKENS * 12 * CLIP_DIM**2 + 2 * CLIP_TOKENS**2 * CLIP_DIM
    return 2.0 * images * (32 * layer + (CLIP_TOKENS - 1) * 3 * 14**2 * CLIP_DIM)


def decode_flops(vae: EasyDict, rows: int, columns: int, frames: int) -> float:
    """FLOPs of decoding `frames` latent frames of rows x columns cells."""
    first, later = (_decode_chunk(vae, rows, columns, is_first) for is_first in (True, False))
    return 2.0 * (first + (frames - 1) * later + frames * rows * columns * vae.z_dim**2)


def encode_flops(vae: EasyDict, rows: int, columns: int, frames: int) -> float:
    """FLOPs of encoding a video of `frames` frames, 4n+1, of rows x columns pixels."""
    first, later = (_encode_chunk(vae, rows, columns, is_first) for is_first in (True, False))
    return 2.0 * (first + (frames - 1) // 4 * later)


def tiled_flops(flops: Callable[[int, int], float], rows: int, columns: int, tile: int, align: int) -> float:
    """`flops(rows, columns)` over all tiles; tile: their side, 0 for none; align: as of `wan.models.vae`."""
    tile = tile // align * align
    if not tile or (rows <= tile and columns <= tile):
        return flops(rows, columns)
    tile = max(tile, 2 * align)
    step = tile - max(align, tile // 4 // align * align)
    count = math.prod(len(range(0, max(side - tile, 0), step)) + 1 for side in (rows, columns))
    return count * flops(min(tile, rows), min(tile, columns))


def _decode_chunk(vae: EasyDict, rows: int, columns: int, is_first: bool) -> float:
    """Multiply-adds of one latent frame. The first has no past, whose taps are left out, and stays one frame."""
    taps = 9 if is_first else 27
    widths = [vae.get("dec_dim", vae.dim) * mult for mult in [vae.dim_mult[-1], *reversed(vae.dim_mult)]]
    width, frames, is_new = widths[0], 1, vae.version == "2.2"
    work = rows * columns * (vae.z_dim * width * taps) + _middle_work(width, rows * columns, taps)
    for stage, temporal in enumerate([*reversed(vae.temporal_downsample), None]):
        inputs = widths[stage] // 2 if stage and not is_new else widths[stage]
        out, places = widths[stage + 1], frames * rows * columns
        work += places * _stage_work(inputs, out, vae.num_res_blocks + 1, taps)
        if temporal is None:
            continue
        if temporal and not is_first:
            work += places * 6 * out**2
            frames *= 2
        # Four kinds of pixels, each by 2x2 taps of the small picture with a margin of one.
        work += frames * (rows + 1) * (columns + 1) * 16 * out * (out if is_new else out // 2)
        rows, columns = 2 * rows, 2 * columns
    return work + frames * rows * columns * widths[-1] * (12 if is_new else 3) * taps


def _encode_chunk(vae: EasyDict, rows: int, columns: int, is_first: bool) -> float:
    """Multiply-adds of four frames; of the first, which stands alone, of one."""
    is_new, taps, frames = vae.version == "2.2", 9 if is_first else 27, 1 if is_first else 4
    if is_new:  # 2x2 pixels are folded into channels
        rows, columns = rows // 2, columns // 2
    widths = [vae.dim * mult for mult in [1, *vae.dim_mult]]
    work = frames * rows * columns * (12 if is_new else 3) * widths[0] * taps
    for stage, temporal in enumerate([*vae.temporal_downsample, None]):
        out = widths[stage + 1]
        work += frames * rows * columns * _stage_work(widths[stage], out, vae.num_res_blocks, taps)
        if temporal is None:
            continue
        rows, columns = rows // 2, columns // 2
        work += frames * rows * columns * 9 * out**2
        if temporal and not is_first:
            frames //= 2
            work += frames * rows * columns * 3 * out**2
    work += frames * (_middle_work(widths[-1], rows * columns, taps))
    return work + frames * rows * columns * (widths[-1] * 2 * vae.z_dim * taps + (2 * vae.z_dim) ** 2)


def _stage_work(inputs: int, out: int, blocks: int, taps: int) -> int:
    """Of each place, in residual blocks of which the first changes the width."""
    shortcut = inputs * out if inputs != out else 0
    return inputs * out * taps + (2 * blocks - 1) * out**2 * taps + shortcut


def _middle_work(width: int, places: int, taps: int) -> int:
    """Two residual blocks around one attention, of one frame."""
    return places * 4 * width**2 * taps + places * 4 * width**2 + 2 * places**2 * width


# Parameters


def parameters(spec: EasyDict) -> dict[str, int]:
    """Number of parameters by component; `dit` is one expert."""
    counts = {"text": _text_params(spec.text), "dit": _dit_params(spec), "vae": _vae_params(spec.vae)}
    if "clip" in spec.files:
        counts["clip"] = CLIP_PARAMS
    return counts


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _dit_params(spec: EasyDict) -> int:
    dit = spec.dit
    dim = dit.dim
    block = 8 * _linear(dim, dim) + _linear(dim, dit.ffn_dim) + _linear(dit.ffn_dim, dim)
    block += 4 * dim + 2 * dim + 6 * dim  # q and k norms of both attentions, norm3, modulation
    total = _linear(dit.in_dim * math.prod(dit.patch_size), dim)
    total += _linear(dit.text_dim, dim) + _linear(dim, dim)
    total += _linear(dit.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    total += _linear(dim, dit.out_dim * math.prod(dit.patch_size)) + 2 * dim
    if "clip" in spec.files:
        block += 2 * _linear(dim, dim) + dim
        total += 2 * CLIP_DIM + _linear(CLIP_DIM, CLIP_DIM) + _linear(CLIP_DIM, dim) + 2 * dim
        total += 2 * CLIP_TOKENS * CLIP_DIM if spec.dit.model_type == "flf2v" else 0
    if hints := len(dit.get("vace_layers", ())):
        total += _linear(dit.vace_in_dim * math.prod(dit.patch_size), dim) + _linear(dim, dim)
        total += hints * (block + _linear(dim, dim))
    return total + dit.num_layers * block


def _text_params(text: EasyDict) -> int:
    block = (
        4 * text.dim * text.dim_attn + 3 * text.dim * text.dim_ffn + 2 * text.dim + text.num_buckets * text.num_heads
    )
    return text.vocab * text.dim + text.num_layers * block + text.dim


def _conv(inputs: int, outputs: int, taps: int) -> int:
    return inputs * outputs * taps + outputs


def _residual(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return inputs + _conv(inputs, outputs, 27) + outputs + _conv(outputs, outputs, 27) + shortcut


def _vae_params(vae: EasyDict) -> int:
    pixels = 12 if vae.version == "2.2" else 3  # 2.2 folds 2x2 pixels into channels
    widths = [vae.dim * mult for mult in [1, *vae.dim_mult]]
    encoder = _conv(pixels, widths[0], 27) + _vae_ends(widths[-1], 2 * vae.z_dim)
    for stage, temporal in enumerate([*vae.temporal_downsample, None]):
        encoder += _vae_stage(widths[stage], widths[stage + 1], vae.num_res_blocks)
        if temporal is not None:
            encoder += _conv(widths[stage + 1], widths[stage + 1], 9)
            encoder += _conv(widths[stage + 1], widths[stage + 1], 3) if temporal else 0
    widths = [vae.get("dec_dim", vae.dim) * mult for mult in [vae.dim_mult[-1], *reversed(vae.dim_mult)]]
    decoder = _conv(vae.z_dim, widths[0], 27) + _vae_ends(widths[0], 0) + widths[-1] + _conv(widths[-1], pixels, 27)
    for stage, temporal in enumerate([*reversed(vae.temporal_downsample), None]):
        # The upsampling of 2.1 halves the channels, that of 2.2 keeps them.
        halves = vae.version == "2.1"
        inputs = widths[stage] // 2 if halves and stage else widths[stage]
        out = widths[stage + 1]
        decoder += _vae_stage(inputs, out, vae.num_res_blocks + 1)
        if temporal is not None:
            decoder += _conv(out, out // 2 if halves else out, 9) + (_conv(out, 2 * out, 3) if temporal else 0)
    return encoder + decoder + _conv(2 * vae.z_dim, 2 * vae.z_dim, 1) + _conv(vae.z_dim, vae.z_dim, 1)


def _vae_stage(inputs: int, outputs: int, blocks: int) -> int:
    return _residual(inputs, outputs) + (blocks - 1) * _residual(outputs, outputs)


def _vae_ends(width: int, head_out: int) -> int:
    """The middle (two residual blocks around one attention) and, for the encoder, the head."""
    attention = width + _conv(width, 3 * width, 1) + _conv(width, width, 1)
    return 2 * _residual(width, width) + attention + (width + _conv(width, head_out, 27) if head_out else 0)


def kept_fp32(spec: EasyDict) -> int:
    """Parameters of a DiT that stay in fp32 whatever the compute type, see `WanModel.keep_fp32`."""
    dit = spec.dit
    time = _linear(dit.freq_dim, dit.dim) + _linear(dit.dim, dit.dim) + _linear(dit.dim, 6 * dit.dim)
    return time + (6 * dit.num_layers + 2) * dit.dim


def block_matrices(spec: EasyDict) -> tuple[int, int, int]:
    """Weights in the matrices of one block, by its parts: self-attention, cross-attention, feed-forward."""
    dit = spec.dit
    square = dit.dim**2
    return 4 * square, (6 if "clip" in spec.files else 4) * square, 2 * dit.dim * dit.ffn_dim


def part_flops(spec: EasyDict, tokens: int) -> tuple[float, float, float]:
    """FLOPs of one block by the same parts. tokens: of one forward."""
    dit = spec.dit
    square, context = dit.dim**2, dit.text_len + _image_tokens(spec)
    attended = 4.0 * tokens * dit.dim
    self_attention = 8.0 * tokens * square + attended * tokens
    cross_attention = 4.0 * tokens * square + 4.0 * context * square + attended * context
    return self_attention, cross_attention, 4.0 * tokens * dit.dim * dit.ffn_dim


def text_layer_params(spec: EasyDict) -> int:
    """Parameters of one layer of the text encoder."""
    return (_text_params(spec.text) - (spec.text.vocab + 1) * spec.text.dim) // spec.text.num_layers
