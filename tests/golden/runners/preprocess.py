"""Preprocessing cases: image -> size, pixels, masks and noise of i2v, flf2v, ti2v and vace."""

from __future__ import annotations

import re

import torch

from tests.golden.cases import Case
from tests.golden.checks import Check, close, exact
from wan.conditioning.condition import Condition
from wan.conditioning.image import conditioning_video, crop_last, frame_mask, resize, to_pixels
from wan.conditioning.latent import FrameCondition, cover
from wan.conditioning.sizes import frame_ids, i2v_size, latent_shape, ti2v_size, vace_size
from wan.conditioning.vace import mask_channels

TOLERANCE = 1e-4


def matches_i2v(case: Case) -> bool:
    return _has(case, "inputs/image_u8_", "outputs/pixels_first_")


def matches_flf2v(case: Case) -> bool:
    return _has(case, "inputs/first_u8_", "inputs/last_u8_", "outputs/pixels_first_")


def matches_ti2v(case: Case) -> bool:
    # s2v cases have the same images and pixels, but neither a mask nor a multiple-of-32 size in their rows
    rows = case.meta.get("args", {}).get("rows", [])
    return _has(case, "inputs/image_u8_", "outputs/pixels_") and bool(rows) and all("ow" in row for row in rows)


def matches_vace(case: Case) -> bool:
    return _has(case, "inputs/mask", "outputs/mask_latent") and "video_rows" in case.meta.get("args", {})


def run_i2v(case: Case) -> list[Check]:
    checks = []
    for row, tag in _rows(case):
        image = case.tensors[f"inputs/image_u8_{row['image']}"]
        frames = row.get("frame_num", case.meta["args"]["frame_num"])
        height, width = i2v_size(row["max_area"], *image.shape[:2])
        channels, *latent = latent_shape(16, frames, height, width, 8)
        checks.append(exact(f"size_{tag}", (height, width), (row["h"], row["w"])))
        checks.append(exact(f"latent_{tag}", tuple(latent[1:]), (row["lat_h"], row["lat_w"])))
        checks.append(exact(f"tokens_{tag}", latent[0] * latent[1] * latent[2] // 4, row["max_seq_len"]))
        pixels = resize(to_pixels(image.numpy()), height, width)
        checks += _stored(case, {f"pixels_first_{tag}": pixels, f"mask_{tag}": frame_mask(frames, *latent[1:])})
        checks += _noise(case, tag, (channels, *latent))
    return checks


def run_flf2v(case: Case) -> list[Check]:
    args, checks = case.meta["args"], []
    for index, row in enumerate(args["rows"]):
        first, last = (case.tensors[f"inputs/{which}_u8_{index}"].numpy() for which in ("first", "last"))
        frames = row.get("frame_num", args.get("frame_num"))
        height, width = i2v_size(row.get("max_area", args.get("max_area")), *first.shape[:2])
        _, *latent = latent_shape(16, frames, height, width, 8)
        last_pixels = crop_last(to_pixels(last), *first.shape[:2])
        checks.append(exact(f"latent_{index}", tuple(latent[1:]), (row["lat_h"], row["lat_w"])))
        checks.append(exact(f"tokens_{index}", latent[0] * latent[1] * latent[2] // 4, row["max_seq_len"]))
        checks.append(exact(f"clip_{index}", list(last_pixels.shape[1:]), row["last_frame_clip_input_hw"]))
        ends = [resize(picture, height, width) for picture in (to_pixels(first), last_pixels)]
        video = conditioning_video(ends, frames)
        checks += _stored(
            case,
            {
                f"pixels_first_{index}": video[:, 0],
                f"pixels_last_{index}": video[:, -1],
                f"clip_last_input_{index}": last_pixels[:, None],
                f"middle_abs_max_{index}": video[:, 1:-1].abs().max(),
            },
        )
        mask = case.tensors.get(f"outputs/mask_{index}")
        if mask is not None:  # the reference writes it for 81 frames, whatever the video's length
            ours = frame_mask(4 * (mask.shape[1] - 1) + 1, *mask.shape[2:], last=True)
            checks.append(close(f"mask_{index}", ours, mask, 0.0))
    return checks


def run_ti2v(case: Case) -> list[Check]:
    checks = []
    for row, tag in _rows(case):
        image = case.tensors[f"inputs/image_u8_{row['image']}"].numpy()
        frames = row.get("frame_num", case.meta["args"]["frame_num"])
        height, width = ti2v_size(row["max_area"], *image.shape[:2])
        shape = latent_shape(48, frames, height, width, 16)
        checks.append(exact(f"size_{tag}", (width, height), (row["ow"], row["oh"])))
        checks.append(exact(f"latent_{tag}", list(shape), row["noise_shape"]))
        checks.append(exact(f"tokens_{tag}", shape[1] * shape[2] * shape[3] // 4, row["seq_len"]))
        condition = FrameCondition(torch.zeros(shape[0], 1, *shape[2:]), num_latent_frames=shape[1])
        checks += _stored(
            case,
            # A latent of ones keeps a one exactly where the mask lets the noise through.
            {f"pixels_{tag}": cover(image, height, width), f"mask2_{tag}": condition.restore(torch.ones(shape))},
        )
        checks += _tokens(case, tag, condition) + _noise(case, tag, shape)
    return checks


def run_vace(case: Case) -> list[Check]:
    checks = []
    for index, row in enumerate(case.meta["args"]["video_rows"]):
        count, fps = row["n_frames"], row["fps"]
        size = vace_size(row["area"], row["seq_len"], count, row["in_h"], row["in_w"])
        checks.append(exact(f"size_{index}", size, (row["out_h"], row["out_w"], row["n_out"])))
        ids = frame_ids([frame / fps for frame in range(count)], count / fps, size[2])
        checks.append(exact(f"first_ids_{index}", ids[: len(row["first_ids"])], row["first_ids"]))
        checks.append(exact(f"last_ids_{index}", ids[-len(row["last_ids"]) :], row["last_ids"]))
    for key in case.tags("outputs/mask_latent"):
        wanted = case.tensors[f"outputs/mask_latent{key}"]
        latent = mask_channels(case.tensors["inputs/mask"], *wanted.shape[2:])
        references = wanted.new_zeros(wanted.shape[0], wanted.shape[1] - latent.shape[1], *wanted.shape[2:])
        checks.append(close(f"mask_latent{key}", torch.cat([references, latent], 1), wanted, 0.0))
    return checks


def _tokens(case: Case, tag: str, condition: Condition) -> list[Check]:
    return [
        close(key, condition.timesteps(float(t))[0], case.tensors[f"outputs/{key}"], 0.0)
        for key, t in _numbered(case, "timestep_tokens_t", tag)
    ]


def _noise(case: Case, tag: str, shape: tuple[int, ...]) -> list[Check]:
    return [
        exact(key, torch.randn(shape, generator=torch.Generator().manual_seed(seed)), case.tensors[f"outputs/{key}"])
        for key, seed in _numbered(case, "noise_seed", tag)
    ]


def _numbered(case: Case, prefix: str, tag: str) -> list[tuple[str, int]]:
    """The outputs called <prefix><number>_<tag>, with their number."""
    found = (re.fullmatch(rf"(\d+)_{tag}", rest) for rest in case.tags(f"outputs/{prefix}"))
    return [(prefix + hit[0], int(hit[1])) for hit in found if hit]


def _stored(case: Case, results: dict[str, torch.Tensor]) -> list[Check]:
    """Compares those results that the case has a recording of."""
    expected = case.group("outputs")
    return [close(name, result, expected[name], TOLERANCE) for name, result in results.items() if name in expected]


def _rows(case: Case) -> list[tuple[dict, str]]:
    """Each size row with the tag i_j of its tensors: image i, j-th area of that image."""
    seen: dict[int, int] = {}
    tagged = []
    for row in case.meta["args"]["rows"]:
        area_index = seen.get(row["image"], 0)
        seen[row["image"]] = area_index + 1
        tagged.append((row, f"{row['image']}_{area_index}"))
    return tagged


def _has(case: Case, *prefixes: str) -> bool:
    return all(case.tags(prefix) for prefix in prefixes)
