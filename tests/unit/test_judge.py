"""The judge of Tiny World against clips whose truth is known, because they are rendered."""

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks.judge import Verdict, judge
from benchmarks.tiny_world import cases
from tools.tiny.world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    Clip,
    combinations,
    held_out,
    render,
    sample,
)

WORDS = Verdict(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)


def frames_of(clip, width=64, height=64):
    """The clip as the pipeline would give it: uint8 [T, H, W, 3]."""
    return ((render(clip, width, height) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def truth(clip):
    return Verdict(clip.color, clip.shape, clip.direction, clip.background)


def clips(count, seed):
    """Random clips of all combinations in turn, each with a size of its own."""
    rng = random.Random(seed)
    combos = combinations()
    return [(sample(rng, [combos[index % len(combos)]]), *rng.choice(SIZES)) for index in range(count)]


def blurred(frames):
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in frames])


def noisy(frames):
    noise = np.random.default_rng(0).normal(0, 6, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


def brighter(frames):
    return (frames * 1.1).clip(0, 255).astype(np.uint8)


def tinted(frames):
    return (frames + np.array([25, -12, -25])).clip(0, 255).astype(np.uint8)


def soft(frames):
    """Half the resolution and back, with the ringing of cubic interpolation, in space and time."""
    height, width = frames.shape[1:3]
    small = [cv2.resize(frame, (width // 2, height // 2), interpolation=cv2.INTER_AREA) for frame in frames]
    large = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in small])
    return ((np.concatenate([large[:1], large[:-1]]).astype(int) + large) // 2).astype(np.uint8)


def everything(frames):
    return noisy(tinted(blurred(frames)))


def rate(pairs):
    pairs = list(pairs)
    return sum(verdict == wanted for verdict, wanted in pairs) / len(pairs)


def test_rendered_truth():
    assert rate((judge(frames_of(*one)), truth(one[0])) for one in clips(120, seed=1)) >= 0.99


@pytest.mark.parametrize("degrade", [blurred, noisy, brighter, tinted, soft, everything])
def test_degraded_truth(degrade):
    assert rate((judge(degrade(frames_of(*one))), truth(one[0])) for one in clips(30, seed=2)) >= 0.95


@pytest.mark.parametrize("field", Verdict._fields)
def test_another_clip_gets_another_word(field):
    clip = Clip("green", "square", "up", "gray")
    for word in getattr(WORDS, field):
        assert judge(frames_of(replace(clip, **{field: word}))) == truth(clip)._replace(**{field: word})


def test_reversed_clip_moves_the_other_way():
    clip = Clip("red", "circle", "right", "black")
    assert judge(frames_of(clip)[::-1]) == truth(clip)._replace(direction="left")


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_nothing_to_see(background):
    empty = np.broadcast_to(np.uint8(BACKGROUNDS[background]), (17, 64, 64, 3))
    nothing = Verdict(None, None, None, background)
    assert judge(empty) == judge(noisy(empty)) == nothing
    appearing = empty.copy()
    appearing[:5] = frames_of(Clip("blue", "circle", "left", background))[:5]
    assert judge(appearing) == nothing


def test_noise_is_not_a_clip():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert judge(noise)[:3] == (None, None, None)


def test_no_direction_without_clear_motion():
    clip = Clip("purple", "triangle", "down", "white")
    still = truth(clip)._replace(direction=None)
    assert judge(frames_of(replace(clip, travel=0))) == still
    assert judge(frames_of(replace(clip, travel=0.05))) == still
    assert judge(frames_of(clip)[:1]) == still
    diagonal = np.stack([np.roll(frame, 2 * time - 16, axis=1) for time, frame in enumerate(frames_of(clip))])
    assert judge(diagonal).direction is None
    back_and_forth = np.concatenate([frames_of(clip)[::2], frames_of(clip)[::-2][1:]])
    assert judge(back_and_forth).direction is None


def test_unheard_of_words():
    def drawn(color, background, outline):
        frames = np.full((17, 64, 64, 3), background, np.uint8)
        for time, frame in enumerate(frames):
            cv2.fillPoly(frame, [np.array(outline) + [20 + time, 32]], color)
        return judge(frames)

    square = [(-9, -9), (9, -9), (9, 9), (-9, 9)]
    assert drawn((220, 40, 40), (12, 12, 12), square) == ("red", "square", "right", "black")
    assert drawn((0, 255, 255), (12, 12, 12), square) == (None, "square", "right", "black")
    assert drawn((220, 40, 40), (60, 200, 60), square) == ("red", "square", "right", None)
    cross = [(-3, -12), (3, -12), (3, -3), (12, -3), (12, 3), (3, 3), (3, 12), (-3, 12), (-3, 3), (-12, 3)]
    cross += [(-12, -3), (-3, -3)]
    bar = [(-14, -4), (14, -4), (14, 4), (-14, 4)]
    assert drawn((220, 40, 40), (12, 12, 12), cross).shape is None
    assert drawn((220, 40, 40), (12, 12, 12), bar).shape is None


def test_the_benchmark_asks_for_held_out_and_trained_clips():
    chosen = cases()
    assert len({clip.prompt for clip, _ in chosen}) == len({seed for _, seed in chosen}) == 64
    unseen = [(clip.color, clip.shape, clip.direction) in held_out() for clip, _ in chosen]
    assert unseen == [False, True] * 32  # so that the first few are half of each
    assert chosen == cases()
    for half in (0, 1):
        of_half = [clip for clip, _ in chosen[half::2]]
        for words, field in zip(WORDS, Verdict._fields):
            counts = [sum(getattr(clip, field) == word for clip in of_half) for word in words]
            assert min(counts) >= 32 / len(words) / 2
