"""What the trainings beside t2v-tiny share: its frozen parts, the noise levels of a batch, and the loop."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.models.dit import WanModel
from wan.models.encoders import TextEncoder, load_text_encoder
from wan.models.vae import WanVAE
from wan.weights.assign import load_weights
from wan.weights.locate import CheckpointFiles
from wan.weights.source import open_source

TIMES = 8  # distinct timesteps in a batch


def load_vae(files: CheckpointFiles, spec, dtype: torch.dtype) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(**spec.vae)
    return load_weights(vae, open_source(files.vae), "vae", device="cpu", dtype=dtype)


class Texts:
    """Embeddings of prompts by the frozen text encoder, each computed once."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self.known: dict[str, Tensor] = {}

    @classmethod
    def of(cls, files: CheckpointFiles, spec) -> Texts:
        how = {"text_len": spec.dit.text_len, "dtype": torch.float32}
        return cls(load_text_encoder(open_source(files.t5), files.tokenizer, **how))

    def __call__(self, texts: list[str]) -> list[Tensor]:
        if new := sorted(set(texts) - self.known.keys()):
            self.known |= zip(new, self.encoder(new))
        return [self.known[text] for text in texts]


def noise_levels(batch: int, shift: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Sigma of each clip, [batch], `TIMES` different ones: stratified between two levels, shifted as in sampling."""
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in (low, high))  # before the shift
    u = first + (last - first) * (torch.arange(TIMES) + torch.rand(TIMES)) / TIMES
    return (shift * u / (1 + (shift - 1) * u)).repeat_interleave(batch // TIMES)


def flow_errors(model: WanModel, latents: Tensor, texts: list[Tensor], sigma: Tensor, **inputs: Any) -> Tensor:
    """Squared errors of the velocity, of the shape of `latents` [B, C, F, h, w] (flow matching, arXiv 2210.02747)."""
    noise = torch.randn_like(latents)
    mix = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model((1 - mix) * latents + mix * noise, sigma * 1000, texts, **inputs)
    return (velocity - (noise - latents)).square()


def fit(
    name: str,
    out: Path,
    trained: dict[str, nn.Parameter],
    loss_of: Callable[[int, random.Random], Tensor],
    *,
    steps: int,
    peak: float,
    seed: int,
    resume: bool = False,
    warm_steps: int = 100,
    cool: float = 0.5,
    average_decay: float = 0.998,
    log_every: int = 50,
    save_every: int = 200,
) -> None:
    """AdamW on some parameters of a model, by name, whose loss at a step `loss_of(step, rng)` gives.

    {name}.pth, their averages, and the log train_{name}.jsonl go to `out`. The rate rises for `warm_steps` and
    falls over the last `cool` of all. `resume` goes on from the last saved step of an earlier run with the same
    arguments.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    weights = list(trained.values())
    average = {key: weight.detach().clone() for key, weight in trained.items()}
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    first, spent, total = 0, 0.0, 0.0
    state_file = out / f"{name}_state.pth"
    if resume and state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for key, weight in trained.items():
                weight.copy_(state["trained"][key])
        average = state["average"]
        first, spent = state["step"], state["seconds"]
        rng.setstate(state["python_rng"])
        torch.set_rng_state(state["torch_rng"])
    start = time.time() - spent
    with (out / f"train_{name}.jsonl").open("a" if resume else "w") as log:
        for step in range(first, steps):
            rate = min(1, (step + 1) / warm_steps) * (0.02 + 0.98 * min(1, (steps - step) / (cool * steps)))
            optimizer.param_groups[0]["lr"] = peak * rate
            loss = loss_of(step, rng)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(average_decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.values()), weights, 1 - decay)
            total += loss.item()
            if (step + 1) % log_every == 0 or step == steps - 1:
                row = {"stage": name, "step": step + 1, "loss": round(total / (step % log_every + 1), 5)}
                row |= {"grad": round(norm.item(), 3), "seconds": round(time.time() - start)}
                print(json.dumps(row), file=log, flush=True)
                total = 0.0
            if (step + 1) % save_every == 0 or step == steps - 1:
                torch.save(average, out / f"{name}.pth")
                state = {"trained": {key: weight.detach() for key, weight in trained.items()}, "average": average}
                state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.time() - start}
                torch.save(state | {"python_rng": rng.getstate(), "torch_rng": torch.get_rng_state()}, state_file)
