"""kind "model": one forward pass of the diffusion transformer, of all official classes."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from tests.golden.cases import Case
from tests.golden.checks import Check, close

TOLERANCE = 1e-4
# The types of each class; None: its cases tell none.
CLASSES = {"WanModel": ("t2v", "i2v", "flf2v", "ti2v"), "VaceWanModel": ("vace",)}
CLASSES |= {"WanModel_S2V": ("s2v",), "WanAnimateModel": (None,)}


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
    elif case.config["model_type"] == "s2v":
        inputs = _s2v_inputs(case)
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


def _s2v_inputs(case: Case) -> dict:
    call, motion = case.meta["call"], case.listed("inputs/motion_latents")
    parts = call.get("add_last_motion", 2) * case.config.get("add_last_motion", True)
    if case.config["enable_framepack"]:  # the nearest latents may be left out
        left_out = {0: 3, 1: 1, 2: 0}[parts]
        motion = [F.pad(one[:, : one.shape[1] - left_out], (0, 0, 0, 0, 0, left_out)) for one in motion]
    return {
        "ref_latents": case.listed("inputs/ref_latents"),
        "motion_latents": None if call.get("drop_motion_frames") else motion,
        "cond_states": case.listed("inputs/cond_states"),
        "audio_input": list(case.tensors["inputs/audio_input"]),
        "motion_frames": tuple(call.get("motion_frames", (17, 5))),
    }


def build(config: dict, weights: dict[str, torch.Tensor]):
    """The transformer of a case; settings that are not shapes (window_size, qk_norm, ...) are fixed in ours."""
    from wan.models.dit import WanModel

    # Wan2.1 and Wan2.2 call different networks "i2v"; which one a case has is told by its weights.
    config = {**config, "clip": any(key.startswith("img_emb.") for key in weights)}
    accepted = inspect.signature(WanModel.__init__).parameters
    model = WanModel(**{key: value for key, value in config.items() if key in accepted})
    model.load_state_dict(weights)
    return model.eval()
