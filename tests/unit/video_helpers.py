"""Videos as cameras, editors and browsers leave them, made with FFmpeg's encoders in this process."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def ramp(count, width=64, height=48):
    """uint8 [T, H, W, 3]: frame k is grey 10 + 10 k, with a white square at the top left."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (10 + 10 * np.arange(count))[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 255
    return frames


def write(
    path, frames, codec="libx264", pix_fmt="yuv444p", fps=16, times=None, rotation=None, container=None, **options
):
    """A file by its extension. times: of each frame in 1/1000 s; rotation: as ffmpeg's -display_rotation; container,
    options: those of FFmpeg for the file and for the codec."""
    if codec == "libx264":
        options = {"crf": "1", **options}
    with av.open(str(path), "w", options=container or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format={3: "rgb24", 4: "rgba"}[pixels.shape[-1]])
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if rotation is not None:
            stream.set_display_rotation(rotation)
        container.mux(stream.encode())
    return path


def sound(path):
    """A file of half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "pcm_s16le", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def still(path, pixels):
    Image.fromarray(pixels).save(path)
    return path
