"""Sounds of Tiny World: tones and noise that swell and fall, and how loud they are at a time."""

from __future__ import annotations

import random
import wave
from pathlib import Path

import numpy as np

from wan.audio import RATE

WINDOW_S = 0.125  # that loudness is measured in: two frames of s2v-tiny
LOUD = 2.5  # of a sound's root mean square, at which a shape is as large as it becomes
PERIODS_S = (0.55, 1.3)  # of pulses: the VAE's latents are 0.25 s apart


def make_sound(rng: random.Random, seconds: float) -> np.ndarray:
    """fp32 [S] in -1..1, at 16 kHz."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = _carrier(rng, time) * _envelope(rng, time)
    return (rng.uniform(0.05, 0.9) * wave / max(np.abs(wave).max(), 1e-6)).astype(np.float32)


def _carrier(rng: random.Random, time: np.ndarray) -> np.ndarray:
    if rng.random() < 0.35:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(time) + 8)
        width = rng.choice((1, 2, 4, 8))  # of the mean that makes it darker
        return np.convolve(noise, np.ones(width) / width**0.5, "valid")[: len(time)]
    pitch = 2 ** rng.uniform(np.log2(130), np.log2(1200))
    glide = rng.choice((0.0, 0.0, rng.uniform(-0.3, 0.3)))
    phase = 2 * np.pi * pitch * (time + glide * time**2 / 2)
    return sum(np.sin(part * phase) * rng.uniform(0, 1) / part for part in (2, 3, 4)) + np.sin(phase)


def _envelope(rng: random.Random, time: np.ndarray) -> np.ndarray:
    """Pulses of one rate and of one loudness or several, a slow wave, or single bursts; now and then almost silent."""
    kind, period = rng.choice(("pulses", "pulses", "accents", "wave", "bursts")), rng.uniform(*PERIODS_S)
    if kind == "wave":
        return 0.5 - 0.5 * np.cos(2 * np.pi * (time / period + rng.random()))
    starts = np.arange(-rng.random(), time[-1] / period + 1) * period
    if kind == "bursts":
        starts = np.cumsum([rng.uniform(0.5, 1.6) for _ in range(12)]) - 1.6
    on, found = rng.uniform(0.35, 0.6) * period, np.zeros_like(time)
    for start in starts:
        inside = (time >= start) & (time < start + on)
        height = 1.0 if kind == "pulses" else rng.uniform(0.4, 1)
        found[inside] = height * np.sin(np.pi * (time[inside] - start) / on) ** rng.choice((1.0, 2.0))
    return found


def loudness(samples: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Root mean square of sound [S] around each time [T] in seconds, in a Hann window of `WINDOW_S`. Before its
    beginning and behind its end it is silent."""
    half = round(WINDOW_S * RATE / 2)
    power = np.convolve(np.square(samples, dtype=np.float64), np.hanning(2 * half + 1) / half)
    at = np.rint(np.asarray(times) * RATE).astype(int) + half
    return np.sqrt(np.where((at >= 0) & (at < len(power)), power[np.clip(at, 0, len(power) - 1)], 0))


def example_sound() -> np.ndarray:
    """Of s2v-tiny: two clips of a tone that comes and goes, fp32 [S]."""
    time = np.arange(round(1.6 * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 330 * time) * (0.5 - 0.5 * np.cos(2 * np.pi * time / 0.8))).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """fp32 [S] in -1..1 at 16 kHz, as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


def levels(samples: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How loud it is for a sound as loud as this one, from 0 to 1: the same whatever its volume."""
    return np.clip(loudness(samples, times) / (LOUD * max(float(samples.std()), 1e-6)), 0, 1)
