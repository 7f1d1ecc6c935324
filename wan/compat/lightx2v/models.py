"""Model classes of LightX2V and the tasks that they are here. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easydict import EasyDict

from wan.errors import UsageError
from wan.options.files import told_task
from wan.options.values import shown
from wan.tasks import load_task, task_names


@dataclass(frozen=True)
class ModelClass:
    """kinds: LightX2V's task -> the kind of our tasks; has_two: experts; is_distilled: it goes by a list of steps."""

    kinds: Mapping[str, str]
    has_two: bool = False
    is_distilled: bool = False

    def fits(self, task: str) -> list[str]:
        """Our tasks for one of its own."""
        specs = map(load_task, task_names())
        return [one.name for one in specs if one.kind == self.kinds[task] and ("experts" in one) == self.has_two]


_DENSE = {"t2v": "t2v", "i2v": "i2v", "flf2v": "flf2v"}
_EXPERTS = {"t2v": "t2v", "i2v": "i2v", "flf2v": "i2v"}  # the last by the last frame that i2v-A14B takes
CLASSES = {
    "wan2.1": ModelClass(_DENSE),
    "wan2.1_distill": ModelClass(_DENSE, is_distilled=True),
    "wan2.1_vace": ModelClass({"vace": "vace"}),
    "wan2.2": ModelClass({"t2v": "ti2v", "i2v": "ti2v"}),
    "wan2.2_moe": ModelClass(_EXPERTS, has_two=True),
    "wan2.2_moe_distill": ModelClass(_EXPERTS, has_two=True, is_distilled=True),
    "wan2.2_moe_vace": ModelClass({"vace": "vace"}, has_two=True),
    "wan2.2_s2v": ModelClass({"s2v": "s2v"}),
    "wan2.2_animate": ModelClass({"animate": "animate"}),
}
_HUNYUAN = "HunyuanVideo-1.5 is another family of models, and Swan runs Wan 2.1 and 2.2 alone"
_REFUSED = {
    "hunyuan_video_1.5": _HUNYUAN,
    "hunyuan_video_1.5_distill": _HUNYUAN,
    "wan2.1_mean_flow_distill": "its network is told two times, where a step begins and where it ends, and has weights"
    " for the second one (time_embedding_r), which no task has here",
}


def model_class(name: str, where: str = "") -> ModelClass:
    """Raises UsageError, with the classes that there are, for another one."""
    if not isinstance(name, str) or name not in CLASSES:
        why = f": {_REFUSED[name]}" if str(name) in _REFUSED else ""
        raise UsageError(f"{where}model_cls {shown(name)} is not here{why}; there are: {', '.join(CLASSES)}")
    return CLASSES[name]


def our_kind(name: str, task: str | None, where: str = "") -> str:
    """The kind of our tasks that a task of a class is. Raises UsageError for one that it does not have."""
    kinds = model_class(name, where).kinds
    if task is None:
        raise UsageError(f"{where}task is needed: model_cls {name} has {', '.join(kinds)}")
    if task not in kinds:
        raise UsageError(f"{where}task {task!r} is none of model_cls {name}, which has: {', '.join(kinds)}")
    return kinds[task]


def task_of(name: str, task: str | None, files: Mapping[str, Any], where: str = "") -> EasyDict:
    """Our task for a class and its task, told from the checkpoint where there are several. files: by flags.

    Raises UsageError where they do not go together, SwanError for a checkpoint of no such task.
    """
    one = model_class(name, where)
    if task is None and len(one.kinds) == 1:
        task = next(iter(one.kinds))
    our_kind(name, task, where)
    fits = one.fits(task)
    if len(fits) == 1:
        return load_task(fits[0])
    told = told_task(files, fits)[0]
    if told not in fits:  # it is the default
        raise UsageError(f"{where}model_path is needed: it tells {' from '.join((', '.join(fits[:-1]), fits[-1]))}")
    return load_task(told)
