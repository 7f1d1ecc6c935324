"""Which code replays which case. A case is known by what it contains, never by its name."""

from __future__ import annotations

from tests.golden.cases import Case
from tests.golden.checks import Check
from tests.golden.runners import animate, audio, clip, loop, model, preprocess, s2v, scheduler, tae, text, vae

# (does this runner know the case?, run it). The first match counts.
RUNNERS = [
    (scheduler.matches, scheduler.run),
    (s2v.matches, s2v.run),
    (loop.matches, loop.run),
    (animate.matches_film, animate.run_film),
    (model.matches, model.run),
    (animate.matches_motion_encoder, animate.run_motion_encoder),
    (animate.matches_face_encoder, animate.run_face_encoder),
    (animate.matches_preprocess, animate.run_preprocess),
    (vae.matches, vae.run),
    (tae.matches, tae.run),
    (text.matches_t5, text.run_t5),
    (text.matches_cleaning, text.run_cleaning),
    (text.matches_tokenizer, text.run_tokenizer),
    (clip.matches, clip.run),
    (audio.matches, audio.run),
    (preprocess.matches_i2v, preprocess.run_i2v),
    (preprocess.matches_flf2v, preprocess.run_flf2v),
    (preprocess.matches_ti2v, preprocess.run_ti2v),
    (preprocess.matches_vace, preprocess.run_vace),
    (s2v.matches_pixels, s2v.run_pixels),
]


def run(case: Case) -> list[Check] | None:
    """The checks of a case, or None if nothing here knows its kind."""
    for matches, runner in RUNNERS:
        if matches(case):
            return runner(case)
    return None
