"""What one kind of task is: the inputs it takes, the size of its videos, and what they are conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from wan.conditioning.sizes import i2v_size
from wan.errors import UsageError
from wan.pictures import read_image
from wan.tasks import embedded_checkpoint, grid_px
from wan.video import VideoFile, open_video

if TYPE_CHECKING:
    from torch import Tensor

    from wan.conditioning.condition import Condition, Encode
    from wan.conditioning.film import Film
    from wan.media import Sound

Size = tuple[int, int]  # (width, height), px


class Kind:
    """The base of all kinds, and the one that makes video from text, or of another video. Its checks import no torch.

    inputs: options, beside the text, that it takes; needed: those that must be given
    clip_images: pictures that the image encoder of Wan2.1 is shown
    asks_size: whether --size has a say in the size of the video
    """

    inputs: tuple[str, ...] = ("video",)
    needed: tuple[str, ...] = ()
    clip_images = 0
    asks_size = True

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, checked: each file is looked into once, to be sure that it can be read.

        Raises UsageError for what is missing or not for this task, and SwanError for files that cannot be read.
        """
        return {"video": open_video(get["video"])} if "video" in self.inputs and get["video"] else {}

    def warnings(self, spec: EasyDict, get: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        """Lines to show about inputs that were read."""
        return []

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """(width, height, frames) of the video, where `size` and `frames` are what the user, or the task, says.

        One that is made of another has its aspect ratio, of what is asked only the area counts, and no more frames.
        """
        if "video" not in inputs:
            return *size, frames
        video, stride = inputs["video"], spec.vae_stride[1]
        patch = grid_px(spec) // stride
        rows, columns = i2v_size(size[0] * size[1], video.height, video.width, stride=stride, patch=patch)
        return columns, rows, self.frames_of(spec, video, frames)

    def frames_of(self, spec: EasyDict, video: VideoFile, most: int) -> int:
        """How many frames, 4n + 1 and at most so many, are made of a video that is shown at its own speed."""
        return min(most, (round(video.end * spec.sampling.fps) - 1) // 4 * 4 + 1)

    def film_frames(self, inputs: Mapping[str, Any]) -> int | None:
        """Frames of a video that is made in clips; None where it is one."""
        return None

    def extra_frames(self, sample: Any) -> int:
        """Latent frames that are sampled beside those of the video."""
        return 0

    def encodes(self, sample: Any) -> bool:
        """Whether something is made with the VAE before denoising."""
        return sample.image is not None or sample.video is not None

    def encoded_frames(self, spec: EasyDict, sample: Any) -> tuple[int, ...]:
        """Of the videos that the VAE encodes for one clip, the most there are."""
        return (sample.frame_num,)

    def latents_before(self, spec: EasyDict, sample: Any) -> int:
        """Latent frames that are decoded in front of those of a clip, at most."""
        return 0

    def frames(self, sample: Any) -> int:
        """Of the whole film."""
        return sample.frame_num

    def clips(self, spec: EasyDict, sample: Any) -> int:
        """How many are sampled, one after another, for one video."""
        return 1

    def film(self, spec: EasyDict, sample: Any) -> Film:
        """What a run samples, clip by clip. Imports torch."""
        from wan.conditioning.film import Film

        condition, source = (partial(make, spec, sample) for make in (self.condition, self.source))
        return Film(sample, condition, self.clips(spec, sample), source)

    def source(self, spec: EasyDict, sample: Any, encode: Encode) -> Tensor | None:
        """The latents of what the first clip is made of, see `wan.conditioning.source`; None: of noise alone."""
        if sample.video is None:
            return None
        from wan.conditioning.source import source_latent

        fps = spec.sampling.fps
        return source_latent(encode, open_video(sample.video), sample.frame_num, fps, sample.height, sample.width)

    def sound(self, sample: Any) -> Sound | None:
        """What is heard with the video."""
        return None

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
