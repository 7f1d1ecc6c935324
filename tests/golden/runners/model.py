"""kind "model", classes WanModel, VaceWanModel and WanAnimateModel: one forward pass of the diffusion transformer."""

from __future__ import annotations

import inspect

import torch

from tests.golden.cases import Case
from tests.golden.checks import Check, close

TOLERANCE = 1e-4
# The types of each class; None: its cases tell none.
CLASSES = {"WanModel": ("t2v", "i2v", "flf2v", "ti2v"), "VaceWanModel": ("vace",), "WanAnimateModel": (None,)}


def matches(case: Case) -> bool:
    return case.meta.get("kind") == "model" and is_wan_model(case)


def is_wan_model(case: Case) -> bool:
    return case.config.get("model_type") in CLASSES.get(case.meta.get("class"), ())


def run(case: Case) -> list[Check]:
    model, inputs = build(case.config, case.group("weights")), {}
    if case.meta["class"] == "WanAnimateModel":
        scale = case.meta.get("input_upsample", {}).get("face_pixel_values_lowres", 1)
        face = case.tensors["inputs/face_pixel_values" + ("_lowres" if scale > 1 else "")]
        face = face.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        inputs = {"pose_latents": list(case.tensors["inputs/pose_latents"]), "face_pixel_values": list(face)}
    elif case.config["model_type"] == "vace":
        scale = case.meta["call"].get("vace_context_scale", 1.0)
        inputs = {"vace_context": case.listed("inputs/vace_context"), "vace_context_scale": scale}
    out = model(
        case.listed("inputs/x"),
        case.tensors["inputs/t"],
        case.listed("inputs/context"),
        y=case.listed("inputs/y"),
        clip_fea=case.tensors.get("inputs/clip_fea"),
        **inputs,
    )
    pairs = zip(out, case.listed("outputs/out"), strict=True)
    return [close(f"out.{i}", actual, wanted, TOLERANCE) for i, (actual, wanted) in enumerate(pairs)]


def build(config: dict, weights: dict[str, torch.Tensor]):
    """The transformer of a case; settings that are not shapes (window_size, qk_norm, ...) are fixed in ours."""
    from wan.models.dit import WanModel

    # Wan2.1 and Wan2.2 call different networks "i2v"; which one a case has is told by its weights.
    config = {**config, "clip": any(key.startswith("img_emb.") for key in weights)}
    accepted = inspect.signature(WanModel.__init__).parameters
    model = WanModel(**{key: value for key, value in config.items() if key in accepted})
    model.load_state_dict(weights)
    return model.eval()
