"""kind "loop": a whole sampling run through the package's own loop, solver and conditioning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from wan.cache import StepContext

from tests.golden.cases import Case
from tests.golden.checks import Check, close, exact
from tests.golden.runners import model as model_runner
from tests.golden.runners import vae as vae_runner
from wan.conditioning.condition import Condition
from wan.conditioning.image import image_condition
from wan.conditioning.latent import first_frame_condition
from wan.conditioning.sizes import frame_ids, i2v_size, latent_shape, ti2v_size, vace_size
from wan.conditioning.vace import vace_condition
from wan.conditioning.vace_inputs import as_frames, as_mask, cover, reference
from wan.denoise import denoise
from wan.models.dit.sequence import Times
from wan.solvers import Solver, make_solver

TOLERANCE = 5e-4
VAE_TOLERANCE, VIDEO_TOLERANCE = 1e-4, 3e-4
SIGMA_TOLERANCE = 1e-6
FILMS = ("animate",)  # pipelines that make several clips
EXPERT_NAMES = {"model": "model", "high": "high_noise_model", "low": "low_noise_model"}


def matches(case: Case) -> bool:
    """Loops of one clip; films have runners of their own."""
    is_film = case.meta.get("pipeline") in FILMS
    return case.meta.get("kind") == "loop" and model_runner.is_wan_model(case) and not is_film


def run(case: Case) -> list[Check]:
    generate = case.meta["generate"]
    condition, height, width = _condition(case)
    if "inputs/clip_fea" in case.tensors:
        condition = replace(condition, clip_fea=case.tensors["inputs/clip_fea"])
    frames = case.tensors["outputs/video"].shape[1] if _is_vace(case) else generate["frame_num"]
    channels, length, *size = latent_shape(case.meta["z_dim"], frames, height, width, case.meta["vae_stride"][-1])
    shape = (channels, length + condition.extra_frames, *size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(generate["seed"]))
    solver, trace = sample(case, networks(case), condition, noise)
    final = trace.latents[-1]
    checks = _compare(case, solver, noise, condition, trace)
    if _is_vace(case):
        video = vae_of(case).decode(final[None, :, condition.extra_frames :])[0].clamp(-1, 1)
        context, wanted = condition.context[0], case.tensors["outputs/vace_context"]
        checks += _vace_pixels(case)
        checks.append(close("vace_context", context, wanted, VAE_TOLERANCE))
        checks.append(close("video", video, case.tensors["outputs/video"], VIDEO_TOLERANCE))
    return checks


def _vace_pixels(case: Case) -> list[Check]:
    """What is made of the source, its mask and the references of a case. One grey level is allowed."""
    generate, expected, checks = case.meta["generate"], case.group("outputs"), []
    if "inputs/src_video" in case.tensors:
        source, frames = generate["source"], case.tensors["inputs/src_video"].numpy()
        count, img_h, img_w, _ = frames.shape
        height, width, length = vace_size(source["area"], source["seq_len"], count, img_h, img_w)
        ids = frame_ids([at / source["fps"] for at in range(count)], count / source["fps"], length)
        checks.append(exact("frame ids", ids, case.meta["derived"]["frame_ids"]))
        pixels = torch.stack([cover(frames[at], height, width) for at in ids])
        checks.append(close("frames", as_frames(pixels), expected["frames"], 1 / 127.5))
        if "inputs/src_mask" in case.tensors:
            masks = [mask[..., None].repeat(3, -1) for mask in case.tensors["inputs/src_mask"].numpy()]
            pixels = torch.stack([cover(masks[at], height, width) for at in ids])
            checks.append(close("mask", as_mask(pixels), expected["mask"], 1 / 255))
    height, width = expected["video"].shape[2:]
    for at, image in enumerate(case.listed("inputs/ref_image") or ()):
        pixels = reference(image.numpy(), height, width)
        checks.append(close(f"ref_pixels.{at}", pixels, expected[f"ref_pixels.{at}"], 1e-5))
    return checks


def _is_vace(case: Case) -> bool:
    return case.meta.get("pipeline") == "vace"


def vae_of(case: Case):
    return vae_runner.build(case.meta["vae_config"], case.group("weights_vae"), case.meta)


def networks(case: Case) -> dict:
    """The transformers of a case, by the names of their weights."""
    groups = {name: "weights" if name == "model" else f"weights_{name}" for name in EXPERT_NAMES.values()}
    found = {name: case.group(group) for name, group in groups.items()}
    return {name: model_runner.build(case.config, weights) for name, weights in found.items() if weights}


def sample(case: Case, models: dict, condition: Condition, noise: torch.Tensor) -> tuple[Solver, Trace]:
    """A run of the sampling loop, and all that happens in it."""
    generate = case.meta["generate"]
    solver = make_solver(generate["sample_solver"], steps=generate["sampling_steps"], shift=generate["shift"])
    trace = Trace(case, models, condition)
    scale = generate["guide_scale"]
    final = denoise(
        trace.predict,
        RecordingSolver(solver, trace),
        noise,
        guide_scale=tuple(scale) if isinstance(scale, list) else scale,
        boundary=case.meta.get("boundary"),
        condition=condition,
        on_step=trace.on_step,
    )
    trace.latents.append(final)
    return solver, trace


class Trace:
    """The networks of a case behind ``predict``, and everything the run does with them."""

    def __init__(self, case: Case, models: dict, condition: Condition):
        self.models, self.condition = models, condition
        self.context = {"cond": case.tensors["inputs/context"], "uncond": case.tensors["inputs/context_null"]}
        self.latents, self.model_t, self.noise_pred, self.step_output, self.experts = [], [], [], [], []

    def predict(self, latent: torch.Tensor, times: Times, ctx: StepContext) -> torch.Tensor:
        name = EXPERT_NAMES[ctx.expert]
        if ctx.branch == "cond":
            self.latents.append(latent)
            self.model_t.append(times.t)
        context = [self.context[ctx.branch]]
        return self.models[name](latent[None], times, context, **self.condition.inputs(ctx))[0]

    def on_step(self, ctx: StepContext, latent: torch.Tensor) -> None:
        self.experts.append(EXPERT_NAMES[ctx.expert])


class RecordingSolver:
    """A solver that notes what goes in and what comes out."""

    def __init__(self, solver: Solver, trace: Trace):
        self._solver, self._trace = solver, trace

    def __getattr__(self, name: str):
        return getattr(self._solver, name)

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        self._trace.noise_pred.append(velocity)
        self._trace.step_output.append(self._solver.step(velocity, sample))
        return self._trace.step_output[-1]


def _condition(case: Case) -> tuple[Condition, int, int]:
    """The conditioning of the run with the recorded latent ``z`` in place of the VAE; height and width in pixels.

    Of VACE, whose cases have a VAE, from the pixels and the mask that were recorded.
    """
    generate = case.meta["generate"]
    if _is_vace(case):
        like = torch.zeros_like(case.tensors["outputs/video"])  # what stands for a video that is not given
        frames, mask = case.tensors.get("outputs/frames", like), case.tensors.get("outputs/mask", like[:1] + 1)
        references = case.listed("outputs/ref_pixels") or ()
        scale = generate["context_scale"]
        condition = vace_condition(vae_of(case).encode, frames, mask, references, context_scale=scale)
        return condition, *frames.shape[2:]
    z = case.tensors.get("inputs/z")
    if z is None:
        width, height = generate["size"]
        return Condition(), height, width
    img_w, img_h = generate["image_size"]
    image = np.zeros((img_h, img_w, 3), dtype=np.uint8)
    frames, model_type = generate["frame_num"], case.config["model_type"]

    def encode(video: torch.Tensor) -> torch.Tensor:
        return z[None]

    if model_type == "ti2v":
        height, width = ti2v_size(generate["max_area"], img_h, img_w)
        condition = first_frame_condition(encode, image, num_frames=frames, height=height, width=width)
        return condition, height, width
    height, width = i2v_size(generate["max_area"], img_h, img_w)
    last = image if model_type == "flf2v" else None
    condition = image_condition(encode, image, last, num_frames=frames, height=height, width=width)
    return condition, height, width


def _compare(case: Case, solver, noise: torch.Tensor, condition: Condition, trace: Trace) -> list[Check]:
    expected, derived = case.group("outputs"), case.meta.get("derived", {})
    checks = [
        exact("latent shape", list(noise.shape), derived.get("latent_shape", list(noise.shape))),
        exact("expert per step", trace.experts, derived.get("expert_per_step", trace.experts)),
        exact("timesteps", solver.timesteps, expected["timesteps"]),
        close("sigmas", solver.sigmas, expected["sigmas"], SIGMA_TOLERANCE),
    ]
    if "inputs/noise" in case.tensors:
        checks.append(exact("noise", noise, case.tensors["inputs/noise"]))
    if "y" in expected:
        checks.append(close("y", condition.y[0], expected["y"], TOLERANCE))
    for name in ("latents", "noise_pred", "step_output"):
        if name in expected:
            checks.append(close(name, torch.stack(getattr(trace, name)), expected[name], TOLERANCE))
    if "model_t" in expected:
        # The reference spells one t out for all tokens, and pads; compare the real tokens.
        model_t, wanted = torch.stack(trace.model_t), expected["model_t"]
        if wanted.ndim == 3:
            model_t = model_t[..., None].expand_as(wanted) if model_t.ndim == 2 else model_t
            wanted = wanted[..., : model_t.shape[-1]]
        checks.append(close("model_t", model_t, wanted, 0.0))
    return checks
