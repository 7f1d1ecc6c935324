"""The clips that cache benchmarks make, by task: prompts, seeds and, for image to video, first frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.tiny_world import cases
from tools.tiny.world import Clip, from_start, picture
from wan.errors import UsageError

TASKS = ("t2v-tiny", "i2v-tiny")
SIZE_PX = 64
FIRST_FRAME = {"radius": 0.17, "x": 0.5, "y": 0.5, "travel": 0.3}  # within what i2v-tiny was trained on


class Case(NamedTuple):
    """One clip to make: what it shows, and the options of its request (prompt, seed, image)."""

    clip: Clip
    options: dict[str, Any]


def tiny_cases(task: str, first: int, count: int, folder: str | Path) -> list[Case]:
    """`count` of the 64 clips of `benchmarks.tiny_world`, from number `first` on. First frames are written to `folder`.

    Half of the clips show a combination of words that was kept out of training.
    """
    if task not in TASKS:
        raise UsageError(f"no clips are known for task {task!r}; tasks: {', '.join(TASKS)}")
    made = []
    for clip, seed in cases()[first : first + count]:
        options = {"prompt": clip.prompt, "seed": seed}
        if task == "i2v-tiny":
            size = FIRST_FRAME
            clip = from_start(replace(clip, radius=size["radius"]), size["x"], size["y"], size["travel"])
            file = Path(folder, f"{seed}.png")
            Image.fromarray(picture(clip, SIZE_PX, SIZE_PX)).save(file)
            options["image"] = str(file)
        made.append(Case(clip, options))
    return made
