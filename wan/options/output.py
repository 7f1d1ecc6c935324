"""Output: what is written, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from wan.options.files import check_save_file
from wan.options.schema import Asked, Option, option


def _save_file(at: Asked, given: Any) -> str:
    made = at.done
    stem = f"{at.spec.name}_{made['width']}x{made['height']}_{made['seed']}"
    return check_save_file(given, made["frame_num"] - made["trim_first_frames"], stem, made["prompt"])


@dataclass(frozen=True)
class Output:
    """save_file: absolute path of the mp4 or PNG."""

    save_file: str = option(
        "path",
        ".mp4, or .png for one frame; default: a new name in this folder",
        _save_file,
        group="what to make",
        value="FILE",
        stored=False,
    )

    OTHERS: ClassVar[dict[str, Option]] = {}
