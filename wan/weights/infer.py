"""What a checkpoint holds, told from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from wan.errors import SwanError, printable
from wan.weights.names import Rows, common_start, official_names
from wan.weights.source import Source, TensorInfo, config_beside

CLIP_DIM = 1280
AUDIO_LAYERS = 25  # of wav2vec2 that S2V looks at: what enters the first, and what leaves each
_RELEASED_LAYERS = {"audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]}  # not evenly spread
HEAD_DIM = 128  # of every released Wan transformer
HEADS_KEY = "wan.attention.head_count"  # in GGUF files that we write

# (model_type, clip, dim) -> release. The layer counts follow from the dim.
_RELEASES = {
    ("t2v", False, 1536): "the Wan2.1 t2v-1.3B transformer",
    ("t2v", False, 5120): "the Wan2.1 t2v-14B transformer or a Wan2.2 t2v-A14B expert",
    ("i2v", True, 5120): "the Wan2.1 i2v-14B transformer",
    ("i2v", False, 5120): "a Wan2.2 i2v-A14B expert",
    ("flf2v", True, 5120): "the Wan2.1 flf2v-14B transformer",
    ("ti2v", False, 3072): "the Wan2.2 ti2v-5B transformer",
    ("vace", False, 1536): "the Wan2.1 vace-1.3B transformer",
    ("vace", False, 5120): "the Wan2.1 vace-14B transformer",
    ("s2v", False, 5120): "the Wan2.2 s2v-14B transformer",
    ("animate", True, 5120): "the Wan2.2 animate-14B transformer",
}


def infer_dit_config(source: Source) -> dict[str, Any]:
    """Configuration of the Wan transformer in `source`, in the official terms.

    Keys, as `WanModel` takes them: model_type, patch_size, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim,
    num_heads, num_layers and clip (whether there is an `img_emb`: Wan2.1 i2v and flf2v, not Wan2.2's i2v); of VACE
    also vace_layers and vace_in_dim; of S2V audio_inject_layers, audio_dim, num_audio_token, cond_dim, enable_adain and
    enable_framepack; of Animate motion_encoder_dim, face_px, face_dim and motion_channels. The number of heads is not
    visible in shapes: it comes from the file's metadata (our GGUF files have it), a config.json beside it, else from
    the head width 128. Nor is where hints and audio go: it comes from a config.json, else it is as in the release, or
    evenly spread.
    Raises SwanError if this is no Wan transformer.
    """
    shapes = our_shapes(source, "dit")
    try:
        dim, in_dim, *patch_size = _patch_embedding(shapes, "patch_embedding.weight")
        config = {
            "patch_size": patch_size,
            "in_dim": in_dim,
            "dim": dim,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "out_dim": shapes["head.head.weight"][0] // max(math.prod(patch_size), 1),
        }
    except (KeyError, IndexError, ValueError) as error:
        lacks = f"it has no {error.args[0]}" if isinstance(error, KeyError) else "its tensors have other shapes"
        is_dit = "patch_embedding.weight" in shapes  # and identify would come back here
        raise SwanError(f"{source.describe()}: not a Wan transformer, {lacks}{looks_like(source, is_dit)}") from None
    config["num_layers"] = count(shapes, "blocks.")
    config["num_heads"] = told_heads(source, dim) or max(dim // HEAD_DIM, 1)
    config["clip"] = any(name.startswith("img_emb.") for name in shapes)
    config["model_type"] = _model_type(shapes, config)
    if config["model_type"] == "vace":
        config["vace_layers"] = _layers(source, "vace_layers", count(shapes, "vace_blocks."), config["num_layers"])
        config["vace_in_dim"] = _patch_embedding(shapes, "vace_patch_embedding.weight")[1]
    if config["model_type"] == "s2v":
        config |= _s2v_config(source, shapes, config)
    if config["model_type"] == "animate":
        config |= _animate_config(shapes)
    return config


def _s2v_config(source: Source, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Any]:
    count_injected = count(shapes, "audio_injector.injector.")
    local = shapes.get("casual_audio_encoder.encoder.conv1_local.conv.weight", (0, 0))
    return {
        "audio_inject_layers": _layers(source, "audio_inject_layers", count_injected, config["num_layers"]),
        "audio_dim": local[1],
        "num_audio_token": local[0] // max(config["dim"] // 4, 1),
        "cond_dim": _patch_embedding(shapes, "cond_encoder.weight")[1] if "cond_encoder.weight" in shapes else 0,
        "enable_adain": any(name.startswith("audio_injector.injector_adain_layers.") for name in shapes),
        "enable_framepack": any(name.startswith("frame_packer.") for name in shapes),
    }


def _animate_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    convs = "motion_encoder.enc.net_app.convs."
    last = count(shapes, convs) - 1  # looks at 4x4 pixels, of a picture that each between it and the first has halved
    return {
        "motion_encoder_dim": shapes.get("motion_encoder.dec.direction.weight", (0,))[0],
        "face_px": 4 << max(last - 1, 0),
        "face_dim": shapes.get("face_encoder.conv2.conv.weight", (0,))[0],
        "motion_channels": shapes.get(f"{convs}{last}.weight", (0, 0))[1],
    }


def infer_vae_config(source: Source) -> dict[str, Any]:
    """Configuration of the VAE in `source`, as far as shapes tell it, as `WanVAE` or `TAE` takes it.

    Of a Wan VAE version, z_dim, dim and dec_dim: LightVAE has its names and narrower layers. Of a TAE z_dim,
    patch_size, widths, encoder_width and, by the name of the file, unscaled: LightTAE's, which are called so, hold
    latents as the Wan VAE makes them, others as the diffusion model sees them (behaviour of LightX2V).
    Raises SwanError if this is no VAE that is read.
    """
    shapes = our_shapes(source, "vae")
    try:
        if "decoder.1.weight" in shapes:
            return _tae_config(source, shapes)
        ends = {"dim": "encoder.conv1.bias", "dec_dim": "decoder.head.0.gamma", "z_dim": "conv2.bias"}
        is_22 = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
        return {"version": "2.2" if is_22 else "2.1"} | {key: math.prod(shapes[name]) for key, name in ends.items()}
    except (KeyError, IndexError):
        found = looks_like(source)
    if "decoder.1.conv.0.weight" in shapes:
        raise SwanError(f"{source.describe()}: a TAE of the layout Super, which is not read; the plain one is")
    read = "those of Wan2.1 and Wan2.2, LightVAE, TAEHV and LightTAE are, LightVAE Pro and Lite are not"
    raise SwanError(f"{source.describe()}: not a VAE that is read ({read}){found}")


def _tae_config(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    widths = [shapes[f"decoder.{block}.conv.0.bias"][0] for block in (3, 9, 15)]
    return {
        "z_dim": shapes["decoder.1.weight"][1],
        "patch_size": math.isqrt(shapes["decoder.22.bias"][0] // 3),
        "widths": [*widths, shapes["decoder.22.weight"][1]],
        "encoder_width": shapes.get("encoder.0.bias", (0,))[0],
        "unscaled": any("lighttae" in path.name.lower() for path in source.paths),
    }


def vae_config(source: Source, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the VAE in `source`: what shapes do not tell is as the task `spec` has it.

    Raises SwanError if this is no VAE, or one of other latents than the task's.
    """
    told = infer_vae_config(source)
    stride = 8 * (told["patch_size"] if "widths" in told else 2 if told["version"] == "2.2" else 1)
    if (told["z_dim"], stride) != (spec["vae"]["z_dim"], spec["vae_stride"][1]):
        needs = f"z {spec['vae']['z_dim']} and {spec['vae_stride'][1]} pixels a latent"
        raise SwanError(f"{source.describe()}: holds {identify(source)}; task {spec['name']} needs {needs}")
    return told if "widths" in told else {**spec["vae"], **told}


def identify(source: Source) -> str | None:
    """What the file looks like, in words ("a Wan2.1 VAE (z 16, width 96)"), or None if it cannot be told."""
    try:
        return _identify(source)
    except (SwanError, ValueError, IndexError):
        return None  # a mixture of layouts, or the right names with unheard-of shapes


def looks_like(source: Source, unknown: bool = False) -> str:
    """The end of an error message: "; the file looks like ...", or with what its names begin; empty if neither can be
    told."""
    if found := None if unknown else identify(source):
        return f"; the file looks like {found}"
    start = common_start(source.keys())
    return f"; its names begin with {printable(start)}" if start else ""


def _identify(source: Source) -> str | None:
    keys = source.keys()
    if any(re.search(r"\.lora_(A|B|down|up)\.|\.diff(_b)?$", key) for key in keys):
        return "a LoRA"
    dit = our_shapes(source, "dit")
    if {"patch_embedding.weight", "blocks.0.ffn.0.weight", "head.head.weight"} <= dit.keys():
        return describe_dit(source)
    vae = our_shapes(source, "vae")
    if {"encoder.conv1.weight", "conv2.weight"} <= vae.keys():
        conv1, z_dim = vae["encoder.conv1.weight"], vae["conv2.weight"][0]
        return f"a Wan{'2.2' if conv1[1] == 12 else '2.1'} VAE (z {z_dim}, width {conv1[0]})"
    t5 = our_shapes(source, "t5")
    if {"shared.weight", "encoder.final_layer_norm.weight"} <= t5.keys():
        layers = count(t5, "encoder.block.")
        vocab, dim = t5["shared.weight"]
        size = "the umt5-xxl encoder" if (vocab, dim, layers) == (256384, 4096, 24) else "a T5 encoder"
        return f"{size} (vocabulary {vocab}, dim {dim}, {layers} layers)"
    clip = our_shapes(source, "clip")
    if "embeddings.class_embedding" in clip:
        dim, layers = clip["embeddings.class_embedding"][-1], count(clip, "encoder.layers.")
        return f"a CLIP image encoder (dim {dim}, {layers} layers)"
    audio = our_shapes(source, "wav2vec")
    if "feature_projection.projection.weight" in audio:
        dim, layers = audio["feature_projection.projection.weight"][0], count(audio, "encoder.layers.")
        return f"a wav2vec2 audio encoder (dim {dim}, {layers} layers)"
    if "decoder.1.weight" in vae:
        config = _tae_config(source, vae)
        return f"a tiny VAE (TAE, z {config['z_dim']}, widths {', '.join(map(str, config['widths']))})"
    return None


def check_dit(source: Source, spec: Mapping[str, Any]) -> None:
    """Check that `source` holds the transformer of task `spec` (`name`, `dit`, `files`), before anything is loaded.

    Raises SwanError that says what the file holds and what the task needs.
    """
    _check_scales(source)
    if needs := misfits(infer_dit_config(source), spec):
        raise SwanError(
            f"{source.describe()}: holds {describe_dit(source)}; task {spec['name']} needs {', '.join(needs)}"
        )


def misfits(held: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """What the task needs where a transformer has something else, see `infer_dit_config`."""
    wanted = dict(spec["dit"])
    for layers in ("vace_layers", "audio_inject_layers"):
        if len(held.get(layers, ())) == len(wanted.get(layers, ())):
            wanted.pop(layers, None)  # how many is seen, where they go is the task's to say
    compared = [key for key in held if key in wanted and key not in ("num_heads", "clip")]
    needs = [f"{key} {wanted[key]}" for key in compared if held[key] != wanted[key]]
    wants_clip = bool(spec.get("files", {}).get("clip"))
    if held["clip"] != wants_clip:
        needs.append(f"{'an' if wants_clip else 'no'} image embedding (img_emb)")
    return needs


def check_encoder(source: Source, component: str, spec: Mapping[str, Any]) -> None:
    """Check that `source` holds the text ("t5"), image ("clip") or audio ("wav2vec") encoder whose output task `spec`
    reads.

    Raises SwanError that says what the file holds and what the task needs.
    """
    _check_scales(source)
    kind, table, dim = {
        "t5": ("UMT5", "shared.weight", spec["dit"]["text_dim"]),
        "clip": ("CLIP image", "embeddings.class_embedding", CLIP_DIM),
        "wav2vec": ("wav2vec2", "encoder.layer_norm.weight", spec["dit"].get("audio_dim")),
    }[component]
    shapes = our_shapes(source, component)
    if (shape := shapes.get(table)) is None:
        raise SwanError(f"{source.describe()}: not a {kind} encoder{looks_like(source)}")
    if component == "wav2vec" and count(shapes, "encoder.layers.") != AUDIO_LAYERS - 1:
        raise SwanError(
            f"{source.describe()}: holds {identify(source)}; task {spec['name']} needs {AUDIO_LAYERS - 1} layers"
        )
    if shape[-1] != dim:
        raise SwanError(f"{source.describe()}: holds {identify(source)}; task {spec['name']} needs dim {dim}")


def _check_scales(source: Source) -> None:
    from wan.weights.scaled import check_scales  # needs torch, which this module is read without

    check_scales(source)


def describe_dit(source: Source) -> str:
    """A transformer in words."""
    held = infer_dit_config(source)
    release = _RELEASES.get((held["model_type"], held["clip"], held["dim"]))
    name = release or f"a Wan {held['model_type']} transformer"
    return f"{name} (in_dim {held['in_dim']}, dim {held['dim']}, {held['num_layers']} layers)"


def _layers(source: Source, key: str, number: int, layers: int) -> list[int]:
    """The blocks after which something is added, so many of all, in order; key: how a config.json calls them."""
    for told in (config_beside(source).get(key), _RELEASED_LAYERS.get(key)):
        is_list = isinstance(told, list) and len(told) == number
        if is_list and all(type(one) is int and 0 <= one < layers for one in told):
            return told
    return list(range(0, layers, -(-layers // max(number, 1))))[:number]


def _patch_embedding(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """(dim, in_dim, frames, rows, columns) of a first layer, also where an exporter folded it to fewer axes."""
    shape = shapes[name]
    if not 1 < len(shape) < 5:
        return shape
    dim, patch = shapes["blocks.0.self_attn.norm_q.weight"][-1], (1, 2, 2)
    in_dim, rest = divmod(math.prod(shape), dim * math.prod(patch))
    if rest:
        raise ValueError(name)
    return dim, in_dim, *patch


def _model_type(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str:
    markers = {
        "vace": "vace_patch_embedding.weight",
        "s2v": "casual_audio_encoder.weights",
        "animate": "face_encoder.out_proj.weight",
        "flf2v": "img_emb.emb_pos",
    }
    for model_type, marker in markers.items():
        if marker in shapes:
            return model_type
    if config["in_dim"] != config["out_dim"]:
        return "i2v"  # latent frames and their mask are concatenated to the input
    return "ti2v" if config["in_dim"] == 48 else "t2v"


def our_shapes(source: Source, component: str) -> dict[str, tuple[int, ...]]:
    """Our names -> shapes of the tensors in the file. Raises SwanError if two tensors share a name."""
    return {ours: tensor_info(source, name).shape for ours, name in our_names(source, component).items()}


def our_names(source: Source, component: str) -> dict[str, str | Rows]:
    """`official_names` of the tensors in the file, which the error names."""
    try:
        return official_names(source.keys(), component)
    except SwanError as error:
        raise SwanError(f"{source.describe()}: {printable(error)}") from None


def tensor_info(source: Source, name: str | Rows) -> TensorInfo:
    """Shape and dtype of a tensor, or of some rows of one."""
    if isinstance(name, str):
        return source.info(name)
    whole = source.info(name.name)
    rows, *rest = whole.shape or (0,)
    # An uneven cut gets a shape that fits nothing.
    return TensorInfo((rows // name.count if rows % name.count == 0 else -1, *rest), whole.dtype)


def count(names: Iterable[str], prefix: str) -> int:
    """Number of layers: one more than the largest index that follows `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for name in names if (match := pattern.match(name))), default=0)


def encoder_heads(source: Source, dim: int, head_dim: int) -> int:
    """Heads of an encoder: by a config.json of transformers beside it, else of the usual width."""
    config = config_beside(source)
    told = config.get("num_attention_heads") if config.get("hidden_size") == dim else None
    return told or max(dim // head_dim, 1)


def no_encoder(source: Source, what: str, error: Exception) -> SwanError:
    """Why `source` is not `what`, by what went wrong when its shapes were looked at."""
    lacks = f"it has no {error.args[0]}" if isinstance(error, KeyError) else f"its tensors do not fit ({error})"
    return SwanError(f"{source.describe()}: not {what}, {lacks}{looks_like(source)}")


def told_heads(source: Source, dim: int) -> int | None:
    """Heads by the file itself, or by an official or diffusers config of a transformer of this width beside it."""
    told = getattr(source, "metadata", {}).get(HEADS_KEY)
    if isinstance(told, int) and told > 0 and dim % told == 0:
        return told
    config = config_beside(source)
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if config.get("dim") == dim:
        heads, width = config.get("num_heads", 0), None
        if type(heads) is not int or heads < 0 or heads and dim % heads:
            path = source.paths[0].parent / "config.json"
            raise SwanError(f"{path}: num_heads is {heads!r:.40}, which does not divide the dim {dim}")
        return heads or None
    is_told = type(heads) is int and type(width) is int and heads > 0 and heads * width == dim
    return heads if is_told else None
