"""Animate cases: what becomes of a face (motion encoder, face encoder), how inputs are prepared, and whole films."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from tests.golden.cases import Case
from tests.golden.checks import Check, close, exact
from tests.golden.runners import loop
from tests.golden.runners import model as model_runner
from wan.conditioning.sizes import padded_length, ping_pong

TOLERANCE = 1e-4
PIXEL_TOLERANCE, VAE_TOLERANCE, LOOP_TOLERANCE, FRAMES_TOLERANCE = 1e-5, 1e-4, 5e-4, 3e-4


def matches_motion_encoder(case: Case) -> bool:
    return {"size", "style_dim", "motion_dim"} == case.config.keys()


def run_motion_encoder(case: Case) -> list[Check]:
    from wan.models.dit.adapters.motion import MotionEncoder

    encoder = MotionEncoder(**case.config)
    encoder.load_state_dict({**encoder.state_dict(), **case.group("weights")})  # its filters have values of their own
    faces, expected = case.tensors["inputs/face_images"], case.group("outputs")
    results = {
        "appearance": encoder.appearance(faces),
        "motion_feat": encoder.coefficients(faces),
        "direction_basis": encoder.dec["direction"].basis(),
        "motion": encoder(faces),
    }
    return [close(name, results[name], wanted, TOLERANCE) for name, wanted in expected.items()]


def matches_face_encoder(case: Case) -> bool:
    return {"in_dim", "hidden_dim", "num_heads"} == case.config.keys() and bool(case.tags("outputs/face_tokens"))


def run_face_encoder(case: Case) -> list[Check]:
    from wan.models.dit.adapters.animate import FaceEncoder

    encoder = FaceEncoder(**case.config)
    encoder.load_state_dict(case.group("weights"))
    tokens = encoder(case.tensors["inputs/motion"])
    return [close("face_tokens", tokens, case.tensors["outputs/face_tokens"], TOLERANCE)]


def matches_preprocess(case: Case) -> bool:
    return {"padding_resize_hw", "valid_len", "inputs_padding"} <= case.meta.get("args", {}).keys()


def run_preprocess(case: Case) -> list[Check]:
    from wan.conditioning.animate import clip_mask
    from wan.conditioning.letterbox import letterbox

    args, expected, checks = case.meta["args"], case.group("outputs"), []
    for tag in case.tags("outputs/padded_u8_"):
        image = letterbox(case.tensors[f"inputs/image_u8_{tag}"].numpy(), *args["padding_resize_hw"])
        checks.append(exact(f"padded_{tag}", torch.from_numpy(image), expected[f"padded_u8_{tag}"]))
    for name in ("mask_len", "mask_replace_len"):
        given = case.tensors["inputs/mask_pixel_values"][0] if "replace" in name else None
        for tag in case.tags(f"outputs/{name}"):
            wanted = expected[name + tag]
            frames = 4 * (wanted.shape[1] - 1) + 1
            checks.append(exact(name + tag, clip_mask(frames, *wanted.shape[2:], known=int(tag), given=given), wanted))
    for row in args["valid_len"]:
        length = padded_length(row["real_len"], row["clip_len"], row["overlap"])
        checks.append(exact(f"length of {row['real_len']}", length, row["target_len"]))
    for row in args["inputs_padding"]:
        ids = [ping_pong(index, row["length"]) for index in range(row["target"])]
        checks.append(exact(f"frames of {row['length']}", ids, row["indices"]))
    return checks


def matches_film(case: Case) -> bool:
    return case.meta.get("pipeline") == "animate" and model_runner.is_wan_model(case)


def run_film(case: Case) -> list[Check]:
    from wan.conditioning.animate import AnimateFilm, AnimateInputs

    generate, derived, expected = case.meta["generate"], case.meta["derived"], case.group("outputs")
    videos = {name: _video(case, name) for name in ("pose", "face", "bg", "mask")}
    height, width = videos["pose"].pixels.shape[1:3]
    sizes = {"height": height, "width": width, "frame_num": generate["clip_len"], "trim_first_frames": 0}
    inputs = AnimateInputs(case.tensors["inputs/ref_image"].numpy(), *videos.values())
    film = AnimateFilm(SimpleNamespace(seed=generate["seed"], **sizes), inputs, generate["refert_num"])
    models, vae, frames = loop.networks(case), loop.vae_of(case), []
    checks = [exact("clips", film.clips, len(derived["clips"]))]
    for clip, told in enumerate(derived["clips"]):
        condition = film.condition(clip, vae.encode)
        noise = film.noise(clip, (1, *derived["latent_shape"]))
        condition = replace(condition, clip_fea=case.tensors["inputs/clip_fea"])
        solver, trace = loop.sample(case, models, condition, noise[0])
        decoded = vae.decode(film.latents(clip, trace.latents[-1][None, :, condition.extra_frames :]))[0]
        checks.append(exact(f"frames of clip {clip}", decoded.shape[1], told["decoded_frames"]))
        frames.append(film.frames(clip, decoded.clone()).clamp(-1, 1))
        wanted = {key.partition(".")[2]: value for key, value in expected.items() if key.startswith(f"clip{clip}.")}
        got = {"y": condition.y[0], "pose_latents": condition.pose[0], "latents": torch.stack(trace.latents)}
        got |= {"noise_pred": torch.stack(trace.noise_pred), "frames": decoded[:, -told["kept_frames"] :].clamp(-1, 1)}
        tolerances = {"latents": LOOP_TOLERANCE, "noise_pred": LOOP_TOLERANCE, "frames": FRAMES_TOLERANCE}
        for name, value in got.items():
            checks.append(close(f"clip{clip}.{name}", value, wanted[name], tolerances.get(name, VAE_TOLERANCE)))
    whole = [value for key, value in sorted(expected.items()) if key.endswith(".frames")]
    film_wanted = torch.cat(whole, dim=1)[:, : derived["real_frames"]]
    checks += [
        close("film", torch.cat(frames, dim=1), film_wanted, FRAMES_TOLERANCE),
        close("clip_input", condition.clip_images[0], expected["clip_input"], PIXEL_TOLERANCE),
        exact("timesteps", solver.timesteps, expected["timesteps"]),
        close("sigmas", solver.sigmas, expected["sigmas"], loop.SIGMA_TOLERANCE),
    ]
    return checks


@dataclass(frozen=True)
class _Recorded:
    """A recorded video as an opened file. pixels: uint8 [T, H, W, 3]."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def frames(self, ids):
        return iter(self.pixels[ids])


def _video(case: Case, name: str) -> _Recorded | None:
    low = f"{name}_video_lowres"
    recorded = case.tensors.get(f"inputs/{low}", case.tensors.get(f"inputs/{name}_video"))
    if recorded is None:
        return None
    pixels = recorded.numpy()
    if pixels.ndim == 3:  # one channel for all
        pixels = pixels[..., None].repeat(3, axis=-1)
    times = case.meta.get("input_upsample", {}).get(low, 1)
    return _Recorded(pixels.repeat(times, axis=1).repeat(times, axis=2))
