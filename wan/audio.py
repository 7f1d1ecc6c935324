"""Sound in: any file that FFmpeg reads, as one channel at 16 kHz; and how much of it there is, in the units of S2V.

Heavy libraries are imported where they are used, so that `generate.py --help` stays quick.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.errors import SwanError, UsageError, printable
from wan.video import opened_container

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000  # samples a second
STEPS_PER_S, FEATURES_PER_S = 50, 30  # of the audio encoder, as it is counted; and of what is made of its steps
WIDTHS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # of the encoder's convolutions
SILENT = 1e-3  # -60 dB of the loudest that there can be
_LEAST_STEPS = 2
_AT_ONCE, _MOST_BEFORE = 0.05, 3600.0  # s that sound may begin later than the picture: not heard, and the most
_TELL_LENGTH = ("wav", "flac", "aiff", "mov,mp4,m4a,3gp,3g2,mj2")  # in their headers; of others it is guessed
_LEAST_HELD = 0.9  # of what is claimed
_FORMATS = "mp3,wav,w64,flac,aac,aiff,ogg,caf,au,amr,ac3,eac3,dts,wv,ape,tta"  # without a picture


@dataclass(frozen=True)
class AudioFile:
    """path: absolute; samples: of one channel at 16 kHz; peak: the largest of them, of 1; level: mean and standard
    deviation of all, which the encoder wants to be 0 and 1"""

    path: str
    samples: int
    peak: float
    level: tuple[float, float] = (0.0, 1.0)

    @property
    def seconds(self) -> float:
        return self.samples / RATE

    @property
    def is_silent(self) -> bool:
        return self.peak < SILENT

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """fp32 samples of one channel, the mean of all: the first to the last."""
        import numpy as np

        last = self.samples if last is None else min(last, self.samples)
        out, at = np.zeros(max(last - first, 0), np.float32), 0
        for part in _parts(self.path):
            if at >= last:
                break
            here = part[max(first - at, 0) : last - at]
            start = max(at - first, 0)
            out[start : start + len(here)] = here
            at += len(part)
        return out

    def clips(self, clip_frames: int, fps: int) -> int:
        """Clips of so many frames that it needs."""
        return clips_of(features_of(steps_of(self.samples)), clip_frames, fps)


def open_audio(path: Any) -> AudioFile:
    """Listen to a file, part by part, once to its end.

    Raises UsageError where there is no such file and SwanError where it holds no sound, or none that can be read.
    """
    import numpy as np

    if not os.path.isfile(path):
        raise UsageError(f"--audio: no file {printable(path)}")
    samples, peak, total, squares = 0, 0.0, 0.0, 0.0
    for part in _parts(str(path)):
        samples, peak = samples + len(part), max(peak, float(np.abs(part).max(initial=0)))
        total, squares = total + part.sum(dtype=np.float64), squares + np.square(part, dtype=np.float64).sum()
    if steps_of(samples) < _LEAST_STEPS:
        raise SwanError(f"cannot read audio {printable(path)}: it lasts {samples / RATE:.3f} s, which is too short")
    mean = total / samples
    level = float(mean), math.sqrt(max(squares / samples - mean**2, 0.0) + 1e-7)
    return AudioFile(str(Path(path).resolve()), samples, peak, level)


def steps_of(samples: int) -> int:
    """Steps that the audio encoder makes of so many samples."""
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        samples = max(0, (samples - width) // stride + 1)
    return samples


def features_of(steps: int) -> int:
    """Features that are made of so many steps."""
    return int(steps / STEPS_PER_S * FEATURES_PER_S)


def clips_of(features: int, clip_frames: int, fps: int) -> int:
    """Clips of so many frames that sound with so many features needs. One that just ends has another one begin.

    Source: behaviour of the official `AudioEncoder.get_audio_embed_bucket_fps`.
    """
    return int(features / (clip_frames * (FEATURES_PER_S / fps))) + 1


def _parts(path: str) -> Iterator[np.ndarray]:
    """fp32 [n] each, one after another, whatever the channels, their rate and how they are coded."""
    import numpy as np
    from av import AudioFrame, AudioResampler

    with opened_container(path, "audio", _FORMATS) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise SwanError("it has no sound")
        if stream.codec_context is None:
            raise SwanError("how its sound is coded is not known")
        stream.thread_type = "AUTO"
        yield from _before(container, stream)
        rate, resampler, held = 0, None, 0.0
        for piece, its_rate in _pieces(container, stream):
            if its_rate != rate:  # it may change on the way
                yield from _flushed(resampler)
                rate, resampler = its_rate, AudioResampler("flt", "mono", RATE)
            if not np.isfinite(piece).all():
                raise SwanError("some of its samples are no numbers")
            held += len(piece) / rate
            mono = AudioFrame.from_ndarray(piece.mean(1, dtype=np.float32)[None], "flt", "mono")
            mono.sample_rate = rate
            for part in resampler.resample(mono):
                yield part.to_ndarray()[0]
        yield from _flushed(resampler)
        if resampler is None:
            raise SwanError("its sound is empty")
        claimed = float(stream.duration * stream.time_base) if stream.duration else 0.0
        if container.format.name in _TELL_LENGTH and held < _LEAST_HELD * claimed:
            raise SwanError(f"cut off: it claims {claimed:.1f} s and holds {held:.1f}")


def _before(container: Any, stream: Any) -> Iterator[np.ndarray]:
    """The silence of a file whose sound begins later than its picture, second by second."""
    import numpy as np

    begins = float((stream.start_time or 0) * stream.time_base) - (container.start_time or 0) / 1e6
    if begins > _MOST_BEFORE:
        raise SwanError(f"its sound begins after {begins:.0f} s: cut it")
    left = round(begins * RATE) if begins > _AT_ONCE else 0
    while left > 0:
        yield np.zeros(min(left, RATE), np.float32)
        left -= RATE


def _pieces(container: Any, stream: Any) -> Iterator[tuple[np.ndarray, int]]:
    """(fp32 [n, channels], samples a second) of what is decoded, piece by piece."""
    from av import AudioResampler

    known, to_float = None, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise SwanError("damaged or cut off")
        for frame in packet.decode():
            kind = frame.format.name, frame.layout.name, frame.sample_rate
            if kind != known:
                known, to_float = kind, AudioResampler("flt", frame.layout, frame.sample_rate)
            for piece in to_float.resample(frame):  # packed: PyAV miscounts the planes of eight channels
                yield piece.to_ndarray().reshape(-1, frame.layout.nb_channels), frame.sample_rate


def _flushed(resampler: Any) -> Iterator[np.ndarray]:
    """What a resampler still holds."""
    for part in resampler.resample(None) if resampler is not None else ():
        yield part.to_ndarray()[0]
