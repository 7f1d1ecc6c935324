"""What one kind of task is: the inputs it takes, the size of its videos, and what they are conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from wan.errors import UsageError
from wan.pictures import read_image
from wan.tasks import embedded_checkpoint

if TYPE_CHECKING:
    from wan.conditioning.condition import Condition, Encode
    from wan.conditioning.film import Film

Size = tuple[int, int]  # (width, height), px


class Kind:
    """The base of all kinds, and the one that makes video from text alone. Its checks import no torch.

    inputs: options, beside the text, that it takes; needed: those that must be given; least_frames: of a video
    clip_images: pictures that the image encoder of Wan2.1 is shown
    asks_size: whether --size has a say in the size of the video
    """

    inputs: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    least_frames = 1
    clip_images = 0
    asks_size = True

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, checked: each file is looked into once, to be sure that it can be read.

        Raises UsageError for what is missing or not for this task, and SwanError for files that cannot be read.
        """
        return {}

    def warnings(self, spec: EasyDict, get: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        """Lines to show about inputs that were read."""
        return []

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """(width, height, frames) of the video, or of a clip, where `size` and `frames` are what the user, or the task,
        says."""
        return *size, frames

    def film_frames(self, inputs: Mapping[str, Any]) -> int | None:
        """Frames of a video that is made in clips; None where it is one."""
        return None

    def extra_frames(self, sample: Any) -> int:
        """Latent frames that are sampled beside those of the video."""
        return 0

    def encodes(self, sample: Any) -> bool:
        """Whether its condition is made with the VAE."""
        return sample.image is not None

    def encoded(self, sample: Any) -> tuple[int, ...]:
        """Frames of each of the videos that the VAE encodes for a clip."""
        return (sample.frame_num,)

    def clips(self, spec: EasyDict, sample: Any) -> int:
        """How many are sampled, one after another, for one video."""
        return 1

    def film(self, spec: EasyDict, sample: Any) -> Film:
        """What a run samples, clip by clip. Imports torch."""
        from wan.conditioning.film import Film

        return Film(sample, lambda encode: self.condition(spec, sample, encode), self.clips(spec, sample))

    def condition(self, spec: EasyDict, sample: Any, encode: Encode) -> Condition:
        """What a Sample of one clip is conditioned on. encode: the VAE. Imports torch."""
        from wan.conditioning.condition import Condition

        return Condition()


def picture_size(path: Any) -> tuple[Any, int, int]:
    """(absolute path, or the image in memory, width, height) of a picture, which is decoded once to be sure."""
    height, width, _ = read_image(path).shape
    return (str(Path(path).resolve()) if isinstance(path, str) else path), width, height


def first_image(spec: EasyDict, get: Mapping[str, Any]) -> Any:
    """--image, under either of its names, or the one that comes with an embedded task."""
    if get["image"] and get["first_frame"] and get["image"] != get["first_frame"]:
        raise UsageError("--image and --first_frame both name the first image; give one")
    first = get["image"] or get["first_frame"]
    return first or (str(embedded_checkpoint(spec) / spec.image) if "image" in spec else None)
