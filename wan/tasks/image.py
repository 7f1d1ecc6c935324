"""Video from its first frame, or from its first and last one, by channels: i2v, flf2v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import cover_size, i2v_size
from wan.errors import UsageError
from wan.media import read_image
from wan.tasks import grid_px
from wan.tasks.kind import Kind, Size, first_image, picture_size


class Image(Kind):
    """Wan2.1 and the experts of Wan2.2."""

    inputs = needed = ("image",)
    clip_images = 1

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        image = first_image(spec, get)
        if not image:
            raise UsageError(f"{spec.name} needs --image FILE")
        return {"image": picture_size(image)}

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """The aspect ratio is the image's, of what is asked only the area counts."""
        _, width, height = inputs["image"]
        stride = spec.vae_stride[1]
        rows, columns = i2v_size(size[0] * size[1], height, width, stride=stride, patch=grid_px(spec) // stride)
        return columns, rows, frames

    def condition(self, spec: EasyDict, sample: Any, encode: Any) -> Any:
        from wan.conditioning.image import image_condition

        pictures = [read_image(path) for path in (sample.image, sample.last_frame) if path is not None]
        size = {"num_frames": sample.frame_num, "height": sample.height, "width": sample.width}
        return image_condition(encode, *pictures, **size, clip="clip" in spec.files)


class FirstLast(Image):
    """Wan2.1's model for first and last frames; at least two latent frames."""

    inputs = needed = ("image", "last_frame")
    least_frames = 5
    clip_images = 2

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        image, last = first_image(spec, get), get["last_frame"]
        if not (image and last):
            raise UsageError(f"{spec.name} needs --first_frame FILE and --last_frame FILE")
        inputs = {"image": picture_size(image), "last_frame": picture_size(last)}
        (_, width, height), (_, last_width, last_height) = inputs.values()
        try:
            cover_size(height, width, last_height, last_width)
        except UsageError as error:
            raise UsageError(f"--last_frame: {error}") from error
        return inputs
