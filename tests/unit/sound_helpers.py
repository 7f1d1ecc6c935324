"""Files of sound, written for tests."""

import av
import numpy as np
import torch

from wan.models.audio import by_window, steps_of_frames


def tone(rate, seconds, channels=1, hertz=440.0, loudness=0.5):
    """fp32 [channels, samples]"""
    wave = loudness * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def write_sound(path, samples, rate, layout="mono", codec="pcm_s16le"):
    """samples: fp32 [channels, n] in -1..1. Returns the path, as text."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        packed = np.ascontiguousarray(samples.T.reshape(1, -1), np.float32)
        frame = av.AudioFrame.from_ndarray(packed, "flt", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, layout, rate, stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return str(path)


def features(encoder, audio, fps):
    """[layers, D, frames] of all of an audio file, window by window."""
    return torch.cat([encoder(audio, at) for at in by_window(steps_of_frames(audio.samples, fps))], dim=-1)
