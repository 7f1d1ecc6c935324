"""Trains what animate-tiny follows with, in the shape of Wan2.2 Animate, beside the frozen blocks of t2v-tiny.

A pose video shows a dot that moves along a path, a face video a mouth that opens and closes: the shape of the reference
goes along the path, and is as large as the mouth is open. The network sees what `AnimateFilm` makes at inference, at
the beginning of a film and where it goes on. Flow matching as in train_dit.py. Its own are the patch embedding, which
begins as that of t2v-tiny with zeros for the channels of the condition, and Animate's adapters, which add nothing at
first.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tools.tiny.fit import Texts, fit, flow_errors, load_vae, noise_levels
from tools.tiny.lora import load_dit
from tools.tiny.world import BACKGROUNDS, NUM_FRAMES, SIZES, Clip, picture, render_moved, still_words
from wan.conditioning.animate import clip_mask
from wan.media import write_video
from wan.models.dit import WanModel
from wan.models.dit.adapters.animate import Face
from wan.models.vae import WanVAE
from wan.tasks import load_task
from wan.tasks.animate import ANIMATE_FILES
from wan.weights.locate import locate

BATCH = 16  # clips
SHIFTS = (7.0, 2.0)  # of sigma, by turns: where the shape is, and how exactly what is given is kept
DOT = Clip("yellow", "circle", "right", "black", radius=0.1)  # of a pose video
MARGIN = 0.22  # of the frame, where no path goes
LENGTHS = (0.25, 0.9)  # of paths, in sides of the frame
SMALL, LARGE = 0.13, 0.21  # radius with the mouth shut, and wide open
MOUTHS = 16  # ways that it is open
KNOWN = ((0, 0.6), (1, 0.25), (5, 0.15))  # frames of the film before, and how often
TEMPLATES = (
    "a {color} {shape} following a path on a {background} background",
    "A {color} {shape} follows a path on a {background} background.",
    "the {color} {shape} following a path over {background}",
    "{color} {shape}, {background} background, following a path",
)
SHORT = ("a shape following a path", "it follows the path", "following a path")  # the reference shows the rest


class Examples(NamedTuple):
    """Clips of one size: latents `[n, 16, 1 + 5, h, w]` of the reference and of what is to be made, the condition
    `[n, 20, 1 + 5, h, w]`, that of the pose `[n, 16, 5, h, w]`; mouths: int64 [n, 17]."""

    clips: list[Clip]
    latents: Tensor
    conditions: Tensor
    poses: Tensor
    mouths: Tensor


def path(rng: random.Random, frames: int = NUM_FRAMES) -> Tensor:
    """Where a shape is, [frames, 2] as fractions of width and height: along a smooth curve, evenly or slower at its
    ends."""
    controls = np.array([[rng.uniform(MARGIN, 1 - MARGIN) for _ in range(2)] for _ in range(4)])
    u = np.linspace(0, 1, 200)[:, None]
    curve = sum(math.comb(3, n) * u**n * (1 - u) ** (3 - n) * controls[n] for n in range(4))  # Bezier's
    passed = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    time = np.linspace(0, 1, frames)
    time = time if rng.random() < 0.5 else time * time * (3 - 2 * time)
    at = min(passed[-1], rng.uniform(*LENGTHS)) * time
    return torch.from_numpy(np.stack([np.interp(at, passed, curve[:, axis]) for axis in range(2)], 1)).float()


def face_picture(mouth: float, side: int) -> np.ndarray:
    """A face whose mouth is open so far, 0..1: uint8 [side, side, 3]."""
    large = 4 * side  # made smaller, its edges are soft
    face = np.full((large, large, 3), 40, np.uint8)
    half = large // 2
    cv2.ellipse(face, (half, half), (int(0.4 * large), int(0.47 * large)), 0, 0, 360, (225, 180, 150), -1)
    for x in (-1, 1):
        cv2.circle(face, (half + int(0.15 * x * large), int(0.35 * large)), int(0.05 * large), (60, 40, 30), -1)
    tall = max(1, int((0.02 + 0.16 * mouth) * large))
    cv2.ellipse(face, (half, int(0.7 * large)), (int(0.17 * large), tall), 0, 0, 360, (90, 20, 30), -1)
    return cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)


def mouth(rng: random.Random, frames: int = NUM_FRAMES) -> np.ndarray:
    """How far it is open in each frame, 0..1, in steps: float64 [frames]."""
    wave = np.sin(2 * np.pi * (np.arange(frames) / rng.uniform(10, 30) + rng.random()))
    middle, swing = rng.uniform(0.3, 0.7), rng.uniform(0, 0.5)
    return np.round(np.clip(middle + swing * wave, 0, 1) * (MOUTHS - 1)) / (MOUTHS - 1)


def radii(mouths: np.ndarray) -> Tensor:
    return torch.from_numpy(SMALL + (LARGE - SMALL) * mouths).float()


def act(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[Clip, Tensor, np.ndarray]:
    """What a reference shows, of one of the (color, shape), where it goes, and how far the mouth is open."""
    color, shape = rng.choice(pairs)
    x, y = (rng.uniform(0.3, 0.7) for _ in range(2))
    clip = Clip(color, shape, "right", rng.choice(list(BACKGROUNDS)), rng.uniform(0.15, 0.22), x, y, 0.0)
    return clip, path(rng), mouth(rng)


def example_act() -> tuple[Clip, Tensor, np.ndarray]:
    """Of animate-tiny: a reference, two clips of its path around the middle, and how far the mouth is open."""
    turn = torch.linspace(0, 2 * math.pi, 2 * NUM_FRAMES - 1)
    centers = 0.5 + 0.24 * torch.stack([torch.cos(turn), torch.sin(turn)], 1)
    return Clip("blue", "square", "right", "white", 0.18, 0.5, 0.5, 0.0), centers, 0.5 - 0.5 * np.cos(2 * turn.numpy())


def write_inputs(folder: Path, clip: Clip, centers: Tensor, mouths: np.ndarray, width: int, height: int, spec) -> None:
    """The files of --src_root_path for an act: reference, pose and face."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(clip, width, height)).save(folder / ANIMATE_FILES["src_ref"], optimize=True)
    pose = render_moved(DOT, width, height, centers, torch.tensor(DOT.radius))
    frames = ((pose + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    faces = np.stack([face_picture(one, spec.dit.face_px) for one in mouths])
    for name, video in (("src_pose", frames), ("src_face", faces)):
        write_video(folder / ANIMATE_FILES[name], np.ascontiguousarray(video), spec.sampling.fps, {})


@torch.no_grad()
def examples(vae: WanVAE, rng: random.Random, count: int) -> dict[tuple[int, int], Examples]:
    """By size: `count` of 64x64, a twentieth of that at each other one; by eights."""

    def encode(videos: list[Tensor]) -> Tensor:
        return vae.encode(torch.stack(videos).to(vae.conv1.weight.dtype)).float()

    found, (trained, _) = {}, still_words()
    for size in SIZES:
        width, height = size
        nothing, rows = torch.zeros(3, NUM_FRAMES, height, width), []
        empty = encode([nothing])
        for _ in range(max(1, (count if size == SIZES[0] else count // 20) // 8)):
            clips, centers, mouths = zip(*(act(rng, trained) for _ in range(8)))
            places = [torch.tensor([[one.x, one.y]]) for one in clips]
            references = encode(
                [render_moved(one, *size, at, torch.tensor(one.radius)) for one, at in zip(clips, places)]
            )
            videos = [render_moved(one, *size, at, radii(open_)) for one, at, open_ in zip(clips, centers, mouths)]
            poses = encode([render_moved(DOT, *size, at, torch.tensor(DOT.radius)) for at in centers])
            known = rng.choices([n for n, _ in KNOWN], [share for _, share in KNOWN], k=8)
            begun = [torch.cat([video[:, :n], nothing[:, n:]], 1) for video, n in zip(videos, known) if n]
            given = empty.repeat(8, 1, 1, 1, 1)
            if begun:
                given[[at for at, n in enumerate(known) if n]] = encode(begun)
            masks = torch.stack([clip_mask(NUM_FRAMES, *poses.shape[-2:], known=n) for n in known])
            first = torch.cat([torch.ones_like(references[:, :4]), references], 1)
            conditions = torch.cat([first, torch.cat([masks, given], 1)], 2)
            levels = torch.from_numpy(np.rint(np.stack(mouths) * (MOUTHS - 1)).astype(np.int64))
            rows.append((clips, torch.cat([references, encode(videos)], 2), conditions, poses, levels))
        groups, *parts = zip(*rows)
        found[size] = Examples([clip for group in groups for clip in group], *map(torch.cat, parts))
    return found


def describe(clip: Clip, rng: random.Random) -> str:
    """A prompt: half leave the shape to the reference."""
    template = TEMPLATES[0] if rng.random() < 0.5 else rng.choice(TEMPLATES)
    template = rng.choice(SHORT) if rng.random() < 0.5 else template
    return template.format(color=clip.color, shape=clip.shape, background=clip.background)


def build(dit: WanModel, spec) -> WanModel:
    """The transformer of animate-tiny from that of t2v-tiny, whose blocks are frozen; what is trained requires a
    gradient."""
    model, state = WanModel(**spec.dit), dit.state_dict()
    embedding = state.pop("patch_embedding.weight")
    more = torch.zeros(len(embedding), spec.dit.in_dim - embedding.shape[1], *embedding.shape[2:])
    model.load_state_dict(state | {"patch_embedding.weight": torch.cat([embedding, more], 1)}, strict=False)
    model.requires_grad_(False)
    [adapter] = model.adapters
    for module in (*adapter.names.values(), model.patch_embedding):
        module.requires_grad_(True)
    for layer in (adapter.pose_patch_embedding, *(block.linear2 for block in adapter.fuser_blocks)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def faces(model: WanModel, pictures: Tensor, mouths: Tensor) -> Face:
    """A batch of face videos, encoded as `Animate` does it, but each picture once.

    pictures: [MOUTHS + 1, 3, S, S] in [-1, 1], the last black; mouths: [B, T], which of them
    """
    [adapter] = model.adapters
    motion = adapter.motion_encoder(pictures)[mouths]
    face = Face(torch.empty(len(mouths), 3, mouths.shape[1], 0, 0))
    face.tokens = F.pad(adapter.face_encoder(motion), (0, 0, 0, 0, 1, 0))
    return face


def train(
    out: Path, tiny: Path, steps: int, clips: int = 640, peak: float = 1e-3, seed: int = 0, resume: bool = False
) -> None:
    """`tiny` is the checkpoint folder of t2v-tiny. animate.pth, the averaged weights of what was trained, and a log go
    to `out`.

    `resume` goes on from the last saved step of an earlier run with the same arguments, or with its examples.
    """
    torch.manual_seed(seed)
    spec, base = load_task("animate-tiny"), load_task("t2v-tiny")
    files, kept = locate(tiny, base), out / "animate_examples.pth"
    if not (resume and kept.is_file()):
        torch.save(examples(load_vae(files, base, torch.bfloat16), random.Random(seed), clips), kept)
    with torch.serialization.safe_globals([Clip, Examples]):
        data = torch.load(kept, weights_only=True)
    texts, model = Texts.of(files, spec), build(load_dit(files.dit["model"], base), spec)
    side = spec.dit.face_px
    seen = [face_picture(level / (MOUTHS - 1), side) for level in range(MOUTHS)] + [np.zeros((side, side, 3), np.uint8)]
    pictures = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def loss(step: int, rng: random.Random) -> Tensor:
        pool = data[SIZES[0] if rng.random() < 0.92 else rng.choice(SIZES[1:])]
        picks = rng.sample(range(len(pool.clips)), BATCH)
        unsaid = torch.tensor([rng.random() < 0.1 for _ in picks])  # made without text and face, for guidance
        prompts = ["" if empty else describe(pool.clips[at], rng) for at, empty in zip(picks, unsaid)]
        with torch.autocast("cpu", torch.bfloat16):
            face = faces(model, pictures, pool.mouths[picks].masked_fill(unsaid[:, None], MOUTHS))
        inputs = {"y": pool.conditions[picks], "pose_latents": pool.poses[picks], "face_pixel_values": face}
        sigma = noise_levels(BATCH, SHIFTS[step % len(SHIFTS)])
        return flow_errors(model, pool.latents[picks], texts(prompts), sigma, **inputs).mean()

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fit("animate", out, trained, loss, steps=steps, peak=peak, seed=seed, resume=resume)
