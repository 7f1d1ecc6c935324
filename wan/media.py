"""Images in, videos and latents out. Every write is atomic; settings travel inside the file.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.errors import SwanError, UsageError, one_line
from wan.files import atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

# x264 splits its work by thread, which changes the bits: a fixed number gives one file on every machine.
X264_OPTIONS = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-threads", "4", "-movflags", "+faststart")


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB, turned upright as its EXIF tag says.

    Raises UsageError where there is no such file and SwanError where it cannot be read as an image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise UsageError(f"no image file {path}")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # PIL reports a broken PNG as SyntaxError and other broken formats as OSError, ValueError or EOFError.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SwanError(f"cannot read image {path}: {one_line(error)}") from error


def write_video(path: str | Path, frames: np.ndarray, fps: int, settings: dict[str, Any]) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264 mp4, or one frame as PNG, by the extension of `path`.

    `settings` is stored as JSON (the mp4 `comment` tag, a PNG text chunk). The file appears whole or not at
    all; the same frames and settings give the same bytes. Raises SwanError when it cannot be written.
    """
    import numpy as np

    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise SwanError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    comment = json.dumps(settings, sort_keys=True)  # ASCII, so it survives any locale
    with atomic(path) as temporary:
        if path.suffix.lower() == ".png":
            if len(frames) != 1:
                raise SwanError(f"{path}: a PNG holds one frame, not {len(frames)}; use .mp4")
            _write_png(temporary, frames[0], comment)
        else:
            _write_mp4(temporary, frames, fps, comment)


def _write_png(path: Path, frame: np.ndarray, comment: str) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", comment)
    Image.fromarray(frame).save(path, format="PNG", pnginfo=info)


def _write_mp4(path: Path, frames: np.ndarray, fps: int, comment: str) -> None:
    import imageio_ffmpeg
    import numpy as np

    _, height, width, _ = frames.shape
    if width % 2 or height % 2:
        raise SwanError(f"an mp4 needs an even width and height, not {width}x{height}")
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *X264_OPTIONS]
    command += ["-metadata", f"comment={comment}", "-f", "mp4", str(path)]
    pixels = memoryview(np.ascontiguousarray(frames)).cast("B")
    # Run directly rather than through imageio_ffmpeg's writer, which does not look at ffmpeg's exit status:
    # a disk that fills up while the index is written would pass unnoticed.
    # In a session of its own, for the terminal's Ctrl-C would end it with an error before this process has heard.
    done = subprocess.run(command, input=pixels, capture_output=True, start_new_session=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(reason[-1] if reason else f"ffmpeg ended with status {done.returncode}")


def save_latents(path: str | Path, latents: torch.Tensor) -> None:
    """Write latents [C, F, H, W] to a safetensors file under the name `latents`. Raises SwanError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(Path(path)) as temporary:
        try:
            save_file({"latents": latents.detach().cpu().contiguous()}, temporary)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings stored by `write_video` in an mp4 or PNG.

    Raises UsageError where there is no such file and SwanError where it holds no settings.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no file {path} to read settings from")
    try:
        comment = _png_comment(path) if path.suffix.lower() == ".png" else _mp4_comment(path)
        settings = json.loads(comment)
    except (OSError, SyntaxError, ValueError) as error:  # PyAV's errors are OSErrors and ValueErrors
        raise SwanError(f"{path} holds no Swan settings: {one_line(error)}") from error
    if not isinstance(settings, dict) or "task" not in settings:
        raise SwanError(f"{path} holds no Swan settings: its comment is something else")
    return settings


def _png_comment(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return getattr(image, "text", {}).get("comment", "")


def _mp4_comment(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return container.metadata.get("comment", "")
