"""Cases of tiny VAEs (TAEHV, LightTAE): encode, and decode to [0, 1] and to [-1, 1]. Frames come before channels."""

from __future__ import annotations

import torch

from tests.golden.cases import Case, MemorySource
from tests.golden.checks import Check, close

TOLERANCE = 1e-4


def matches(case: Case) -> bool:
    return "latent_channels" in case.config and any(case.tags(f"outputs/{name}") for name in ("latent_", "decoded"))


def run(case: Case) -> list[Check]:
    tae = build(case)
    computations = {
        "latent_": ("video01_", lambda video: tae.encode(2 * video - 1)),
        "decoded01_": ("z_", lambda z: (tae.decode(z) + 1) / 2),
        "decoded_pm1_": ("z_", tae.decode),
    }
    checks = []
    for name, (source, function) in computations.items():
        for tag in case.tags(f"outputs/{name}"):
            actual = function(case.tensors[f"inputs/{source}{tag}"].movedim(1, 2)).movedim(1, 2)
            checks.append(close(name + tag, actual, case.tensors[f"outputs/{name}{tag}"], TOLERANCE))
    return checks


def build(case: Case) -> torch.nn.Module:
    """As a checkpoint's would be: by what its tensors tell."""
    from wan.models.vae import empty_vae
    from wan.weights.assign import load_weights
    from wan.weights.infer import infer_vae_config

    source = MemorySource(case.group("weights"))
    config = infer_vae_config(source) | {"unscaled": bool(case.config.get("need_scaled"))}
    return load_weights(empty_vae(config), source, "vae")
