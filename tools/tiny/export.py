"""Writes the trained weights as checkpoints in the official layouts and under the official names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tools.tiny.sound import example_sound, write_wav
from tools.tiny.train_animate import example_act, write_inputs
from tools.tiny.world import Clip, from_start, picture
from wan.models.dit import WanModel
from wan.tasks import load_task
from wan.weights.containers.safetensors_file import REPLACES
from wan.weights.names import official_names

_CLASSES = {"vace": "VaceWanModel", "s2v": "WanModel_S2V", "animate": "WanAnimateModel"}  # official ones
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


def export_s2v(trained: Path, folder: Path) -> None:
    """What `train_s2v` wrote, in bf16, the audio encoder of `train_audio`, and the sound of the task's example. The
    rest of the transformer is t2v-tiny's."""
    spec = load_task("s2v-tiny")
    _export_dit(torch.load(trained / "s2v.pth", weights_only=True), spec, folder)
    shutil.copytree(trained / "wav2vec2", folder / spec.files.wav2vec, dirs_exist_ok=True)
    write_wav(folder / spec.audio, example_sound())


def export_animate(trained: Path, folder: Path) -> None:
    """What `train_animate` wrote, in bf16, and the task's example. The rest of the transformer is t2v-tiny's, whose
    patch embedding is replaced."""
    spec = load_task("animate-tiny")
    weights = torch.load(trained / "animate.pth", weights_only=True)
    weights |= {name: buffer for name, buffer in WanModel(**spec.dit).named_buffers()}  # the filters of the face's
    _export_dit(weights, spec, folder, replaces=[name for name in weights if name.startswith("patch_embedding.")])
    width, height = map(int, spec.sampling.size.split("*"))
    write_inputs(folder / spec.src_root_path, *example_act(), width, height, spec)


def _export_dit(weights: dict[str, torch.Tensor], spec, folder: Path, replaces: Sequence[str] = ()) -> None:
    """replaces: tensors that it has in place of its base's"""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt"} | ({REPLACES: " ".join(replaces)} if replaces else {})
    save_file(stored, folder / "diffusion_pytorch_model.safetensors", metadata=metadata)
    config = {key: value for key, value in spec.dit.items() if key not in ("patch_size", "clip")}
    config = {"_class_name": _CLASSES.get(spec.kind, "WanModel"), **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
