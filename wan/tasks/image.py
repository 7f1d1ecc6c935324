"""Video from its first frame, or from its first and last one, by channels: i2v, flf2v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import cover_size
from wan.errors import UsageError
from wan.media import read_image
from wan.tasks.kind import Kind, Size, first_image, picture_size

_LEAST_WITH_LAST = 5  # two latent frames


class Image(Kind):
    """From the first frame; the experts of Wan2.2, which have no image encoder, take a last one as well."""

    inputs = ("image", "last_frame", "video", "continue_from", "prompts")
    needed = ("image",)
    clip_images = 1
    overlap = 1

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read(spec, get)  # which also refuses what does not go together
        inputs = {"image": None if get["continue_from"] else first_image(spec, get), "last_frame": get["last_frame"]}
        if not get["continue_from"] and not all(inputs[name] for name in self.needed):
            raise UsageError(f"{spec.name} needs {' and '.join(f'--{name} FILE' for name in self.needed)}")
        inputs = {name: picture_size(path) for name, path in inputs.items() if path}
        if "last_frame" in inputs:
            if len(inputs) > self.clip_images and spec.files.get("clip"):
                raise UsageError(f"--last_frame is for flf2v, vace and i2v of Wan2.2, not for {spec.name}")
            (_, width, height), (_, last_width, last_height) = inputs["image"], inputs["last_frame"]
            try:
                cover_size(height, width, last_height, last_width)
            except UsageError as error:
                raise UsageError(f"--last_frame: {error}") from error
        return inputs | read

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """The aspect ratio is the image's, of what is asked only the area counts."""
        if "last_frame" in inputs and frames < _LEAST_WITH_LAST:
            raise UsageError(f"--frame_num {frames}: first and last frame need at least {_LEAST_WITH_LAST}")
        return super().shape(spec, size, frames, inputs)

    def condition(self, spec: EasyDict, sample: Any, encode: Any) -> Any:
        from wan.conditioning.image import image_condition

        pictures = [read_image(path) for path in (sample.image, sample.last_frame) if path is not None]
        size = {"num_frames": sample.frame_num, "height": sample.height, "width": sample.width}
        return image_condition(encode, *pictures, **size, clip="clip" in spec.files)

    def go_on(self, spec: EasyDict, sample: Any, encode: Any, given: Any) -> Any:
        from wan.conditioning.image import begun_condition

        return begun_condition(encode, given, sample.frame_num, clip="clip" in spec.files)


class FirstLast(Image):
    """Wan2.1's model for first and last frames, of which its image encoder sees both."""

    inputs = ("image", "last_frame", "video")
    needed = ("image", "last_frame")
    clip_images = 2
    overlap = 0
