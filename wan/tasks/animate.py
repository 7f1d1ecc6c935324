"""A character from a picture moves as a pose and a face video say, or takes the place of one in a video: Animate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydict import EasyDict

from wan.conditioning.sizes import clip_count
from wan.errors import UsageError, printable
from wan.media import read_image
from wan.tasks import grid_px
from wan.tasks.kind import Kind, Size, embedded_file, picture_size
from wan.video import VideoFile, open_video

if TYPE_CHECKING:
    from wan.conditioning.film import Film

_ALWAYS, _REPLACED = ("src_pose", "src_face", "src_ref"), ("src_bg", "src_mask")
ANIMATE_FILES = {name: f"{name}.mp4" for name in (*_ALWAYS, *_REPLACED)} | {"src_ref": "src_ref.png"}
_REFERT_NUMS = (1, 5)  # that the model was trained with
_PREPARE = "python -m wan.prepare animate"
_BLACK, _WHITE = 64, 192  # of a mask, up to what lossy compression does to it
_COLOURED, _GREY = 0.02, 0.2  # the most of its pixels that may be
_DARK = 16  # of a background whose character was cut out
_SOME = 0.01  # of the pixels of a frame, enough to tell something of them


class Animate(Kind):
    """Wan2.2's Animate: a film of clips, each of which begins with the last `refert_num` frames of the one before."""

    inputs = ("prompts", "src_root_path", *_ALWAYS, *_REPLACED, "replace_flag", "refert_num")
    clip_images = 1
    asks_size = False

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        replaces = bool(get["replace_flag"])
        if others := [name for name in _REPLACED if get[name] is not None and not replaces]:
            raise UsageError(f"--{others[0]} is for the replacement of a character: give --replace_flag with it")
        overlap = _refert_num(get["refert_num"])
        wanted = (*_ALWAYS, *(_REPLACED if replaces else ()))
        own = None if any(get[name] is not None for name in wanted) else embedded_file(spec, "src_root_path")
        is_own = get["src_root_path"] is None
        folder = own if is_own else get["src_root_path"]
        paths = {name: get[name] if get[name] is not None else _path(folder, name, is_own) for name in wanted}
        read: dict[str, Any] = {name: open_video(path) for name, path in paths.items() if name != "src_ref"}
        _check_videos(read, grid_px(spec), spec.dit.face_px, overlap)
        if replaces:
            _check_mask(read["src_mask"], read["src_bg"])
        return {**read, "src_ref": picture_size(paths["src_ref"])[0], "replace_flag": replaces, "refert_num": overlap}

    def warnings(self, spec: EasyDict, get: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        pose, face, side = inputs["src_pose"], inputs["src_face"], spec.dit.face_px
        found = []
        if get["size"] is not None:
            found.append(f"--size has no effect: the video is {pose.width}x{pose.height} as --src_pose")
        if face.width != side:
            found.append(f"--src_face is {face.width}x{face.height}: it is resized to {side}x{side}")
        return found + ([_doubt(inputs["src_mask"])] if inputs["replace_flag"] and _doubt(inputs["src_mask"]) else [])

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """The size of the pose video; `frames` are those of a clip."""
        if frames < 2 * (overlap := inputs["refert_num"]):
            least = -(-(2 * overlap - 1) // 4) * 4 + 1
            told = f"clips share {overlap} frames (--refert_num)"
            raise UsageError(f"--frame_num {frames} is too short for clips that go on: {told}; give at least {least}")
        return inputs["src_pose"].width, inputs["src_pose"].height, frames

    def film_frames(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["src_pose"])

    def extra_frames(self, sample: Any) -> int:
        return 1  # the reference

    def encodes(self, sample: Any) -> bool:
        return True

    def frames(self, sample: Any) -> int:
        return sample.film_frames

    def encoded_frames(self, spec: EasyDict, sample: Any) -> tuple[int, ...]:
        return sample.frame_num, sample.frame_num, 1  # pose, what is given of the video, reference

    def clips(self, spec: EasyDict, sample: Any) -> int:
        return clip_count(sample.film_frames, sample.frame_num, sample.refert_num)

    def film(self, spec: EasyDict, sample: Any) -> Film:
        from wan.conditioning.animate import AnimateFilm, AnimateInputs

        paths = sample.src_pose, sample.src_face, *((sample.src_bg, sample.src_mask) if sample.replace_flag else ())
        inputs = AnimateInputs(read_image(sample.src_ref), *map(open_video, paths))
        return AnimateFilm(sample, inputs, sample.refert_num, spec.dit.face_px, clip="clip" in spec.files)


def _refert_num(value: Any) -> int:
    found = {str(one): one for one in _REFERT_NUMS}.get(str(1 if value is None else value).strip())
    if found is None:
        why = ", the default of the official command line, which its own code refuses" if str(value) == "77" else ""
        raise UsageError(f"--refert_num must be 1 or 5 frames that clips share, not {str(value)[:100]}{why}")
    return found


def _path(folder: Any, name: str, is_own: bool) -> str:
    """A file of the folder, under its official name. is_own: it came with the task."""
    if folder is None:
        raise UsageError(f"animate needs --src_root_path DIR with {ANIMATE_FILES[name]}, or --{name} FILE")
    if not Path(folder).is_dir():
        raise UsageError(f"--src_root_path: no folder {printable(folder)}")
    path = Path(folder) / ANIMATE_FILES[name]
    if not path.is_file() and is_own:
        told = f"the example of this task has no {ANIMATE_FILES[name]}"
        raise UsageError(f"{told}: give --src_root_path DIR with files of your own")
    if not path.is_file():
        told = f"--src_root_path {printable(folder)} has no {ANIMATE_FILES[name]}"
        raise UsageError(f"{told}: put it there, or give --{name} FILE")
    return str(path)


def _check_videos(videos: Mapping[str, VideoFile], multiple: int, face_side: int, overlap: int) -> None:
    """Raises UsageError for sizes and lengths that do not fit together."""
    pose, face = videos["src_pose"], videos["src_face"]
    if pose.width % multiple or pose.height % multiple:
        told = f"--src_pose is {pose.width}x{pose.height}"
        raise UsageError(f"{told}, and both sides need multiples of {multiple} pixels: {_PREPARE} makes it so")
    if face.width != face.height:
        told = f"--src_face is {face.width}x{face.height}, and it needs a square, {face_side}x{face_side} at best"
        raise UsageError(f"{told}: {_PREPARE} --face_box cuts it out")
    for name in _REPLACED:
        if name in videos and (videos[name].width, videos[name].height) != (pose.width, pose.height):
            sizes = f"{videos[name].width}x{videos[name].height} and --src_pose {pose.width}x{pose.height}"
            raise UsageError(f"--{name} is {sizes}: they need the same size, which {_PREPARE} gives them")
    for name, video in videos.items():
        if len(video) != len(pose):
            told = f"--{name} has {len(video)} frames and --src_pose {len(pose)}"
            raise UsageError(f"{told}: they need as many; cut the longer one, or make both with {_PREPARE}")
    if len(pose) <= overlap:
        told = f"--src_pose has {len(pose)} frame{'s' if len(pose) > 1 else ''}"
        raise UsageError(f"{told}: give a video of more than {overlap} (--refert_num)")


def _check_mask(mask: VideoFile, background: VideoFile) -> None:
    """By the first frame. Raises UsageError for one that is none, or says the opposite."""
    pixels, behind = (next(iter(video.frames([0]))) for video in (mask, background))
    low, high = pixels.min(axis=2).astype(int), pixels.max(axis=2).astype(int)
    coloured, grey = (high - low > _BLACK).mean(), ((low > _BLACK) & (high < _WHITE)).mean()
    if coloured > _COLOURED or grey > _GREY:
        what = "coloured" if coloured > _COLOURED else "grey"
        told = f"--src_mask is no mask, it is {what}"
        raise UsageError(f"{told}: it needs white where the character is, and black elsewhere")
    inside = pixels[..., 0] >= _WHITE
    if not _SOME < inside.mean() < 1 - _SOME:
        return
    light = behind.mean(axis=2)
    if light[~inside].mean() < _DARK < light[inside].mean() / 2:
        told = "--src_bg is black where it is black, and should be so where it is white"
        raise UsageError(f"--src_mask looks inverted: {told}; invert it, so that the character is white")


def _doubt(mask: VideoFile) -> str:
    """What looks wrong with a mask, by three of its frames; "" where nothing does."""
    import numpy as np

    frames = np.stack([frame[..., 0] for frame in mask.frames(sorted({0, len(mask) // 2, len(mask) - 1}))]) >= _WHITE
    if not frames.any():
        return "--src_mask is black: nothing is replaced; white is where the character is"
    if frames.all():
        return (
            "--src_mask is white: all of the picture is replaced; white is where the character is, and black around it"
        )
    around = (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1])
    if all(side.mean() > 0.5 for side in around):
        return "--src_mask is white at the borders: white is where the character is, and black all around it"
    return ""
