"""Bytes of activations at the peak of each model, counted from the tensors that its code holds at once. No torch.

Counts follow `forward` of wan/models line by line: what a caller still holds counts as well. A "map" below is one
frame of feature maps.
"""

from __future__ import annotations

from easydict import EasyDict

from wan.tasks.kinds import kind_of

CLIP_DIM, CLIP_TOKENS = 1280, 257
_SLICE_BYTES = 64 << 20  # on a GPU: the fp32 copy of a slice in wan.models.ops
_TAPS = 2  # frames that a causal convolution keeps from its last chunk


def dit_bytes(spec: EasyDict, tokens: int, all_tokens: int, itemsize: int, on_cpu: bool) -> int:
    """Of one forward of one sample. tokens: of this process; all_tokens: of the sequence; itemsize: bytes a value."""
    dit = spec.dit
    width, ffn = tokens * dit.dim, tokens * dit.ffn_dim
    copies = 1 if on_cpu and itemsize < 4 else 2  # GELU runs in place, or makes a second copy
    # x as embedded (held to the end), x before the block (held by the loop), x now; then at the peak of
    # - self-attention: its input, q, k, v, the result
    # - cross-attention: the result of self-attention, its input, q, the result, the projection
    # - the first layer of the ffn: the result of self-attention, its input; its second layer: the output
    # - the gated sum after the ffn: y, the sum
    attention, text = 2 + 5, 3 + 5
    beside = 3 * width if "vace_layers" in dit else 0  # the branch's hidden states, a hint, and what it is added to
    hidden = beside + max(attention * width, text * width, 5 * width + ffn, 4 * width + copies * ffn, 5 * width + ffn)
    context = dit.text_len + (CLIP_TOKENS * kind_of(spec).clip_images if "clip" in spec.files else 0)
    texts = context * dit.dim * 6 + dit.text_len * dit.text_dim * 2
    rope = all_tokens * dit.dim // dit.num_heads // 2 * 8
    return (hidden + texts) * itemsize + rope + (0 if on_cpu else _SLICE_BYTES)


def text_bytes(spec: EasyDict, prompts: int, tokens: int, itemsize: int) -> int:
    """Of the text encoder, for so many prompts of `tokens` tokens each. Attention is eager: all scores are made."""
    text = spec.text
    rows = prompts * tokens
    scores = prompts * text.num_heads * tokens * tokens
    attention = rows * (2 * text.dim + 4 * text.dim_attn) * itemsize + scores * (2 * itemsize + 2 * 4)
    feed_forward = rows * (3 * text.dim * itemsize + 4 * text.dim_ffn * itemsize)
    return max(attention, feed_forward)


def clip_bytes(images: int) -> int:
    """Of the image encoder (ViT-H/14, fp16 or bf16): hidden states of all its 32 layers are kept."""
    return images * CLIP_TOKENS * CLIP_DIM * 2 * (33 + 12) + images * 3 * 224 * 224 * 16


class _Tally:
    """Values alive: `kept` from chunk to chunk, and the most that one layer needs besides."""

    def __init__(self, is_first: bool):
        self.is_first, self.kept, self.peak = is_first, 0, 0

    def need(self, *live: int) -> None:
        self.peak = max(self.peak, sum(live))

    def window(self, one: int, frames: int) -> int:
        """Values of the window of a causal convolution over `frames` maps of `one` values; it keeps the last two."""
        self.kept += _TAPS * one
        return (frames if self.is_first else frames + _TAPS) * one


def decode_values(vae: EasyDict, rows: int, columns: int, is_first: bool = False) -> int:
    """The most values that the decoder holds while it decodes one latent frame of rows x columns cells.

    is_first: the first frame, which has no past and stays one frame.
    """
    tally = _Tally(is_first)
    widths = [vae.get("dec_dim", vae.dim) * mult for mult in [vae.dim_mult[-1], *reversed(vae.dim_mult)]]
    area, frames, width = rows * columns, 1, widths[0]
    tally.need(area * vae.z_dim, tally.window(area * vae.z_dim, 1), area * width)
    _residual(tally, width, width, area, 1)
    tally.need(area * width * 7)  # attention: x, norm, q k v, the result, the projection
    _residual(tally, width, width, area, 1)
    is_new = vae.version == "2.2"
    for stage, temporal in enumerate([*reversed(vae.temporal_downsample), None]):
        halved = not is_new and stage > 0
        inputs, outputs = widths[stage] // 2 if halved else widths[stage], widths[stage + 1]
        held = area * frames * widths[stage] if is_new else 0  # for the shortcut of the stage
        for block in range(vae.num_res_blocks + 1):
            _residual(tally, inputs if block == 0 else outputs, outputs, area, frames, held if block else 0)
        if temporal is None:
            continue
        made = outputs if is_new else outputs // 2
        before = frames
        frames = _upsample(tally, outputs, made, area, frames, temporal, held)
        area *= 4
        if is_new:  # the shortcut's copies: repeated, then in the order of space
            whole = area * frames * made
            tally.need(held, whole, 2 * whole * (2 if tally.is_first and temporal else 1))
        del before
    out = 12 if is_new else 3
    one = area * widths[-1]
    tally.need(one * frames, tally.window(one, frames), area * frames * out * 3)
    return tally.kept + tally.peak


def _residual(tally: _Tally, inputs: int, outputs: int, area: int, frames: int, held: int = 0) -> None:
    x, y = area * frames * inputs, area * frames * outputs
    first, second = tally.window(area * inputs, frames), tally.window(area * outputs, frames)
    shortcut = y if inputs != outputs else 0
    tally.need(held, x, max(first + y, y + second, y + shortcut))


def _upsample(tally: _Tally, inputs: int, outputs: int, area: int, frames: int, temporal: bool, held: int) -> int:
    """Returns the frames that come out."""
    x = area * frames * inputs
    if temporal:
        window = tally.window(area * inputs, frames)
        if not tally.is_first:
            tally.need(held, x, window, 2 * x)
            tally.need(held, x, 2 * x, 2 * x)  # the convolution's output, and in the order of frames
            x, frames = 3 * x, 2 * frames  # the input, still held, and the doubled frames
    quarter = area * frames * outputs
    tally.need(held, x, 4 * quarter, 2 * quarter)  # the enlarged map, and one of its four kinds of pixels
    return frames


def encode_values(vae: EasyDict, rows: int, columns: int, is_first: bool = False) -> int:
    """The most values that the encoder holds while it encodes four frames (is_first: one) of rows x columns pixels."""
    tally = _Tally(is_first)
    is_new = vae.version == "2.2"
    pixels = 12 if is_new else 3
    area, frames = rows * columns // (4 if is_new else 1), 1 if is_first else 4
    widths = [vae.dim * mult for mult in [1, *vae.dim_mult]]
    chunk = area * frames * pixels
    tally.need(chunk, tally.window(area * pixels, frames), area * frames * widths[0])
    for stage, temporal in enumerate([*vae.temporal_downsample, None]):
        inputs, outputs = widths[stage], widths[stage + 1]
        held = chunk + (area * frames * inputs if is_new else 0)
        for block in range(vae.num_res_blocks):
            _residual(tally, inputs if block == 0 else outputs, outputs, area, frames, held)
        if temporal is None:
            continue
        x = area * frames * outputs
        tally.need(held, 2 * x, x // 4 * 2)  # padded, then a quarter of its size
        area //= 4
        if temporal:
            one = area * outputs
            tally.kept += one
            tally.need(held, one * frames, one * (frames + 1), one * frames // 2)
            frames = max(1, frames // 2)
    width = widths[-1]
    _residual(tally, width, width, area, frames, chunk)
    tally.need(chunk, area * width * 7)
    _residual(tally, width, width, area, frames, chunk)
    return tally.kept + tally.peak
