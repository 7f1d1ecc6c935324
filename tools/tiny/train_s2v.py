"""Trains what s2v-tiny hears with, in the shape of Wan2.2 S2V, beside the frozen transformer of t2v-tiny.

A shape stays where a picture shows it and is as large as a sound is loud, see `radii`. The network sees what `S2VFilm`
makes at inference: the picture, what the audio encoder makes of each frame's sound and, in half of the clips, the last
frames of the film before it. Flow matching as in train_dit.py. Audio comes in as zeros at first, so nothing is changed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tools.tiny.fit import Texts, fit, flow_errors, load_vae, noise_levels
from tools.tiny.lora import load_dit
from tools.tiny.sound import levels, make_sound, write_wav
from tools.tiny.world import BACKGROUNDS, Clip, render_moved, still_words
from wan.audio import open_audio
from wan.models.audio import AudioEncoder, load_audio_encoder, steps_of_frames
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.weights.locate import locate
from wan.weights.source import open_source

BATCH = 16  # clips
SIDE = 64  # px
SHIFTS = (7.0, 3.0)  # of sigma, by turns: where the shape is, and how large
SMALL, LARGE = 0.11, 0.25  # radius in silence, and where it is as loud as can be
ROOM = 0.28  # from the edges to a shape's centre
TEMPLATES = (
    "a {color} {shape} pulsing on a {background} background",
    "A {color} {shape} pulses on a {background} background.",
    "the {color} {shape} pulsing over {background}",
    "{color} {shape}, {background} background, pulsing",
)
SHORT = ("it pulses", "pulsing")  # the picture shows the rest


class Examples(NamedTuple):
    """Clips that begin a film (M = 0), or go on (M = 3): `[n, 16, M or 1, h, w]` before, `[n, 16, 5, h, w]` to make.

    pictures: [n, 16, 1, h, w]; features: [n, layers, D, 20] of the sound
    """

    clips: list[Clip]
    pictures: Tensor
    motion: Tensor
    latents: Tensor
    features: Tensor


def radii(samples: np.ndarray, frames: np.ndarray, fps: float) -> Tensor:
    """Radius of the shape in each of `frames` [T] of a film with this sound: fp32 [T]."""
    return torch.from_numpy(SMALL + (LARGE - SMALL) * levels(samples, np.asarray(frames) / fps)).float()


def sample(rng: random.Random, pairs: list[tuple[str, str]]) -> Clip:
    color, shape = rng.choice(pairs)
    x, y = (rng.uniform(ROOM, 1 - ROOM) for _ in range(2))
    return Clip(color, shape, "right", rng.choice(list(BACKGROUNDS)), rng.uniform(0.13, 0.21), x, y, 0.0)


def features_of(hear: AudioEncoder, sound: np.ndarray, fps: float) -> Tensor:
    """[layers, D, frames] of sound [S], as of a file."""
    with tempfile.TemporaryDirectory() as folder:
        write_wav(Path(folder, "a.wav"), sound)
        audio = open_audio(Path(folder, "a.wav"))
        return hear(audio, steps_of_frames(audio.samples, fps))


@torch.no_grad()
def examples(vae: WanVAE, hear: AudioEncoder, spec, rng: random.Random, count: int, goes_on: bool) -> Examples:
    frames, before, fps = spec.sampling.infer_frames, spec.dit.motion_frames, spec.sampling.fps
    found, (trained, _) = [], still_words()
    for _ in range(count // 8):
        clips, parts = [sample(rng, trained) for _ in range(8)], []
        for clip in clips:
            sound = make_sound(rng, rng.uniform(2.0, 3.5))
            features = features_of(hear, sound, fps)
            first = rng.randrange(before, features.shape[-1] - frames) if goes_on else 0
            center = torch.tensor([[clip.x, clip.y]])
            still = render_moved(clip, SIDE, SIDE, center, torch.tensor(clip.radius))
            shown = np.arange(first - (before if goes_on else 0), first + frames)
            film = render_moved(clip, SIDE, SIDE, center.expand(len(shown), 2), radii(sound, shown, fps))
            parts.append((still, film if goes_on else torch.cat([still, film], 1), features[..., first:][..., :frames]))
        stills, films, features = (torch.stack(one) for one in zip(*parts))
        latents = vae.encode(films.to(vae.conv1.weight.dtype)).float()
        given = latents.shape[2] - frames // 4
        pictures = vae.encode(stills.to(vae.conv1.weight.dtype)).float()
        found.append(Examples(clips, pictures, latents[:, :, :given], latents[:, :, given:], features))
    return Examples(sum((one.clips for one in found), []), *(torch.cat(part) for part in list(zip(*found))[1:]))


def describe(clip: Clip, rng: random.Random) -> str:
    """A prompt: a tenth leave the shape to the picture."""
    template = TEMPLATES[0] if rng.random() < 0.5 else rng.choice(TEMPLATES)
    template = rng.choice(SHORT) if rng.random() < 0.1 else template
    return template.format(color=clip.color, shape=clip.shape, background=clip.background)


def build(dit: WanModel, spec) -> WanModel:
    """The transformer of s2v-tiny from that of t2v-tiny, which is frozen; what is trained requires a gradient."""
    model = WanModel(**spec.dit)
    model.load_state_dict(dit.state_dict(), strict=False)
    model.requires_grad_(False)
    [adapter] = model.adapters
    for module in adapter.names.values():
        module.requires_grad_(True)
    for injector in adapter.injector.injector:
        nn.init.zeros_(injector.o.weight)
        nn.init.zeros_(injector.o.bias)
    for weight in (adapter.cond_encoder.weight, adapter.cond_encoder.bias, adapter.marks.weight):
        nn.init.zeros_(weight)
    return model


def loss_of(model: WanModel, data: Examples, picks: list[int], goes_on: bool, texts, unheard: Tensor, shift: float):
    """unheard: bool [n], of the clips that are made without text and sound, for guidance"""
    latents, features = data.latents[picks], data.features[picks]
    features = features.masked_fill(unheard.view(-1, 1, 1, 1), 0)
    frames = model.adapters[0].motion_frames
    errors = flow_errors(
        model,
        latents,
        texts,
        noise_levels(len(picks), shift),
        ref_latents=data.pictures[picks],
        motion_latents=data.motion[picks] if goes_on else None,
        cond_states=torch.zeros_like(latents),
        audio_input=features,
        motion_frames=(frames, (frames + 3) // 4),
    )
    return errors.mean()


def load_data(out: Path, tiny: Path, spec, count: int, seed: int, resume: bool) -> dict[bool, Examples]:
    kept, base = out / "s2v_examples.pth", load_task("t2v-tiny")
    if not (resume and kept.is_file()):
        vae = load_vae(locate(tiny, base), base, torch.bfloat16)
        hear, rng = load_audio_encoder(open_source(out / "wav2vec2")), random.Random(seed)
        torch.save({way: examples(vae, hear, spec, rng, count // 2, way) for way in (False, True)}, kept)
    with torch.serialization.safe_globals([Clip, Examples]):
        return torch.load(kept, weights_only=True)


def train(
    out: Path, tiny: Path, steps: int, clips: int = 1600, peak: float = 1e-3, seed: int = 0, resume: bool = False
) -> None:
    """`tiny` is the checkpoint folder of t2v-tiny; `train_audio` has written the audio encoder to `out`, where
    s2v.pth, the averaged weights of what was trained, and a log go.

    `resume` goes on from the last saved step of an earlier run with the same arguments, or with its examples.
    """
    torch.manual_seed(seed)
    spec, base = load_task("s2v-tiny"), load_task("t2v-tiny")
    files = locate(tiny, base)
    data = load_data(out, tiny, spec, clips, seed, resume)
    texts, model = Texts.of(files, spec), build(load_dit(files.dit["model"], base), spec)

    def loss(step: int, rng: random.Random) -> Tensor:
        goes_on = rng.random() < 0.5
        pool = data[goes_on]
        picks = rng.sample(range(len(pool.clips)), BATCH)
        unheard = torch.tensor([rng.random() < 0.1 for _ in picks])
        prompts = ["" if silent else describe(pool.clips[at], rng) for at, silent in zip(picks, unheard)]
        return loss_of(model, pool, picks, goes_on, texts(prompts), unheard, SHIFTS[step % len(SHIFTS)])

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fit("s2v", out, trained, loss, steps=steps, peak=peak, seed=seed, resume=resume)
