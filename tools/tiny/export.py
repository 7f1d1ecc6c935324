"""Writes the trained weights as checkpoints in the official layouts and under the official names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tools.tiny.world import Clip, from_start, picture
from wan.tasks import load_task
from wan.weights.names import official_names

_T5_BLOCK = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
_T5_BLOCK += ("pos_embedding.embedding",)


def t5_names(num_layers: int) -> list[str]:
    """Official names of the tensors of a UMT5 encoder."""
    blocks = [f"blocks.{i}.{part}.weight" for i in range(num_layers) for part in _T5_BLOCK]
    return ["token_embedding.weight", "norm.weight", *blocks]


def export(trained: Path, folder: Path) -> None:
    """From the folder that `train_vae` and `train_dit` wrote to the checkpoint `folder`. The DiT is stored in bf16."""
    spec = load_task("t2v-tiny")
    weights = torch.load(trained / "dit.pth", weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    _export_dit(weights["dit"], spec, folder)
    ours = official_names(t5_names(spec.text.num_layers), "t5")
    torch.save({official: weights["t5"][name] for name, official in ours.items()}, folder / spec.files.t5)
    shutil.copy(trained / "vae.pth", folder / spec.files.vae)
    shutil.copytree(trained / spec.files.tokenizer, folder / spec.files.tokenizer, dirs_exist_ok=True)


def export_i2v(trained: Path, folder: Path) -> None:
    """Both experts that `train_i2v` wrote, in bf16 and the Wan2.2 layout, and the first frame of the task's prompt."""
    spec = load_task("i2v-tiny")
    for expert, name in spec.experts.items():
        _export_dit(torch.load(trained / f"i2v_{expert}.pth", weights_only=True), spec, folder / name)
    clip = from_start(Clip("red", "circle", "right", "black", radius=0.17), 0.5, 0.5, travel=0.3)
    assert clip.prompt == spec.prompt
    width, height = map(int, spec.sampling.size.split("*"))
    Image.fromarray(picture(clip, width, height)).save(folder / spec.image, optimize=True)


def export_vace(trained: Path, folder: Path) -> None:
    """The branch that `train_vace` wrote, in bf16. The rest of the transformer is t2v-tiny's."""
    _export_dit(torch.load(trained / "vace.pth", weights_only=True), load_task("vace-tiny"), folder)


def _export_dit(weights: dict[str, torch.Tensor], spec, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in spec.dit.items() if key not in ("patch_size", "clip")}
    config = {"_class_name": "VaceWanModel" if spec.kind == "vace" else "WanModel", **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
