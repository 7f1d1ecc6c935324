"""Output: what is written, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from wan.errors import UsageError
from wan.options.files import check_save_file, check_writable
from wan.options.names import MAX_STEPS
from wan.options.schema import Asked, Option, option
from wan.options.values import whole


def _save_file(at: Asked, given: Any) -> str:
    made = at.done
    stem = f"{at.spec.name}_{made['width']}x{made['height']}_{made['seed']}"
    return check_save_file(given, made["frame_num"] - made["trim_first_frames"], stem, made["prompt"])


def _preview(at: Asked, given: Any) -> str | None:
    if given is None:
        if at.get["preview_every"] is not None:
            raise UsageError("--preview_every is for --preview FILE")
        return None
    if os.path.splitext(given)[1].lower() not in (".png", ".gif"):
        raise UsageError(f"--preview must end in .png or .gif, not {os.path.basename(given)!r}")
    check_writable(given, "preview")
    return os.path.abspath(given)


def _trace(at: Asked, given: Any) -> str | None:
    if given is None:
        return None
    if not at.done["cache"]:
        raise UsageError("--cache_trace has no effect without a cache")
    check_writable(given, "cache_trace")
    return given


_output = partial(option, "output", stored=False)


@dataclass(frozen=True)
class Output:
    """save_file: absolute path of the mp4 or PNG; preview: of the PNG or GIF that shows how it goes on, or None;
    cache_trace: path of what the cache decided, or None."""

    save_file: str = option(
        "what to make",
        "path",
        ".mp4, or .png for one frame; default: a new name in this folder",
        _save_file,
        stored=False,
    )

    preview: str | None = _output(
        "path",
        "while it is made, show what it becomes: .png (its middle frame) or .gif, written anew every few steps",
        _preview,
    )
    preview_every: int = _output(
        "whole",
        "steps from preview to preview; default 5",
        lambda at, given: whole(given, 5, "preview_every", 1, MAX_STEPS),
    )

    cache_trace: str | None = _output(
        "path", "write every decision of the cache to this file, for python -m wan.cache.report", _trace
    )

    OTHERS: ClassVar[dict[str, Option]] = {}
