"""Names in a file -> our names, by whole-path tables.

Inside, the transformer and the VAE carry the official Wan names; the encoders are transformers models and carry
transformers' names (5.x, that is CLIP without `vision_model.`). A dialect is a table of (path, our path) rules. A
path leaves out the last part (`weight`, `bias`, `gamma`, a quantiser's `weight_scale`, ...), which is kept as it is;
a rule for a bare parameter, such as `scale_shift_table`, holds the full name. In a path `{a}` and `{b}` stand for
numbers. On our side there are also `{flat}` = a * (b_count + 1) + b and `{last}` = b_count, `{flat_last}` likewise,
because the VAEs number their blocks through while diffusers nests them; `{next}` = a + 1 and `{end}` = b_count + 1,
because Animate's official convolutions are one list, the first and the last included.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from wan.errors import SwanError


class Rows(NamedTuple):
    """Part `index` of `count` equal parts of the first axis of tensor `name`."""

    name: str
    index: int
    count: int


# Whole path -> our whole path. A tuple on the right: the tensor is cut along its first axis.
Table = dict[str, "str | tuple[str, ...]"]


def _under(path: str, our_path: str, table: Table) -> Table:
    """The same rules, one level deeper."""
    result: Table = {}
    for key, value in table.items():
        ours = (value,) if isinstance(value, str) else value
        full = tuple(f"{our_path}.{one}" for one in ours)
        result[f"{path}.{key}"] = full[0] if isinstance(value, str) else full
    return result


_DIT_BLOCK: Table = {
    **{f"attn1.to_{one}": f"self_attn.{one}" for one in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    **{f"attn2.to_{one}": f"cross_attn.{one}" for one in "qkv"},
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}

_DIT_DIFFUSERS: Table = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    **_under("blocks.{a}", "blocks.{a}", _DIT_BLOCK),
    **_under("vace_blocks.{a}", "vace_blocks.{a}", _DIT_BLOCK),
    "vace_blocks.{a}.proj_in": "vace_blocks.{a}.before_proj",
    "vace_blocks.{a}.proj_out": "vace_blocks.{a}.after_proj",
}

_CONVS = "motion_encoder.enc.net_app.convs"
_FACE_DIFFUSERS: Table = {
    **{f"face_encoder.{one}": f"face_encoder.{one}.conv" for one in ("conv1_local", "conv2", "conv3")},
    **_under(
        "face_adapter.{a}",
        "face_adapter.fuser_blocks.{a}",
        {
            "to_q": "linear1_q",
            "to_kv": "linear1_kv",  # two in the file, see `joined`
            "to_out": "linear2",
            "norm_q": "q_norm",
            "norm_k": "k_norm",
        },
    ),
}
_ANIMATE_DIFFUSERS: Table = {
    "motion_encoder.conv_in": f"{_CONVS}.0.0",
    "motion_encoder.conv_in.act_fn": f"{_CONVS}.0.1",
    **_under(
        "motion_encoder.res_blocks.{a}",
        f"{_CONVS}.{{next}}",
        {
            "conv1": "conv1.0",
            "conv1.act_fn": "conv1.1",
            "conv2": "conv2.1",
            "conv2.act_fn": "conv2.2",
            "conv_skip": "skip.1",
        },
    ),
    "motion_encoder.conv_out": f"{_CONVS}.{{end}}",
    "motion_encoder.motion_network.{a}": "motion_encoder.enc.fc.{a}",
    "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
    **_FACE_DIFFUSERS,
}

_VAE_RESNET: Table = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_RESAMPLE: Table = {"resample.1": "resample.1", "time_conv": "time_conv"}
_VAE_ATTENTION: Table = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}


def _vae_ends(half: str) -> Table:
    return {
        f"{half}.conv_in": f"{half}.conv1",
        f"{half}.norm_out": f"{half}.head.0",
        f"{half}.conv_out": f"{half}.head.2",
        **_under(f"{half}.mid_block.resnets.0", f"{half}.middle.0", _VAE_RESNET),
        **_under(f"{half}.mid_block.attentions.0", f"{half}.middle.1", _VAE_ATTENTION),
        **_under(f"{half}.mid_block.resnets.1", f"{half}.middle.2", _VAE_RESNET),
    }


_VAE_COMMON: Table = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **_vae_ends("encoder"),
    **_vae_ends("decoder"),
}
_VAE_21_DIFFUSERS: Table = {
    **_VAE_COMMON,
    **_under("encoder.down_blocks.{a}", "encoder.downsamples.{a}", _VAE_RESNET | _VAE_RESAMPLE),
    **_under("decoder.up_blocks.{a}.resnets.{b}", "decoder.upsamples.{flat}", _VAE_RESNET),
    **_under("decoder.up_blocks.{a}.upsamplers.0", "decoder.upsamples.{flat_last}", _VAE_RESAMPLE),
}
_VAE_22_DIFFUSERS: Table = {
    **_VAE_COMMON,
    **_under("encoder.down_blocks.{a}.resnets.{b}", "encoder.downsamples.{a}.downsamples.{b}", _VAE_RESNET),
    **_under("encoder.down_blocks.{a}.downsampler", "encoder.downsamples.{a}.downsamples.{last}", _VAE_RESAMPLE),
    **_under("decoder.up_blocks.{a}.resnets.{b}", "decoder.upsamples.{a}.upsamples.{b}", _VAE_RESNET),
    **_under("decoder.up_blocks.{a}.upsampler", "decoder.upsamples.{a}.upsamples.{last}", _VAE_RESAMPLE),
}

_T5_OFFICIAL: Table = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    **_under(
        "blocks.{a}",
        "encoder.block.{a}",
        {
            "norm1": "layer.0.layer_norm",
            **{f"attn.{one}": f"layer.0.SelfAttention.{one}" for one in "qkvo"},
            "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
            "norm2": "layer.1.layer_norm",
            "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
            "ffn.fc1": "layer.1.DenseReluDense.wi_1",
            "ffn.fc2": "layer.1.DenseReluDense.wo",
        },
    ),
}
_T5_GGUF: Table = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    **_under(
        "enc.blk.{a}",
        "encoder.block.{a}",
        {
            "attn_norm": "layer.0.layer_norm",
            **{f"attn_{one}": f"layer.0.SelfAttention.{one}" for one in "qkvo"},
            "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
            "ffn_norm": "layer.1.layer_norm",
            "ffn_gate": "layer.1.DenseReluDense.wi_0",
            "ffn_up": "layer.1.DenseReluDense.wi_1",
            "ffn_down": "layer.1.DenseReluDense.wo",
        },
    ),
}

_CLIP_OFFICIAL: Table = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",
    "visual.post_norm": "post_layernorm",
    **_under(
        "visual.transformer.{a}",
        "encoder.layers.{a}",
        {
            "norm1": "layer_norm1",
            "attn.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.0": "mlp.fc1",
            "mlp.2": "mlp.fc2",
        },
    ),
}

_AUDIO_OLD: Table = {  # of a weight that is a direction and a length
    f"encoder.pos_conv_embed.conv.weight_{one}": f"encoder.pos_conv_embed.conv.parametrizations.weight.original{index}"
    for index, one in enumerate("gv")
}


class Dialect:
    """A way to name tensors. A file speaks it if `marker` is found in one of its names."""

    def __init__(self, marker: str, table: Table):
        self.marker = re.compile(marker)
        # Only rules with as many dots as a name can match it.
        self.rules: dict[int, list[tuple[re.Pattern, tuple[str, ...]]]] = {}
        for path, ours in table.items():
            pattern = re.escape(path).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
            targets = (ours,) if isinstance(ours, str) else ours
            self.rules.setdefault(path.count("."), []).append((re.compile(pattern), targets))

    @classmethod
    def back(cls, table: Table) -> Dialect:
        """From our names to those of a table."""
        return cls("", {str(ours): path for path, ours in table.items()})

    def translate(self, name: str, counts: dict[str, int]) -> tuple[str, ...]:
        """Our names for one name: itself if no rule matches, several if the tensor is cut up."""
        path, _, leaf = name.rpartition(".")
        for candidate, suffix in ((name, ""), (path, f".{leaf}")):
            for pattern, targets in self.rules.get(candidate.count("."), ()):
                if match := pattern.fullmatch(candidate):
                    numbers = _numbers(match.groupdict(), counts.get(name.split(".")[0], 0))
                    return tuple(target.format(**numbers) + suffix for target in targets)
        return (name,)


_DIALECTS: dict[str, tuple[Dialect, ...]] = {
    "dit": (Dialect(r"^condition_embedder\.", _DIT_DIFFUSERS | _ANIMATE_DIFFUSERS),),
    "vae": (
        Dialect(r"\.(down_blocks\.\d+\.(resnets|downsampler)|upsampler)\.", _VAE_22_DIFFUSERS),
        Dialect(r"^(en|de)coder\.conv_in\.", _VAE_21_DIFFUSERS),
    ),
    "t5": (
        Dialect(r"^token_embedding\.|^blocks\.0\.", _T5_OFFICIAL),
        Dialect(r"^enc\.blk\.", _T5_GGUF),
    ),
    "clip": (Dialect(r"^visual\.", _CLIP_OFFICIAL),),
    "wav2vec": (Dialect(r"\.weight_g$", _AUDIO_OLD),),  # of transformers before torch 2
}
_OURS = Dialect("", {})
_DIT_TO_DIFFUSERS, _T5_TO_OFFICIAL, _T5_TO_GGUF = map(
    Dialect.back, (_DIT_DIFFUSERS | _FACE_DIFFUSERS, _T5_OFFICIAL, _T5_GGUF)
)

# A single file for ComfyUI may hold every component, each under its prefix.
_PREFIXES = {
    "dit": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "t5": ("text_encoders.umt5xxl.transformer.",),
    "clip": ("vision_model.",),
    "wav2vec": ("wav2vec2.",),
}

# Any other prefix is what stands before names like these, as trainers and savers leave it: `model.`, `pipe.dit.`.
_LANDMARKS = {
    "dit": r"(vace_)?blocks\.\d+\.(self_attn|cross_attn|attn[12]|ffn|norm[23])\."
    r"|(patch|text|time)_embedding(\.|_proj\.)|(time_projection|condition_embedder|head|img_emb|proj_out)\.",
    "vae": r"(encoder|decoder)\.(conv1|conv_in|conv_out|norm_out|downsamples|upsamples|middle|head|mid_block)\."
    r"|(encoder|decoder)\.((down|up)_blocks|\d+)\.|(quant_conv|post_quant_conv|conv1|conv2)\.",
    "t5": r"encoder\.(block\.\d|final_layer_norm|embed_tokens)|shared\.|token_embedding\.|enc\.blk\.\d+\."
    r"|blocks\.\d+\.(attn|pos_embedding|norm[12]|ffn\.(gate|fc1|fc2))\.",
    "clip": r"visual\.(transformer|cls_embedding|pos_embedding|patch_embedding|pre_norm|post_norm)"
    r"|(embeddings|encoder\.layers\.\d+|pre_layrnorm|post_layernorm)\.",
    "wav2vec": r"(feature_extractor|feature_projection|encoder\.(layers\.\d+|pos_conv_embed|layer_norm))\.",
}
_MAX_PREFIX_PARTS = 8
# Parts of names that wrappers of modules put in, at the start or in the middle: torch.compile, DDP, FSDP.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# Tensors that are no part of the component and that no model here wants.
_IGNORED = {
    "dit": r"scaled_fp8",
    "vae": r"$^",
    "t5": r"spiece_model|scaled_fp8",
    "clip": r"(textual|text_model|visual_projection|text_projection)\..*|log_scale|logit_scale|visual\.head"
    r"|embeddings\.position_ids",
    "wav2vec": r"(lm_head|quantizer|project_q|project_hid)\..*|masked_spec_embed",
}


def official_names(keys: Iterable[str], component: str) -> dict[str, str | Rows]:
    """Our name -> the name in the file (or `Rows` of it) for every tensor of `component`, "dit", "vae", "t5",
    "clip" or "wav2vec".

    A name that no rule knows stays as it is, so that it is reported as unexpected by the name its file gives it.
    Raises SwanError if two tensors of the file would get the same name.
    """
    return dict(_official_names(tuple(keys), component))


@lru_cache(maxsize=16)  # a run asks some ten times for each of its files
def _official_names(keys: tuple[str, ...], component: str) -> dict[str, str | Rows]:
    found = _strip(list(keys), component)
    speaks = next((one for one in _DIALECTS[component] if any(map(one.marker.search, found))), _OURS)
    counts = _b_count(found)
    result: dict[str, str | Rows] = {}
    for name, file_name in found.items():
        ours = speaks.translate(name, counts)
        for index, our_name in enumerate(ours):
            if our_name in result:
                raise SwanError(f"{result[our_name]} and {file_name} are both {our_name}: the file mixes two layouts")
            result[our_name] = file_name if len(ours) == 1 else Rows(file_name, index, len(ours))
    if component == "t5" and "encoder.embed_tokens.weight" in result:  # the same table twice, or alone
        embedding = result.pop("encoder.embed_tokens.weight")
        result.setdefault("shared.weight", embedding)
    return result


def diffusers_dit_name(our_path: str) -> str:
    """What diffusers calls a module or parameter of the transformer: `blocks.0.attn1.to_q` for `blocks.0.self_attn.q`.

    A path that no rule knows stays as it is.
    """
    return _DIT_TO_DIFFUSERS.translate(our_path, {})[0]


def diffusers_halves(our_path: str) -> tuple[str, ...]:
    """What diffusers calls the two halves, one above the other, of a layer that it has in two: see `joined`."""
    name = diffusers_dit_name(our_path)
    return tuple(name.removesuffix("kv") + half for half in "kv") if name.endswith(".to_kv") else ()


def official_t5_name(our_name: str) -> str:
    """What the official file calls a tensor of the T5 encoder: `token_embedding.weight` for `shared.weight`."""
    return _T5_TO_OFFICIAL.translate(our_name, {})[0]


def gguf_t5_name(our_name: str) -> str:
    """What a GGUF file calls a tensor of the T5 encoder: `token_embd.weight` for `shared.weight`.

    A name that no rule knows stays as it is.
    """
    return _T5_TO_GGUF.translate(our_name, {})[0]


def without_wrappers(name: str) -> str:
    """`blocks.0.ffn.0.weight` for `_orig_mod.blocks.0._orig_mod.ffn.0.weight`."""
    parts = name.split(".")
    return name if _WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in _WRAPPERS)


def common_start(names: Iterable[str]) -> str:
    """With what all names begin, up to a dot where there is one; "" where they begin differently."""
    start = os.path.commonprefix(list(names))
    return start[: start.rfind(".") + 1] or start


def _strip(keys: list[str], component: str) -> dict[str, str]:
    """Name without the file's prefix -> name in the file, for the tensors that belong to the component."""
    plain = [without_wrappers(key) for key in keys]
    prefix = _prefix(plain, component)
    ignored = re.compile(_IGNORED[component])
    # A prefix of these is on some tensors only, and the others are none of the component.
    holds_others = prefix in _PREFIXES[component] and component not in ("clip", "wav2vec")
    found: dict[str, str] = {}
    for name, key in zip(plain, keys):
        if holds_others and not name.startswith(prefix):
            continue
        ours = name.removeprefix(prefix)
        if ours in found:
            raise SwanError(f"{found[ours]} and {key} are both {ours}: the file holds two copies; keep one")
        if not ignored.fullmatch(ours):
            found[ours] = key
    return found


def _prefix(names: list[str], component: str) -> str:
    """What stands before the component's names in this file."""
    known = next((one for one in _PREFIXES[component] if any(name.startswith(one) for name in names)), "")
    return known or _found_prefix(names, component)


def _found_prefix(names: list[str], component: str) -> str:
    """The prefix that makes most names those of the component, if most of what it stands before are such names."""
    landmark = re.compile(_LANDMARKS[component])
    counts: dict[str, int] = {}
    common = len(common_start(names))  # which may end in no dot: `dit/`
    for name in names:
        for start in {*_part_starts(name), common}:
            if landmark.match(name, start):
                counts[name[:start]] = counts.get(name[:start], 0) + 1
    best = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))[:2]
    if not best or 2 * counts[best[0]] < sum(name.startswith(best[0]) for name in names):
        return ""
    if len(best) == 2 and all(best) and counts[best[0]] == counts[best[1]] > 1 and not best[1].startswith(best[0]):
        raise SwanError(f"names begin with {best[0]} and {best[1]}: the file holds two of the kind; keep one of them")
    return best[0]


def _part_starts(name: str) -> list[int]:
    """Where the first parts of a name begin."""
    starts = [0]
    while len(starts) < _MAX_PREFIX_PARTS and (start := name.find(".", starts[-1]) + 1):
        starts.append(start)
    return starts


def _b_count(names: Iterable[str]) -> dict[str, int]:
    """Residual blocks per stage of a nested VAE, per half, and of a motion encoder: one more than the largest index."""
    counts: dict[str, int] = {}
    for name in names:
        match = re.match(
            r"(encoder|decoder|motion_encoder)\.(?:(?:down|up)_blocks\.\d+\.resnets|res_blocks)\.(\d+)\.", name
        )
        if match:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _numbers(groups: dict[str, str], b_count: int) -> dict[str, int]:
    a, b = int(groups.get("a", 0)), int(groups.get("b", 0))
    base = a * (b_count + 1)
    return {
        "a": a,
        "b": b,
        "flat": base + b,
        "last": b_count,
        "flat_last": base + b_count,
        "next": a + 1,
        "end": b_count + 1,
    }
