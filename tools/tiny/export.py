"""Writes the trained weights as a checkpoint in the official Wan2.1 layout and under the official names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    dit = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights["dit"].items()}
    save_file(dit, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {"_class_name": "WanModel", **{key: value for key, value in spec.dit.items() if key != "patch_size"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ours = official_names(t5_names(spec.text.num_layers), "t5")
    torch.save({official: weights["t5"][name] for name, official in ours.items()}, folder / spec.files.t5)
    shutil.copy(trained / "vae.pth", folder / spec.files.vae)
    shutil.copytree(trained / spec.files.tokenizer, folder / spec.files.tokenizer, dirs_exist_ok=True)
