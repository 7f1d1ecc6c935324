"""Makes the files of --src_root_path from videos and pictures of any size and rate, as far as it takes no network.

    python -m wan.prepare animate --out DIR --src_pose pose.mp4 --src_face actor.mp4 --face_box 300,80,200,240 \\
        --src_ref character.png
    python generate.py --task animate-14B --ckpt_dir ./Wan2.2-Animate-14B --src_root_path DIR

All get one size: with the aspect ratio of the reference or, where a mask says that a character is replaced, of the pose
video, in black bars where they have another shape; and one frame rate. The face is cut out, with some of what is around
it. A mask is made wider, and black and white; the background becomes black in it.

What takes a network (the skeleton of poses, the face's place, the mask itself) is made elsewhere. Videos are read and
written frame by frame. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.command import Parser, put, run_command, run_process
from wan.conditioning.sizes import face_box, i2v_size, resampled_ids
from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import atomic, read_json
from wan.media import BT709_OPTIONS, X264_OPTIONS
from wan.options.files import check_outputs
from wan.options.values import listed, number, whole
from wan.pictures import read_image
from wan.tasks import load_task
from wan.tasks.animate import ANIMATE_FILES
from wan.video import VideoFile, open_video

if TYPE_CHECKING:
    import numpy as np

    Change = Callable[[np.ndarray], np.ndarray]  # a frame uint8 [H, W, 3] -> one of the file that is written

_TASK = "animate-14B"
_KERNEL_PX, _DILATIONS = 7, 3  # by which the official preprocessing widens a mask
_MOST_DILATIONS = 100
_SIDE_PX = 16  # both sides are multiples of it


@dataclass(frozen=True)
class Job:
    """A video to write. ids: frames of its source; change: of (number in the source, frame) makes what is written."""

    source: VideoFile
    ids: Sequence[int]
    change: Callable[[int, np.ndarray], np.ndarray]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _run(make_parser().parse_args(argv)))


def make_parser() -> argparse.ArgumentParser:
    told, *_, more = (__doc__ or "").split("\n\n")
    parser = Parser(prog="python -m wan.prepare", description=told, epilog=more)
    parser.add_argument("kind", choices=["animate"], help="what is prepared for: a kind of task")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the files; made if it is not there")
    add("--src_pose", metavar="FILE", help="video of poses, or of who moves")
    add("--src_face", metavar="FILE", help="video with the face; square, or cut out by --face_box")
    add(
        "--face_box",
        metavar="X,Y,W,H",
        help="the face in it, in pixels; or a JSON file: boxes by the number of a frame",
    )
    add("--src_ref", metavar="FILE", help="picture of the character")
    add("--src_bg", metavar="FILE", help="video in which a character is replaced; needs --src_mask")
    add("--src_mask", metavar="FILE", help="video that is white where that one is")
    add("--dilate", metavar="N", help=f"widen the mask N times by {_KERNEL_PX // 2} pixels; default {_DILATIONS}")
    add("--size", metavar="W*H", help="its area bounds that of the result; default: that of the task")
    add("--fps", metavar="X", help="frames per second of the result; default: those of the task")
    return parser


def _run(args: argparse.Namespace) -> int:
    spec = load_task(_TASK)
    fps = number(args.fps or spec.sampling.fps, "fps", float, "a number from 1 to 240", lambda n: 1 <= n <= 240)
    paths = {name: getattr(args, name) for name in ANIMATE_FILES if getattr(args, name)}
    if args.face_box and "src_face" not in paths:
        raise UsageError("--face_box is of a video: give --src_face FILE with it")
    if not paths:
        raise UsageError(f"nothing to prepare: give some of {', '.join(f'--{name}' for name in ANIMATE_FILES)}")
    if args.dilate is not None and "src_mask" not in paths:
        raise UsageError("--dilate widens a mask: give --src_mask with it")
    if "src_bg" in paths and "src_mask" not in paths:
        raise UsageError("--src_bg is made black where the character is: give --src_mask with it")
    videos = {name: open_video(path) for name, path in paths.items() if name != "src_ref"}
    picture = read_image(paths["src_ref"]) if "src_ref" in paths else None
    ids = {name: resampled_ids(len(video), video.end, fps) for name, video in videos.items()}
    _check_lengths(ids, fps)
    height, width = _common_size(_area(args.size or spec.sampling.size), videos, picture)
    jobs = _jobs(args, videos, ids, height, width, spec.dit.face_px)
    folder = Path(args.out)
    written = {name: str(folder / ANIMATE_FILES[name]) for name in paths}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out must be a folder, and {printable(folder)} is none")
    check_outputs({f"out, {name}": path for name, path in written.items()}, list(paths.items()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SwanError(f"--out: cannot make {printable(folder)}: {error.strerror or one_line(error)}") from error
    for name, job in jobs.items():
        _write(Path(written[name]), job, fps)
    if picture is not None:
        _write_picture(Path(written["src_ref"]), picture, height, width)
    frames = len(next(iter(ids.values()))) if ids else 0
    report = {"folder": str(folder), "size": f"{width}x{height}", "frames": frames, "fps": fps, "files": written}
    put(json.dumps(report, ensure_ascii=False))
    return 0


def _jobs(
    args: argparse.Namespace,
    videos: dict[str, VideoFile],
    ids: dict[str, list[int]],
    height: int,
    width: int,
    face_px: int,
) -> dict[str, Job]:
    """By name, for the videos that are there."""
    from wan.conditioning.letterbox import letterbox

    times = whole(args.dilate, _DILATIONS, "dilate", 0, _MOST_DILATIONS)

    def fitted(at: int, frame: np.ndarray) -> np.ndarray:
        return letterbox(frame, height, width, by_areas=True)

    def masked(at: int, frame: np.ndarray) -> np.ndarray:
        return _widened(fitted(at, frame), times)

    changes: dict[str, Any] = {"src_pose": fitted, "src_mask": masked}
    if "src_face" in videos:
        changes["src_face"] = _face_change(args.face_box, videos["src_face"], face_px)
    if "src_bg" in videos:
        masks = videos["src_mask"].frames(ids["src_mask"])  # which are asked for one by one, as the background is
        changes["src_bg"] = lambda at, frame: fitted(at, frame) * (masked(at, next(masks)) == 0)
    return {name: Job(video, ids[name], changes[name]) for name, video in videos.items()}


def _check_lengths(ids: dict[str, list[int]], fps: float) -> None:
    if len({len(one) for one in ids.values()}) > 1:
        told = ", ".join(f"--{name} {len(one) / fps:.2f} s" for name, one in ids.items())
        raise UsageError(f"the videos differ in length ({told}): cut the longer ones")


def _area(size: str) -> int:
    parts = str(size).lower().replace("x", "*").split("*")
    if len(parts) != 2 or not all(part.strip().isdecimal() and 0 < int(part) < 100_000 for part in parts):
        raise UsageError(f"--size must be WIDTH*HEIGHT in pixels, such as 1280*720, not {str(size)[:100]!r}")
    return int(parts[0]) * int(parts[1])


def _common_size(area: int, videos: dict[str, VideoFile], picture: np.ndarray | None) -> tuple[int, int]:
    """(height, width) of at most `area`, as high and wide as the reference or, for a replacement, as what it is in."""
    order = ("src_bg", "src_pose", "src_mask") if "src_mask" in videos else ()
    source = next((videos[name] for name in order if name in videos), None)
    if source is None and picture is not None:
        return i2v_size(area, *picture.shape[:2], stride=_SIDE_PX, patch=1)
    source = source or videos.get("src_pose") or next(iter(videos.values()))
    return i2v_size(area, source.height, source.width, stride=_SIDE_PX, patch=1)


def _widened(frame: np.ndarray, times: int) -> np.ndarray:
    """uint8 [H, W, 3] of a mask, black and white, its white parts larger."""
    import cv2
    import numpy as np

    mask = np.where(frame > 127, 255, 0).astype(np.uint8)
    return cv2.dilate(mask, np.ones((_KERNEL_PX, _KERNEL_PX), np.uint8), iterations=times) if times else mask


def _face_change(value: str | None, video: VideoFile, side: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """What cuts the face out of a frame, and squeezes it to a square."""
    from wan.conditioning.letterbox import resized

    if value is None:
        if video.width != video.height:
            told = f"--src_face is {video.width}x{video.height}, which is no square"
            raise UsageError(f"{told}: say with --face_box X,Y,W,H where the face is")
        return lambda at, frame: resized(frame, side, side)
    boxes = _boxes(value, video)
    starts = sorted(boxes)

    def cut(at: int, frame: np.ndarray) -> np.ndarray:
        start = next((one for one in reversed(starts) if one <= at), starts[0])
        left, top, right, bottom = boxes[start]
        return resized(frame[top:bottom, left:right], side, side, by_areas=False)

    return cut


def _boxes(value: str, video: VideoFile) -> dict[int, tuple[int, int, int, int]]:
    """(left, top, right, bottom) by the frame from which they count. value: X,Y,W,H or a JSON file: a list of boxes,
    one a frame, or a table of them by the number of a frame, from 0."""
    allowed = "X,Y,W,H in pixels, or a JSON file: a list of such boxes, or a table of them by frame"
    given: Any = {0: listed(value)}
    if os.path.isfile(value):
        read = read_json(Path(value))
        given = dict(enumerate(read)) if isinstance(read, list) and read and isinstance(read[0], list) else read
        given = {0: given} if isinstance(given, list) else given
    try:
        boxes = {int(at): tuple(map(float, box)) for at, box in given.items()}
        if not boxes or any(len(box) != 4 or at < 0 for at, box in boxes.items()):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"--face_box must be {allowed}, not {printable(value)[:100]}") from None
    found = {}
    for at, box in boxes.items():
        is_face = all(map(math.isfinite, box)) and min(box[2:]) > 0
        left, top, right, bottom = found[at] = face_box(box, video.height, video.width) if is_face else (0, 0, 0, 0)
        if left >= right or top >= bottom:
            told = f"--face_box{f' of frame {at}' if len(boxes) > 1 else ''} {','.join(f'{one:g}' for one in box)}"
            raise UsageError(f"{told} has no part of --src_face, which is {video.width}x{video.height}")
    return found


# Files out


def _write(path: Path, job: Job, fps: float) -> None:
    """The frames of a job as H.264, one at a time. Raises SwanError where it cannot be written."""
    with atomic(path) as temporary:
        frames = zip(job.ids, job.source.frames(job.ids), strict=True)
        at, first = next(frames)
        first = job.change(at, first)
        with _encoder(temporary, first.shape[1], first.shape[0], fps) as take:
            take(first)
            for at, frame in frames:
                take(job.change(at, frame))


@contextmanager
def _encoder(path: Path, width: int, height: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes the frames of a video. OSError where they cannot be written."""
    import imageio_ffmpeg
    import numpy as np

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", *BT709_OPTIONS, *X264_OPTIONS]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, "-f", "mp4", f"file:{path}"], stdin=subprocess.PIPE, stderr=said, start_new_session=True
        )
        try:
            try:
                yield lambda frame: process.stdin.write(np.ascontiguousarray(frame).data.cast("B"))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended, and says why
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
        if process.returncode:
            said.seek(0)
            reason = said.read().decode(errors="replace").strip().splitlines()
            raise OSError(reason[-1] if reason else f"ffmpeg ended with status {process.returncode}")


def _write_picture(path: Path, picture: np.ndarray, height: int, width: int) -> None:
    from PIL import Image

    from wan.conditioning.letterbox import letterbox

    with atomic(path) as temporary:
        Image.fromarray(letterbox(picture, height, width, by_areas=True)).save(temporary, format="PNG")


if __name__ == "__main__":
    run_process(main)
