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
_BEGINNINGS = ("image", "first_frame", "extend", "src_video", "src_mask", "inpaint", "outpaint")  # of a single clip


class Kind:
    """The base of all kinds, and the one that makes video from text, or of another video. Its checks import no torch.

    inputs: options, beside the text, that it takes; needed: those that must be given
    clip_images: pictures that the image encoder of Wan2.1 is shown
    asks_size: whether --size has a say in the size of the video
    overlap: frames of a film that its next clip begins with, if not told otherwise; 0: clips of this kind do not go on
    """

    inputs: tuple[str, ...] = ("video",)
    needed: tuple[str, ...] = ()
    clip_images = 0
    asks_size = True
    overlap = 0

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, checked: each file is looked into once, to be sure that it can be read.

        Raises UsageError for what is missing or not for this task, and SwanError for files that cannot be read.
        """
        read = {name: open_video(get[name]) for name in ("video", "continue_from") if name in self.inputs and get[name]}
        goes_on = "continue_from" if get["continue_from"] else "prompts" if get["prompts"] and self.overlap else None
        others = ("video", "last_frame", *(_BEGINNINGS if goes_on == "continue_from" else ()))
        if goes_on and (other := next((name for name in others if get[name]), None)):
            raise UsageError(f"--{goes_on} makes a film that goes on, and --{other} is of a single clip: give one")
        return read

    def warnings(self, spec: EasyDict, get: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        """Lines to show about inputs that were read."""
        return []

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """(width, height, frames) of the video, where `size` and `frames` are what the user, or the task, says.

        One that is made of another has its aspect ratio, of what is asked only the area counts, and no more frames.
        """
        if "video" in inputs:
            frames = self.frames_of(spec, inputs["video"], frames)
        if (like := _shape_of(inputs)) is None:
            return *size, frames
        return *self.size_like(spec, size[0] * size[1], *like), frames

    def size_like(self, spec: EasyDict, area: int, width: int, height: int) -> Size:
        """Of a video that takes its aspect ratio from a picture or another video."""
        stride = spec.vae_stride[1]
        rows, columns = i2v_size(area, height, width, stride=stride, patch=grid_px(spec) // stride)
        return columns, rows

    def frames_of(self, spec: EasyDict, video: VideoFile, most: int) -> int:
        """How many frames, 4n + 1 and at most so many, are made of a video that is shown at its own speed."""
        return min(most, max(round(video.end * spec.sampling.fps) - 1, 0) // 4 * 4 + 1)

    def film_frames(self, inputs: Mapping[str, Any]) -> int | None:
        """Frames of a video that is made in clips; None where it is one."""
        return None

    def extra_frames(self, sample: Any) -> int:
        """Latent frames that are sampled beside those of the video."""
        return 0

    def encodes(self, sample: Any) -> bool:
        """Whether something is made with the VAE before denoising."""
        return sample.image is not None or sample.video is not None or sample.overlap is not None

    def encoded_frames(self, spec: EasyDict, sample: Any) -> tuple[int, ...]:
        """Of the videos that the VAE encodes for one clip, the most there are."""
        return (sample.frame_num,)

    def latents_before(self, spec: EasyDict, sample: Any) -> int:
        """Latent frames that are decoded in front of those of a clip, at most."""
        return 0

    def frames(self, sample: Any) -> int:
        """Of the whole film."""
        if sample.overlap is None:
            return sample.frame_num
        clips = max(1, len(sample.prompts))
        return clips * sample.frame_num - sample.overlap * (clips - (sample.continue_from is None))

    def clips(self, spec: EasyDict, sample: Any) -> int:
        """How many are sampled, one after another, for one video."""
        return max(1, len(sample.prompts))

    def film(self, spec: EasyDict, sample: Any) -> Film:
        """What a run samples, clip by clip. Imports torch."""
        from wan.conditioning.film import Film

        condition, source = (partial(make, spec, sample) for make in (self.condition, self.source))
        if sample.overlap is None:
            return Film(sample, condition, 1, source)
        from wan.conditioning.continued import ContinuedFilm, last_frames

        last = None
        if sample.continue_from is not None:
            size = sample.height, sample.width
            last = last_frames(open_video(sample.continue_from), sample.overlap, *size)
        return ContinuedFilm(sample, condition, self.clips(spec, sample), partial(self.go_on, spec, sample), last)

    def go_on(self, spec: EasyDict, sample: Any, encode: Encode, given: Tensor) -> Condition:
        """The condition of a clip that begins with `given` frames of the film, [3, n, H, W] in [-1, 1]."""
        raise NotImplementedError

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


def _shape_of(inputs: Mapping[str, Any]) -> Size | None:
    """(width, height) of what a video is like: the image, else the video that it is made of or goes on from."""
    if "image" in inputs:
        return inputs["image"][1:]
    video = inputs.get("video") or inputs.get("continue_from")
    return video and (video.width, video.height)


def picture_size(path: Any) -> tuple[Any, int, int]:
    """(absolute path, or the image in memory, width, height) of a picture, which is decoded once to be sure."""
    height, width, _ = read_image(path).shape
    return (str(Path(path).resolve()) if isinstance(path, str) else path), width, height


def first_image(spec: EasyDict, get: Mapping[str, Any]) -> Any:
    """--image, under either of its names, or the one that comes with an embedded task."""
    if get["image"] and get["first_frame"] and get["image"] != get["first_frame"]:
        raise UsageError("--image and --first_frame both name the first image; give one")
    return get["image"] or get["first_frame"] or embedded_file(spec, "image")


def embedded_file(spec: EasyDict, name: str) -> str | None:
    """The file or folder that comes with an embedded task, for an input that is not given; None without one."""
    return str(embedded_checkpoint(spec) / spec[name]) if name in spec else None
