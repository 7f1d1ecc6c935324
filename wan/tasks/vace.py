"""Video from a source video with a mask, from parts of one, and from reference pictures: VACE (arXiv 2503.07598)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from wan.conditioning.sizes import Margins, cover_size, latent_frames, vace_size
from wan.errors import UsageError
from wan.media import read_image
from wan.tasks import grid_px
from wan.tasks.kind import Kind, Size, first_image, picture_size
from wan.video import VideoFile, open_video

_MOST_MARGIN = 10_000
_SAME_SHAPE = 0.02  # aspect ratios that differ by less are alike


class Vace(Kind):
    """Any mixture of: a source video, that steers (alone) or is made anew where a mask is white; the same with a hole
    (`inpaint`) or with margins (`outpaint`); first and last frames or a clip that goes on (`extend`); references."""

    inputs = ("src_video", "src_mask", "src_ref_images", "context_scale", "inpaint", "outpaint", "extend")
    inputs += ("image", "last_frame", "continue_from", "prompts")
    overlap = 5

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: get[name] for name in self.inputs if get[name] is not None}
        given |= {"image": image} if not get["continue_from"] and (image := first_image(spec, get)) else {}
        given.pop("prompts", None)
        _check_together(given)
        videos = ("src_video", "src_mask", "inpaint", "extend", "last_frame")
        read = {name: open_video(path) for name, path in given.items() if name in videos}
        if "image" in given:
            read["extend"] = open_video(given["image"])
        if "src_ref_images" in given:
            read["src_ref_images"] = [picture_size(path)[0] for path in given["src_ref_images"]]
        if "outpaint" in given:
            read["outpaint"] = _margins(given["outpaint"])
        for name in ("src_mask", "inpaint"):
            if name in read:
                _check_mask(name, read[name], read["src_video"])
        return read | super().read(spec, get)

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """With a video its aspect ratio, of what is asked only the area counts, and a source is never enlarged; its
        frames, thinned out to at most so many tokens as are asked."""
        area, multiple = size[0] * size[1], grid_px(spec)
        if "src_video" in inputs:
            video, margins = inputs["src_video"], inputs.get("outpaint", Margins(0, 0, 0, 0))
            height, width = video.height + margins.top + margins.bottom, video.width + margins.left + margins.right
            tokens = area // multiple**2 * latent_frames(frames)
            pixels_h, pixels_w = height, width
            height, width, frames = vace_size(area, tokens, len(video), height, width, multiple=multiple)
            if min(video.height * height / pixels_h, video.width * width / pixels_w) < 1:
                raise UsageError(f"--outpaint leaves nothing of a source of {video.width}x{video.height} to be seen")
            return width, height, frames
        if "continue_from" in inputs:
            clip, tokens = inputs["continue_from"], area // multiple**2 * latent_frames(frames)
            height, width, _ = vace_size(area, tokens, frames, clip.height, clip.width, multiple=multiple)
            return width, height, frames
        clips = {name: inputs[name] for name in ("extend", "last_frame") if name in inputs}
        if not clips:
            return *size, frames
        first, given = next(iter(clips.values())), sum(map(len, clips.values()))
        if given >= frames:
            told = f"{given} of a video's frames are given, and --frame_num is {frames}"
            raise UsageError(f"{told}: nothing is left to make; give a larger --frame_num or a shorter clip")
        tokens = area // multiple**2 * latent_frames(frames)
        height, width, _ = vace_size(area, tokens, frames, first.height, first.width, multiple=multiple)
        for name, clip in clips.items():
            try:  # it may take a giant to cover it
                cover_size(height, width, clip.height, clip.width)
            except UsageError as error:
                raise UsageError(f"--{name}: {error}") from error
        return width, height, frames

    def extra_frames(self, sample: Any) -> int:
        return len(sample.src_ref_images)

    def encodes(self, sample: Any) -> bool:
        return True

    def condition(self, spec: EasyDict, sample: Any, encode: Any) -> Any:
        from wan.conditioning import vace_inputs as made
        from wan.conditioning.vace import vace_condition

        size = sample.frame_num, sample.height, sample.width
        paths = sample.src_video, sample.extend or sample.image, sample.last_frame
        video, extend, last = (open_video(path) if path else None for path in paths)
        if sample.outpaint:
            frames, mask = made.outpainted(video, Margins(*sample.outpaint), *size)
        elif sample.inpaint:
            frames, mask = made.inpainted(video, open_video(sample.inpaint), *size)
        elif video:
            frames, mask = made.source(video, open_video(sample.src_mask) if sample.src_mask else None, *size)
        elif extend or last:
            frames, mask = made.extended(extend, last, *size)
        else:
            frames, mask = made.blank(*size)
        return vace_condition(encode, frames, mask, _references(sample), context_scale=sample.context_scale)

    def go_on(self, spec: EasyDict, sample: Any, encode: Any, given: Any) -> Any:
        from wan.conditioning.vace import vace_condition
        from wan.conditioning.vace_inputs import begun

        frames, mask = begun(given, sample.frame_num)
        return vace_condition(encode, frames, mask, _references(sample), context_scale=sample.context_scale)


def _references(sample: Any) -> list[Any]:
    from wan.conditioning.vace_inputs import reference

    return [reference(read_image(path), sample.height, sample.width) for path in sample.src_ref_images]


def _margins(value: Any) -> Margins:
    allowed = "four numbers of pixels, LEFT,TOP,RIGHT,BOTTOM, not all 0"
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        margins = Margins(*map(int, parts))
        is_whole = list(margins) == list(map(float, parts))
        if not is_whole or min(margins) < 0 or not any(margins) or max(margins) > _MOST_MARGIN:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"--outpaint must be {allowed}, not {str(value)[:100]!r}") from None
    return margins


def _check_together(given: Mapping[str, Any]) -> None:
    """Raises UsageError for inputs that contradict each other or need another one."""
    for name in ("src_mask", "inpaint", "outpaint"):
        if name in given and "src_video" not in given:
            raise UsageError(f"--{name} is of a video: give --src_video FILE with it")
    for group in (("src_mask", "inpaint", "outpaint"), ("image", "extend")):
        if len(both := [name for name in group if name in given]) > 1:
            raise UsageError(f"--{both[0]} and --{both[1]} contradict each other: give one")
    other = next((name for name in ("extend", "image", "last_frame") if name in given), None)
    if "src_video" in given and other:
        raise UsageError(f"--src_video and --{other} both say what the frames are: give one")


def _check_mask(name: str, mask: VideoFile, video: VideoFile) -> None:
    if len(mask) not in (1, len(video)):
        raise UsageError(f"--{name} has {len(mask)} frames and --src_video {len(video)}: it needs as many, or one")
    if abs(mask.width * video.height / (mask.height * video.width) - 1) > _SAME_SHAPE:
        sizes = f"{mask.width}x{mask.height} and --src_video {video.width}x{video.height}"
        raise UsageError(f"--{name} is {sizes}: it needs the same shape")
