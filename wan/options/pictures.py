"""The images that a video starts from, and its size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import cover_size, i2v_size, ti2v_size
from wan.errors import UsageError
from wan.options.names import STORED_PICTURES
from wan.options.values import or_default, shown
from wan.pictures import read_image
from wan.tasks import embedded_checkpoint, grid_px


def read_images(spec: EasyDict, get: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(absolute path, width, height) of the first and the last image; each is read once here, to be sure it can be."""
    if get["image"] and get["first_frame"] and get["image"] != get["first_frame"]:
        raise UsageError("--image and --first_frame both name the first image; give one")
    first, last = get["image"] or get["first_frame"], get["last_frame"]
    if spec.kind == "t2v" and (first or last):
        raise UsageError(f"{spec.name} makes video from text alone; for an image use an i2v, flf2v or ti2v task")
    if not first and "image" in spec:
        first = str(embedded_checkpoint(spec) / spec.image)
    if spec.kind == "i2v" and not first:
        raise UsageError(f"{spec.name} needs --image FILE")
    if spec.kind == "flf2v" and not (first and last):
        raise UsageError(f"{spec.name} needs --first_frame FILE and --last_frame FILE")
    if spec.kind != "flf2v" and last:
        raise UsageError(f"--last_frame is for flf2v tasks, not for {spec.name}")
    images = []
    for path in filter(None, (first, last)):
        height, width, _ = read_image(path).shape
        images.append((str(Path(path).resolve()) if isinstance(path, str) else path, width, height))
    if last:
        (_, width, height), (_, last_width, last_height) = images
        try:
            cover_size(height, width, last_height, last_width)
        except UsageError as error:
            raise UsageError(f"--last_frame: {error}") from error
    return images


def given_pictures(get: Mapping[str, Any], images: list[tuple[str, int, int]]) -> dict[str, str]:
    """The images that the user gave, and no embedded task's own, by flag."""
    given = images if get["image"] or get["first_frame"] else []
    return {flag: path for flag, (path, _, _) in zip(STORED_PICTURES, given)}


def check_size(spec: EasyDict, value: Any, images: list, warnings: list[str]) -> tuple[str, int, int]:
    """(asked "W*H", width, height) in px."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[*xX]\s*(\d{1,5})\s*", str(or_default(value, spec.sampling.size)))
    if not match:
        raise UsageError(f"--size must be WIDTH*HEIGHT or WIDTHxHEIGHT in pixels, such as 832*480, not {shown(value)}")
    width, height = int(match[1]), int(match[2])
    grid = grid_px(spec)
    if width % grid or height % grid or not width or not height:
        near = "*".join(str(max(grid, round(side / grid) * grid)) for side in (width, height))
        raise UsageError(
            f"--size {width}*{height}: {spec.name} needs multiples of {grid} pixels; the nearest is {near}"
        )
    size = f"{width}*{height}"
    if spec.sampling.sizes and size not in spec.sampling.sizes:
        warnings.append(f"size {size} is not an official size of {spec.name} ({', '.join(spec.sampling.sizes)})")
    if images:
        _, image_width, image_height = images[0]
        if spec.kind == "ti2v":
            height, width = ti2v_size(width * height, image_height, image_width, multiple=grid)
        else:
            stride = spec.vae_stride[1]
            height, width = i2v_size(width * height, image_height, image_width, stride=stride, patch=grid // stride)
    return size, width, height
