"""Video from text, or from text and a first frame that stays as it is in the latent: ti2v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import latent_frames, ti2v_size
from wan.media import read_image
from wan.tasks import grid_px
from wan.tasks.kind import Kind, Size, first_image, picture_size


class FirstLatent(Kind):
    """Wan2.2's TI2V-5B."""

    inputs = ("image", "video", "continue_from", "prompts")
    overlap = 5

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        image = None if get["continue_from"] else first_image(spec, get)
        return ({"image": picture_size(image)} if image else {}) | super().read(spec, get)

    def size_like(self, spec: EasyDict, area: int, width: int, height: int) -> Size:
        rows, columns = ti2v_size(area, height, width, multiple=grid_px(spec))
        return columns, rows

    def encoded_frames(self, spec: EasyDict, sample: Any) -> tuple[int, ...]:
        return (max(1, sample.overlap or 1),)

    def condition(self, spec: EasyDict, sample: Any, encode: Any) -> Any:
        if sample.image is None:
            return super().condition(spec, sample, encode)
        from wan.conditioning.latent import first_frame_condition

        size = {"num_frames": sample.frame_num, "height": sample.height, "width": sample.width}
        return first_frame_condition(encode, read_image(sample.image), **size)

    def go_on(self, spec: EasyDict, sample: Any, encode: Any, given: Any) -> Any:
        from wan.conditioning.latent import FrameCondition

        return FrameCondition(encode(given[None]), latent_frames(sample.frame_num))
