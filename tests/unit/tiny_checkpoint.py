"""Checkpoints of random weights in the official layout and under the official names, small enough to run in a test."""

import copy
import json
import string
from pathlib import Path

import torch
from easydict import EasyDict
from safetensors.torch import save_file
from torch import Tensor

from wan.models.audio import audio_model
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.infer import AUDIO_LAYERS

CLIP_DIM, CLIP_TOKENS, CLIP_PATCH_PX = 1280, 257, 14  # what img_emb of the DiT wants


def shrunk(task: str) -> EasyDict:
    """The spec of an official task with the same structure and little width and depth."""
    spec = copy.deepcopy(load_task(task))
    # 512 stays where the text is followed by image tokens.
    text_len = 512 if "clip" in spec.files else 32
    spec.dit.update(text_len=text_len, dim=48, ffn_dim=64, freq_dim=32, text_dim=32, num_heads=2, num_layers=2)
    if "vace_layers" in spec.dit:
        spec.dit.update(num_layers=3, vace_layers=[0, 2])
    if "audio_inject_layers" in spec.dit:
        spec.dit.update(num_layers=3, audio_inject_layers=[0, 2], audio_dim=32, motion_frames=9)
    spec.vae.update(dim=4, num_res_blocks=1)
    if "dec_dim" in spec.vae:
        spec.vae.dec_dim = 4
    spec.text.update(vocab=256, dim=32, dim_attn=32, dim_ffn=48, num_heads=2, num_layers=1)
    return spec


def write_checkpoint(folder: Path, spec: EasyDict, seed: int = 0) -> Path:
    """All files of the task, random by `seed`, in `folder`; returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for subfolder in spec.get("experts", {"model": "."}).values():
            path = folder / subfolder / "diffusion_pytorch_model.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dit_state(spec), path)
        torch.save(WanVAE(**spec.vae).state_dict(), folder / spec.files.vae)
        torch.save(t5_state(spec), folder / spec.files.t5)
        if "clip" in spec.files:
            torch.save(clip_state(), folder / spec.files.clip)
        if "wav2vec" in spec.files:
            (folder / spec.files.wav2vec).mkdir()
            save_file(wav2vec_state(spec), folder / spec.files.wav2vec / "model.safetensors")
    write_tokenizer(folder / spec.files.tokenizer)
    return folder


def dit_state(spec: EasyDict) -> dict[str, Tensor]:
    """Official names -> random tensors of the task's transformer."""
    return {name: tensor.contiguous() for name, tensor in WanModel(**spec.dit).state_dict().items()}


def t5_state(spec: EasyDict) -> dict[str, Tensor]:
    """Official names -> random tensors of the task's text encoder."""
    text = spec.text
    state = {"token_embedding.weight": _matrix(text.vocab, text.dim), "norm.weight": torch.ones(text.dim)}
    for index in range(text.num_layers):
        block = {
            "norm1.weight": torch.ones(text.dim),
            **{f"attn.{one}.weight": _matrix(text.dim_attn, text.dim) for one in "qkv"},
            "attn.o.weight": _matrix(text.dim, text.dim_attn),
            "pos_embedding.embedding.weight": _matrix(text.num_buckets, text.num_heads),
            "norm2.weight": torch.ones(text.dim),
            "ffn.gate.0.weight": _matrix(text.dim_ffn, text.dim),
            "ffn.fc1.weight": _matrix(text.dim_ffn, text.dim),
            "ffn.fc2.weight": _matrix(text.dim, text.dim_ffn),
        }
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
    return state


def clip_state(layers: int = 2, mlp_dim: int = 64) -> dict[str, Tensor]:
    """Official names -> random tensors of an image encoder with ViT-H's width, in fp16 to keep the file small."""
    dim = CLIP_DIM
    state = {
        "visual.cls_embedding": torch.randn(1, 1, dim),
        "visual.pos_embedding": torch.randn(1, CLIP_TOKENS, dim),
        "visual.patch_embedding.weight": torch.randn(dim, 3, CLIP_PATCH_PX, CLIP_PATCH_PX) * 0.04,
        **_norm("visual.pre_norm"),
        **_norm("visual.post_norm"),
    }
    for index in range(layers):
        block = f"visual.transformer.{index}"
        state |= _norm(f"{block}.norm1") | _norm(f"{block}.norm2")
        shapes = {
            "attn.to_qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.0": (mlp_dim, dim),
            "mlp.2": (dim, mlp_dim),
        }
        for name, shape in shapes.items():
            state |= {f"{block}.{name}.weight": _matrix(*shape), f"{block}.{name}.bias": torch.zeros(shape[0])}
    return {name: tensor.half() for name, tensor in state.items()}


def wav2vec_state(spec: EasyDict) -> dict[str, Tensor]:
    """Names of transformers -> random tensors of an audio encoder, with the head that is not used."""
    shape = {"num_heads": 2, "conv_dim": 8, "position_width": 16, "position_groups": 4}
    model = audio_model(dim=spec.dit.audio_dim, dim_ffn=48, num_layers=AUDIO_LAYERS - 1, **shape)
    state = {}
    for name, one in model.state_dict().items():
        is_norm = "norm.weight" in name or name.endswith("original0")
        state[f"wav2vec2.{name}"] = torch.ones(one.shape) if is_norm else torch.randn(one.shape) * 0.2
    return state | {"lm_head.weight": torch.zeros(4, spec.dit.audio_dim)}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json that knows single characters: pad 0, end 1, unknown 2."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits]
    special = [
        {"id": index, "content": pieces[index], "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index in range(3)
    ]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in pieces]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def _norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(CLIP_DIM), f"{name}.bias": torch.zeros(CLIP_DIM)}
