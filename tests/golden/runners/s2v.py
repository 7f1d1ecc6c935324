"""Speech to video: whole films, clip by clip, with the VAE of the case; and the preprocessing of pictures."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.golden.cases import Case
from tests.golden.checks import Check, close, exact
from tests.golden.runners.loop import (
    SIGMA_TOLERANCE,
    TOLERANCE,
    VAE_TOLERANCE,
    VIDEO_TOLERANCE,
    networks,
    sample,
    vae_of,
)
from wan.audio import clips_of
from wan.conditioning.s2v import S2VCondition, S2VFilm, pose_step, reference_pixels
from wan.conditioning.sizes import latent_shape, s2v_size
from wan.models.audio import frame_indices
from wan.solvers import Solver

AUDIO_TOLERANCE = PIXEL_TOLERANCE = 1e-5


def matches(case: Case) -> bool:
    return case.meta.get("pipeline") == "s2v"


def run(case: Case) -> list[Check]:
    generate, derived = case.meta["generate"], case.meta["derived"]
    expected, given = case.group("outputs"), case.group("inputs")
    image, count = given["ref_image"].numpy(), generate["infer_frames"]
    height, width = s2v_size(generate["max_area"], *image.shape[:2])
    heard = given["audio_features"].shape[1]
    clips = clips_of(heard, count, generate["fps"])
    features = given["audio_features"][:, frame_indices(heard, generate["fps"])].transpose(1, 2)
    checks = [
        exact("size", (height, width), (derived["height"], derived["width"])),
        exact("clips by audio", clips, derived["clips_by_audio"]),
    ]
    sample = SimpleNamespace(
        seed=generate["seed"],
        num_clip=min(generate["num_repeat"] or clips, clips),
        infer_frames=count,
        start_from_ref=generate["init_first_frame"],
        trim_first_frames=0,
    )
    pixels, pose = reference_pixels(image, height, width), _pose(case)
    film = S2VFilm(sample, pixels, pose=pose, motion_frames=generate["motion_frames"])
    film.heard = {0: features}
    vae, solver, made = vae_of(case), None, []
    checks.append(exact("clips", film.clips, len(derived["clips"])))
    for clip, told in enumerate(derived["clips"]):
        found, condition, solver = _clip(case, film, vae, clip)
        decoded = vae.decode(film.latents(clip, found["latents"][-1:]))[0].clamp(-1, 1)
        made.append((condition.audio[0], film.frames(clip, decoded)))
        first = sum(frames.shape[1] for _, frames in made[:-1])
        checks += [
            exact(f"clip{clip} decoded", decoded.shape[1], told["decoded_frames"]),
            exact(f"clip{clip} frames", [first, first + made[-1][1].shape[1]], told["frames"]),
            exact(f"clip{clip} motion is dropped", condition.motion is None, told["drop_motion_frames"]),
            exact(f"clip{clip} shape of pose", list(condition.pose.shape[1:]), told["cond_states_shape"]),
        ]
        for name, value in found.items():
            if (wanted := expected.get(f"clip{clip}.{name}")) is not None:
                tolerance = TOLERANCE if name in ("latents", "noise_pred") else VAE_TOLERANCE
                checks.append(close(f"clip{clip}.{name}", value, wanted, tolerance))
    audio, video = (torch.cat(parts, dim=-1 if index == 0 else 1) for index, parts in enumerate(zip(*made)))
    return [
        *checks,
        exact("timesteps", solver.timesteps, expected["timesteps"]),
        close("sigmas", solver.sigmas, expected["sigmas"], SIGMA_TOLERANCE),
        close("ref_latents", condition.reference[0], expected["ref_latents"], VAE_TOLERANCE),
        close("audio_emb", audio, expected["audio_emb"][..., : audio.shape[-1]], AUDIO_TOLERANCE),
        close("video", video, expected["video"], VIDEO_TOLERANCE),
    ]


def _clip(case: Case, film: S2VFilm, vae, clip: int) -> tuple[dict[str, torch.Tensor], S2VCondition, Solver]:
    """What one clip is made from and all that is made on the way, by the names of the case."""
    generate = case.meta["generate"]
    motion = vae.encode(film.state["motion"][None])  # which the first clip may leave out
    condition = film.condition(clip, vae.encode)
    height, width = film.reference.shape[1:]
    shape = latent_shape(case.meta["z_dim"], generate["infer_frames"] - 3, height, width, case.meta["vae_stride"][-1])
    solver, trace = sample(case, networks(case), condition, film.noise(clip, shape))
    found = {
        "latents": torch.stack(trace.latents),
        "noise_pred": torch.stack(trace.noise_pred),
        "motion_latents": (motion if condition.motion is None else condition.motion)[0],
        "cond_states": condition.pose[0],
    }
    return found, condition, solver


def _pose(case: Case):
    frames = case.tensors.get("inputs/pose_video")
    if frames is None:
        return None
    step = pose_step(case.meta["generate"]["pose_fps"], case.meta["generate"]["fps"])
    return lambda first, count: frames[first * step : (first + count) * step : step].numpy()


def matches_pixels(case: Case) -> bool:
    rows = case.meta.get("args", {}).get("rows", [])
    return bool(case.tags("inputs/image_u8_")) and bool(rows) and all("resized_w" in row for row in rows)


def run_pixels(case: Case) -> list[Check]:
    checks, seen = [], {}
    for row in case.meta["args"]["rows"]:
        index = seen[row["image"]] = seen.get(row["image"], -1) + 1
        image, tag = case.tensors[f"inputs/image_u8_{row['image']}"].numpy(), f"{row['image']}_{index}"
        size = s2v_size(row["target_area"], *image.shape[:2])
        checks.append(exact(f"size_{tag}", size, (row["out_h"], row["out_w"])))
        pixels, wanted = reference_pixels(image, *size), case.tensors[f"outputs/pixels_{tag}"]
        checks.append(close(f"pixels_{tag}", pixels, wanted, PIXEL_TOLERANCE))
    return checks
