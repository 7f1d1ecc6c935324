"""Video from text, or from text and a first frame that stays as it is in the latent: ti2v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import ti2v_size
from wan.media import read_image
from wan.tasks import grid_px
from wan.tasks.kind import Kind, Size, first_image, picture_size


class FirstLatent(Kind):
    """Wan2.2's TI2V-5B."""

    inputs = ("image",)

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        image = first_image(spec, get)
        return {"image": picture_size(image)} if image else {}

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """With an image the aspect ratio is the image's, and of what is asked only the area counts."""
        if "image" not in inputs:
            return *size, frames
        _, width, height = inputs["image"]
        rows, columns = ti2v_size(size[0] * size[1], height, width, multiple=grid_px(spec))
        return columns, rows, frames

    def encoded(self, sample: Any) -> tuple[int, ...]:
        return (1,)

    def condition(self, spec: EasyDict, sample: Any, encode: Any) -> Any:
        if sample.image is None:
            return super().condition(spec, sample, encode)
        from wan.conditioning.latent import first_frame_condition

        size = {"num_frames": sample.frame_num, "height": sample.height, "width": sample.width}
        return first_frame_condition(encode, read_image(sample.image), **size)
