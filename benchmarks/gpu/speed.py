"""Rows that say how fast: products, attention, forwards and what they are made of, the VAE, other types of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import timed
from benchmarks.gpu.bench import BF16, Bench, Skip, tflop, tokens
from wan.models.attention import get_attention
from wan.quant.linear import multiply_in_8_bits
from wan.quant.products import works

# What the profiler calls an operation or kernel -> its kind, in this order.
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sage"),
    "products": ("mm", "linear", "cutlass", "nvjet", "splitk"),
    "convolutions": ("conv",),
    "copies": ("copy_", "memcpy", "cat", "memset", "clone"),
}


def rates(bench: Bench) -> dict[str, Any]:
    """bf16 products of a block by shape, memory, the bus. The first row: others go by it."""
    config, count = bench.config("14B"), tokens(bench.shapes.latents["480p"])
    dim, ffn = config["dim"], config["ffn_dim"]
    by_shape, flops, seconds = {}, 0.0, 0.0
    for columns, rows, times in ((dim, dim, 6), (dim, ffn, 1), (ffn, dim, 1)):
        x = torch.randn(count, columns, device=bench.device, dtype=BF16)
        weight = torch.randn(rows, columns, device=bench.device, dtype=BF16)
        taken = min(bench.time(_warm(lambda x=x, weight=weight: F.linear(x, weight)), 10)["all_seconds"])
        by_shape[f"{count} x {columns} x {rows}"] = 2e-12 * count * columns * rows / taken
        flops, seconds = flops + times * 2 * count * columns * rows, seconds + times * taken
    bench.product_tflops = flops / seconds / 1e12
    big = torch.empty(1 << (20 if bench.tiny else 30), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(big)
    copied = min(bench.time(_warm(lambda: other.copy_(big)), 5)["all_seconds"])
    found = {
        "product_tflops": bench.product_tflops,
        "by_shape": by_shape,
        "memory_bytes_per_second": 2 * big.nbytes / copied,
    }
    if bench.is_cuda:
        from benchmarks.offload import transfer_rate

        found["transfer_bytes_per_second"] = transfer_rate(bench.device)
    return found


def _warm(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, which was made."""
    with torch.inference_mode():
        call()
    return call


def attention(bench: Bench, name: str) -> dict[str, Any]:
    """A back end alone, of the heads of 14B, by size; its error beside fp32 on some of the tokens."""
    run, config, found = get_attention(bench.attention(name)), bench.config("14B"), {}
    heads, width = config["num_heads"], config["dim"] // config["num_heads"]
    for size in ("480p", "720p"):
        count = tokens(bench.shapes.latents[size])
        q, k, v = (torch.randn(1, count, heads, width, device=bench.device, dtype=BF16) for _ in range(3))
        timing = bench.time(_warm(lambda q=q, k=k, v=v: run(q, k, v)), 3)
        found[size] = timing | {"tflop_per_second": 4e-12 * count**2 * config["dim"] / timing["seconds"]}
    some = [one[:, : min(count, 4096)] for one in (q, k, v)]
    exact = get_attention("sdpa")(*(one.float() for one in some))
    found["relative_error"] = float((run(*some).float() - exact).norm() / exact.norm())
    return found


def forward(bench: Bench, network: str, size: str, back_end: str) -> dict[str, Any]:
    """A forward of the whole transformer: of a step with guidance there are two. Packed as Q4_K where bf16 does not
    fit."""
    config, latent = bench.config(network), bench.shapes.latents[size]
    bench.attention(back_end)  # before 28 GB are made
    kind = ""
    try:
        model = bench.model(config)
    except Skip:
        kind = "Q4_K"
        model = bench.model(config, kind)
    chosen = bench.attend(model, back_end)
    args, blocks = bench.inputs(config, latent), model.blocks
    with torch.inference_mode(), bench.peak() as peak:
        model.blocks = blocks[:2]  # kernels are chosen, and compiled
        try:
            model(*args)
        finally:
            model.blocks = blocks
        timing = bench.time(lambda: model(*args), 2)
    work = tflop(config, latent)
    rate = work / timing["seconds"]
    share = rate / bench.product_tflops if bench.product_tflops else None
    found = {
        "attention": chosen,
        "tokens": tokens(latent),
        "tflop": work,
        "tflop_per_second": rate,
        "share_of_products": share,
    }
    return timing | found | {"weights": kind or "bf16", **peak}


def split(bench: Bench) -> dict[str, Any]:
    """Where the time of a forward goes, by the profiler; of some layers of 14B at 480p."""
    from torch.profiler import ProfilerActivity, profile

    config = bench.config("14B", bench.shapes.few)
    model, args = bench.model(config), bench.inputs(config, bench.shapes.latents["480p"])
    bench.attend(model, "auto")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with torch.inference_mode():
        timing = bench.time(_warm(lambda: model(*args)), 3)
        with profile(activities=activities) as profiler:
            timed(lambda: model(*args), bench.device)
    seconds, calls, names = Counter(), Counter(), Counter()
    for one in profiler.key_averages():
        is_kernel = one.device_type == torch.autograd.DeviceType.CUDA
        if bench.is_cuda and not is_kernel:
            continue
        taken = (one.self_device_time_total if bench.is_cuda else one.self_cpu_time_total) / 1e6
        kind = kind_of(one.key)
        seconds[kind] += taken
        calls[kind] += one.count
        names[one.key[:100]] += taken
    whole = sum(seconds.values()) or 1.0
    return {
        "layers": config["num_layers"],
        "forward": timing,
        "seconds": dict(seconds),
        "shares": {kind: taken / whole for kind, taken in seconds.most_common()},
        "launches_per_layer": sum(calls.values()) / config["num_layers"],
        "longest": dict(names.most_common(20)),
    }


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in lower for word in words)), "elementwise")


def vae(bench: Bench, direction: str, dtype_name: str) -> dict[str, Any]:
    """81 frames at 480p by the Wan2.1 VAE."""
    dtype = {"bf16": BF16, "fp32": torch.float32}[dtype_name]
    bench.clear()
    model = bench.vae(dtype)
    z, frames, rows, columns = bench.shapes.latents["480p"]
    if direction == "decode":
        given = torch.randn(1, z, frames, rows, columns, device=bench.device)
        call, few = model.decode_raw, given[:, :, :2]
    else:
        given = torch.rand(1, 3, 4 * frames - 3, 8 * rows, 8 * columns, device=bench.device) * 2 - 1
        call, few = model.encode_raw, given[:, :, :5]
    with torch.inference_mode(), bench.peak() as peak:
        call(few)
        timing = bench.time(lambda: call(given), 2)
    return timing | {"frames": 4 * frames - 3, **peak}


def packed(bench: Bench) -> dict[str, Any]:
    """Packed GGUF weights beside bf16 in one run; of some layers of 14B at 480p."""
    return _beside_bf16(bench, {kind: (kind, "") for kind in ("Q4_K", "Q8_0")})


def matmul(bench: Bench) -> dict[str, Any]:
    """Weights in 8 bits, dequantised and multiplied as they are, beside bf16; the same layers. by_shape: products
    alone, as `wan/quant/products.json` has them."""
    names = [name for name in ("fp8", "int8") if works(name, bench.device)]
    ways = {name: (name, "") for name in ("fp8", "int8")} | {f"--matmul {name}": (name, name) for name in names}
    return _beside_bf16(bench, ways) | {"by_shape": {name: _by_shape(bench, name) for name in names}}


def _by_shape(bench: Bench, name: str) -> dict[str, float]:
    """Time of a product in 8 bits, rounding of the tokens included, to that with the weights dequantised."""
    config, ratios = bench.config("14B", 1), {}
    model = bench.model(config, name)
    for layer in (model.blocks[0].self_attn.q, model.blocks[0].ffn["0"], model.blocks[0].ffn["2"]):
        x = torch.randn(tokens(bench.shapes.latents["480p"]), layer.in_features, device=bench.device, dtype=BF16)
        seconds = {}
        for layer.in_8_bits in (True, False):
            seconds[layer.in_8_bits] = min(bench.time(_warm(lambda layer=layer, x=x: layer(x)), 5)["all_seconds"])
        ratios[f"{layer.out_features} x {layer.in_features}"] = seconds[True] / seconds[False]
    return ratios


def _beside_bf16(bench: Bench, ways: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """ways: by their names, how weights are stored and how they are multiplied ("" for dequantised)."""
    config = bench.config("14B", bench.shapes.few)
    args, found = bench.inputs(config, bench.shapes.latents["480p"]), {}
    for way, (kind, products) in {"bf16": ("", ""), **ways}.items():
        model = bench.model(config, kind)
        bench.attend(model, "auto")
        if products:
            multiply_in_8_bits(model, products)
        with bench.peak() as peak:
            found[way] = bench.time(_warm(lambda model=model: model(*args)), 3) | peak
        bench.clear()
    for one in found.values():
        one["ratio_to_bf16"] = one["seconds"] / found["bf16"]["seconds"]
    return {"layers": config["num_layers"], "kinds": found}


def diffusers(bench: Bench) -> dict[str, Any]:
    """Some layers of 14B at 480p, ours and diffusers' by turns, from the same file in bf16."""
    from benchmarks.peers import Case, compare

    try:
        import diffusers
    except ImportError as error:
        raise Skip("diffusers is not installed") from error
    bench.clear()
    config = bench.config("14B", max(1, bench.shapes.few // 2))
    found = compare(Case("dit", config, bench.shapes.latents["480p"][1:]), 2, memory=False, device=str(bench.device))
    return found | {"diffusers": diffusers.__version__}
