"""VAE cases: encode and decode, raw and normalised, single and batched, and the round trip."""

from __future__ import annotations

import torch

from tests.golden.cases import Case
from tests.golden.checks import Check, close

TOLERANCE = 1e-4
CONFIG_KEYS = {"dim", "z_dim", "num_res_blocks", "temperal_downsample", "dim_mult"}


def matches(case: Case) -> bool:
    return CONFIG_KEYS.issubset(case.config) and any(
        case.tags(f"outputs/{name}") for name in ("latent_", "decoded_", "roundtrip_")
    )


def run(case: Case) -> list[Check]:
    vae = build(case.config, case.group("weights"), case.meta)
    # "<what is stored>": (input prefix, function of a batch). A stored result without a batch axis had one element.
    computations = {
        "latent_raw": ("video", vae.encode_raw),
        "latent_norm": ("video", vae.encode),
        "decoded_raw": ("z", vae.decode_raw),
        "decoded_norm": ("z", vae.decode),
        "roundtrip_norm": ("video", lambda video: vae.decode(vae.encode(video))),
    }
    checks = []
    for name, (source, function) in computations.items():
        for tag in case.tags(f"outputs/{name}"):
            expected = case.tensors[f"outputs/{name}{tag}"]
            given = case.tensors[f"inputs/{source}{tag}"]
            actual = function(given if given.ndim == 5 else given[None])
            checks.append(close(name + tag, _like(actual, expected), expected, TOLERANCE))
    return checks


def build(config: dict, weights: dict[str, torch.Tensor], meta: dict):
    from wan.models.vae import WanVAE

    kept = 1 - config.get("pruning_rate", 0)  # LightVAE: the same network with narrower layers
    vae = WanVAE(
        version="2.2" if "dec_dim" in config or meta.get("spatial_factor") == 16 else "2.1",
        dim=int(config["dim"] * kept),
        dec_dim=config.get("dec_dim"),
        z_dim=config["z_dim"],
        dim_mult=config["dim_mult"],
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=config["temperal_downsample"],
        latent_mean=meta.get("latent_mean"),
        latent_std=meta.get("latent_std"),
    )
    vae.load_state_dict(weights)
    return vae.eval()


def _like(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return actual[0] if expected.ndim == actual.ndim - 1 and actual.shape[0] == 1 else actual
