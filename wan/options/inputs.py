"""What a video is made from beside its text, and the size that it takes from that."""

from __future__ import annotations

import re
from typing import Any

from easydict import EasyDict

from wan.audio import AudioFile
from wan.errors import UsageError
from wan.options.names import STORED_PICTURES
from wan.options.sampling import check_frame_num
from wan.options.schema import Asked
from wan.options.values import or_default, shown
from wan.pictures import image_sha256
from wan.tasks import grid_px
from wan.tasks.kinds import KINDS, kind_of
from wan.video import VideoFile

INPUTS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.inputs))  # of any kind of task


def inputs_of(at: Asked) -> dict[str, Any]:
    """Those of the task, see `Kind.read`; made once."""
    return at.once("inputs", lambda: _read(at))


def _read(at: Asked) -> dict[str, Any]:
    kind, get = kind_of(at.spec), {**at.get}
    get["image"] = get["image"] or get["first_frame"]
    for name in INPUTS:
        if get[name] is not None and name not in kind.inputs:
            raise UsageError(f"--{name} is for {_tasks(name)} tasks, not for {at.spec.name}")
    inputs = kind.read(at.spec, at.get)
    at.warnings += kind.warnings(at.spec, at.get, inputs)
    return inputs


def _tasks(name: str) -> str:
    *most, last = (kind for kind, one in KINDS.items() if name in one.inputs)
    return f"{', '.join(most)} and {last}" if most else last


def input_of(at: Asked, name: str) -> Any:
    """An input as a Sample has it: the absolute path of a file, or the picture in memory; None where there is none."""
    one = inputs_of(at).get(name)
    if isinstance(one, (VideoFile, AudioFile)):
        return one.path
    return one[0] if isinstance(one, tuple) and name in STORED_PICTURES else one


def given_pictures(at: Asked) -> dict[str, Any]:
    """The pictures that the user gave, and no embedded task's own, by flag."""
    if not (at.get["image"] or at.get["first_frame"]):
        return {}
    return {name: path for name in STORED_PICTURES if (path := input_of(at, name)) is not None}


def check_shape(at: Asked) -> tuple[str, int, int, int]:
    """(asked "W*H", width, height in px, frames); made once."""
    return at.once("shape", lambda: _check_shape(at))


def _check_shape(at: Asked) -> tuple[str, int, int, int]:
    size, sides = _check_size(at.spec, at.get["size"], at.warnings)
    frames = check_frame_num(at.spec, at.get["frame_num"])
    return size, *kind_of(at.spec).shape(at.spec, sides, frames, inputs_of(at))


def _check_size(spec: EasyDict, value: Any, warnings: list[str]) -> tuple[str, tuple[int, int]]:
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
    return size, (width, height)


def picture_hashes(at: Asked) -> dict[str, str]:
    """Of the pictures that the user gave, by flag."""
    return {flag: image_sha256(path) for flag, path in given_pictures(at).items()}
