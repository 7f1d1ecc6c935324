"""Time and memory of this code beside diffusers', on the same random weights, type, threads and inputs.

    python -m benchmarks.peers dit|vae [--runs N] [--dtypes bf16 fp32] [--out FILE]
    python -m benchmarks.peers gguf ...    # quantised weights, see peers_gguf.py
    python -m benchmarks.peers cache ...   # caches, see peers_cache.py

Both load the same folder, written by diffusers, each with its own loader. Times are taken in one process, in turns.
Peak memory is taken in a process of its own for each side, as the rise of the resident set over one call after the
weights are loaded and one small call has been made. The floor is the time of the matrix products, convolutions and
attentions of our forward pass when each runs alone, measured in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import DTYPES, Products, in_fresh_process, machine, peak_bytes, report, timed
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.weights.assign import load_weights
from wan.weights.source import open_source

SIDES = ("ours", "diffusers")

# The shapes of the released 1.3B transformer, with 6 of its 30 layers, and of the released Wan2.1 VAE.
DIT = {
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 1536,
    "ffn_dim": 8960,
    "num_heads": 12,
    "num_layers": 6,
    "freq_dim": 256,
    "text_dim": 4096,
    "text_len": 512,
}
VAE = {"version": "2.1", "dim": 96, "z_dim": 16}


@dataclass(frozen=True)
class Case:
    """`size`: frames, rows, columns of the latent ("dit", "decode") or of the video ("encode")."""

    part: str
    config: dict[str, Any]
    size: tuple[int, int, int]
    dtype: str = "bf16"


CASES = {
    "dit": [("dit", DIT, (3, 32, 32)), ("dit", DIT, (9, 30, 52))],  # 768 and 3,510 tokens
    "vae": [("decode", VAE, (9, 30, 52)), ("encode", VAE, (33, 240, 416))],
}
WARM_UP = {"dit": (1, 4, 4), "decode": (3, 4, 4), "encode": (9, 32, 32)}


def build_theirs(part: str, config: dict[str, Any]) -> nn.Module:
    """The diffusers model with the shape of ours, random weights."""
    import diffusers

    if part == "dit":
        heads, dim = config["num_heads"], config["dim"]
        extra = {"image_dim": 1280, "added_kv_proj_dim": dim} if config["model_type"] in ("i2v", "flf2v") else {}
        extra |= {"pos_embed_seq_len": 514} if config["model_type"] == "flf2v" else {}
        names = {"in_channels": "in_dim", "out_channels": "out_dim"}
        names |= {name: name for name in ("ffn_dim", "num_layers", "freq_dim", "text_dim")}
        extra |= {theirs: config[ours] for theirs, ours in names.items()}
        cls = diffusers.WanTransformer3DModel
        if config["model_type"] == "vace":
            cls = diffusers.WanVACETransformer3DModel
            extra |= {"vace_layers": list(config["vace_layers"]), "vace_in_channels": config["vace_in_dim"]}
        model = cls(num_attention_heads=heads, attention_head_dim=dim // heads, **extra)
    else:
        dim, z_dim = config["dim"], config["z_dim"]
        extra = {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
        if config["version"] == "2.2":
            extra |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
            extra |= {"scale_factor_spatial": 16}
        decoder_dim = config.get("dec_dim", dim)
        model = diffusers.AutoencoderKLWan(base_dim=dim, decoder_base_dim=decoder_dim, z_dim=z_dim, **extra)
    for parameter in model.parameters():
        if parameter.squeeze().ndim < 2:  # norms and biases begin as ones and zeros, which would hide a mix-up
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def build_ours(part: str, config: dict[str, Any]) -> nn.Module:
    """Our model, without weights."""
    with torch.device("meta"):
        return (WanModel if part == "dit" else WanVAE)(**config).eval()


def load(case: Case, side: str, folder: str, device: str = "cpu") -> Callable[..., Tensor]:
    """One forward pass of a side, with the weights in `folder`, as a function of `inputs(case)`."""
    dtype = DTYPES[case.dtype]
    if side == "ours":
        model = build_ours(case.part, case.config)
        load_weights(model, open_source(folder), "dit" if case.part == "dit" else "vae", device=device, dtype=dtype)
    else:
        import diffusers

        cls = diffusers.WanTransformer3DModel if case.part == "dit" else diffusers.AutoencoderKLWan
        model = cls.from_pretrained(folder, torch_dtype=dtype).eval().to(device)
    return forward(case, side, model)


def forward(case: Case, side: str, model: nn.Module) -> Callable[..., Tensor]:
    """The same computation by either model: velocity, pixels in [-1, 1], or the posterior's mean."""
    dtype = DTYPES[case.dtype]
    if side == "ours":
        return {
            "dit": model,
            "decode": lambda z: model.decode_raw(z).clamp_(-1, 1),
            "encode": lambda video: model.encode_raw(video),
        }[case.part]
    return {
        "dit": lambda x, t, context: model(x.to(dtype), t, context.to(dtype), return_dict=False)[0],
        "decode": lambda z: model.decode(z.to(dtype), return_dict=False)[0],
        "encode": lambda video: model.encode(video.to(dtype), return_dict=False)[0].mode(),
    }[case.part]


def inputs(case: Case, size: tuple[int, int, int] | None = None) -> tuple[Tensor, ...]:
    """Seeded arguments of a forward pass, fp32; the text fills its whole length."""
    random = torch.Generator().manual_seed(1)
    size = size or case.size
    if case.part == "encode":
        return (torch.rand(1, 3, *size, generator=random) * 2 - 1,)
    if case.part == "decode":
        return (torch.randn(1, case.config["z_dim"], *size, generator=random),)
    x = torch.randn(1, case.config["in_dim"], *size, generator=random)
    context = torch.randn(1, case.config["text_len"], case.config["text_dim"], generator=random)
    return x, torch.tensor([500]), context


def peak_memory(case: Case, side: str, folder: str) -> int:
    """Bytes by which one forward pass raises the resident memory of this process."""
    with torch.inference_mode():
        call = load(case, side, folder)
        call(*inputs(case, WARM_UP[case.part]))  # libraries and weights come into memory
        args = inputs(case)
        return peak_bytes(lambda: call(*args))


def products(case: Case, side: str) -> Products:
    """The matrix products, convolutions and attentions of one forward pass, counted without computing."""
    with torch.device("meta"):
        model = (build_ours if side == "ours" else build_theirs)(case.part, case.config)
    call = forward(Case(case.part, case.config, case.size, "fp32"), side, model)
    # Ours reads the timestep on the host, so that one stays.
    args = [arg if side == "ours" and arg.ndim == 1 else arg.to("meta") for arg in inputs(case)]
    with torch.inference_mode(), Products() as counted:
        call(*args)
    return counted


def alternate(
    calls: dict[str, Callable[[], Tensor]], runs: int, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of each run and the last result of each call. Who goes first changes from run to run."""
    seconds, results = {name: [] for name in calls}, {}
    for run in range(runs):
        for name in list(calls) if run % 2 == 0 else reversed(calls):
            results[name] = None  # freed before the next one is made
            elapsed, results[name] = timed(calls[name], device)
            seconds[name].append(elapsed)
    return seconds, results


def compare(case: Case, runs: int = 3, memory: bool = True, device: str = "cpu") -> dict[str, Any]:
    """Everything about one case, as JSON data. Ratios are ours / diffusers. memory: on a CPU alone."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.manual_seed(0)
        build_theirs(case.part, case.config).save_pretrained(folder)
        peaks = {side: in_fresh_process(peak_memory, case, side, folder) for side in SIDES} if memory else {}
        calls = {side: load(case, side, folder, device) for side in SIDES}
        for call in calls.values():
            call(*(one.to(device) for one in inputs(case, WARM_UP[case.part])))
        args = [one.to(device) for one in inputs(case)]
        seconds, results = alternate({side: lambda call=calls[side]: call(*args) for side in SIDES}, runs, device)
        del calls
        counted = {side: products(case, side) for side in SIDES}
        floor = counted["ours"].measure(DTYPES[case.dtype], device=device)
    ours, theirs = results["ours"].float(), results["diffusers"].float()
    medians = {side: median(seconds[side]) for side in SIDES}
    result = {
        "part": case.part,
        "size": list(case.size),
        "config": case.config,
        "dtype": case.dtype,
        "output_shape": list(ours.shape),
        "seconds": seconds,
        "median_seconds": medians,
        "time_ratio": medians["ours"] / medians["diffusers"],
        "max_difference_over_std": ((ours - theirs).abs().max() / theirs.std()).item(),
        "tflop": {side: counted[side].tflop() for side in SIDES},
        "floor": floor,
        "time_over_floor": {side: medians[side] / floor["seconds"] for side in SIDES},
    }
    if case.part == "dit":
        result["tokens"] = case.size[0] * case.size[1] * case.size[2] // 4
    if peaks:
        result |= {"peak_bytes": peaks, "peak_ratio": peaks["ours"] / peaks["diffusers"]}
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["gguf"], ["cache"]):
        return importlib.import_module(f"benchmarks.peers_{argv[0]}").main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*CASES, "gguf", "cache"], help="gguf and cache have a --help of their own")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bf16 fp32 for dit, bf16 for vae")
    parser.add_argument("--out", help="also write the JSON there, e.g. benchmarks/results/cpu/peers_dit.json")
    options = parser.parse_args(argv)
    import diffusers

    dtypes = options.dtypes or (["bf16", "fp32"] if options.what == "dit" else ["bf16"])
    results = []
    for dtype in dtypes:
        for part, config, size in CASES[options.what]:
            print(f"{part} {'x'.join(map(str, size))} {dtype} ...", file=sys.stderr)
            results.append(compare(Case(part, config, size, dtype), options.runs))
    report({"machine": machine() | {"diffusers": diffusers.__version__}, "cases": results}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
