"""The row of a whole video."""

from __future__ import annotations

from typing import Any

import torch
from wan.cache import StepContext

from benchmarks.common import timed
from benchmarks.gpu.bench import BF16, Bench, stored, weight_bytes
from benchmarks.random_weights import RandomSource, on_meta
from wan.denoise import denoise
from wan.models.attention import get_attention
from wan.models.dit import WanModel
from wan.models.dit.sequence import Times
from wan.solvers import make_solver
from wan.weights.assign import load_weights

_STEPS = [1000, 750, 500, 250]  # of a distilled A14B
_BOUNDARY = 0.875


def four_steps(bench: Bench) -> dict[str, Any]:
    """81 frames at 480p in four steps without guidance, two steps by each of two experts of 14B, and the VAE in bf16:
    from the text's embedding to pixels. Both experts stay on the device, as Q4_K where bf16 does not fit."""
    bench.clear()
    config, latent = bench.config("14B"), bench.shapes.latents["480p"]
    kind = "" if not bench.is_cuda or _fits(bench, 2 * weight_bytes(config)) else "Q4_K"
    bench.need(2 * weight_bytes(config, kind), "two experts")
    source = RandomSource(on_meta(config), bench.device, stored(kind))
    experts = {name: _expert(bench, config, source, bool(kind)) for name in ("high", "low")}
    vae = bench.vae(BF16)
    noise, _, text = bench.inputs(config, latent)
    used: list[str] = []

    def predict(latent: torch.Tensor, times: Times, ctx: StepContext) -> torch.Tensor:
        used.append(ctx.expert)
        return experts[ctx.expert](latent, times, text)

    def sample() -> torch.Tensor:
        solver = make_solver("euler", steps=len(_STEPS), shift=5.0, denoising_step_list=_STEPS)
        return denoise(predict, solver, noise, guide_scale=1.0, boundary=_BOUNDARY)

    with torch.inference_mode(), bench.peak() as peak:
        denoising, latents = timed(sample, bench.device)
        experts.clear()  # as a run that offloads does
        decoding, pixels = timed(lambda: vae.decode(latents), bench.device)
        frames = pixels.clamp(-1, 1).add(1).mul(127.5).to(torch.uint8).cpu()
    found = {"seconds": denoising + decoding, "denoise": denoising, "decode": decoding, "experts": used}
    return found | {"weights": kind or "bf16", "video": list(frames.shape), **peak}


def _fits(bench: Bench, size: float) -> bool:
    return size + (12 << 30) < torch.cuda.mem_get_info(bench.device)[0]


def _expert(bench: Bench, config: dict[str, Any], source: RandomSource, packed: bool) -> WanModel:
    model = load_weights(on_meta(config).eval(), source, "dit", device=bench.device, dtype=BF16, stream=packed)
    model.attention = get_attention(bench.attention("auto"))
    return model
