"""The rows, in the order of their value. No torch: what measures is imported where it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan.models.attention_names import AUTO, BACK_END_NAMES

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """module, function, args: what measures, `function(bench, *args) -> JSON data`; with a list "wrong" that is not
    empty, the row has failed. seconds: that it takes on an H100, guessed; figure: of the result, for the table."""

    name: str
    title: str
    module: str
    function: str
    args: tuple[str, ...]
    seconds: float
    figure: Callable[[Result], str]

    def measure(self, bench: Bench) -> dict[str, Any]:
        return getattr(importlib.import_module(f"benchmarks.gpu.{self.module}"), self.function)(bench, *self.args)


def _row(name: str, title: str, call: str, seconds: float, figure: Callable[[Result], str], *args: str) -> Row:
    module, _, function = call.partition(".")
    return Row(name, title, module, function, args, seconds, figure)


def _checked(result: Result) -> str:
    return f"{result['cases'] if isinstance(result['cases'], int) else len(result['cases'])} cases right"


def _forward(result: Result) -> str:
    share = result.get("share_of_products")
    told = "" if share is None else f", {share:.0%} of the products' rate"
    packed = "" if result["weights"] == "bf16" else f", weights {result['weights']}"
    return f"{result['seconds']:.2f} s, {result['tflop_per_second']:.0f} TFLOP/s{told}{packed}"


def _attention(result: Result) -> str:
    rates = " and ".join(f"{result[size]['tflop_per_second']:.0f}" for size in ("480p", "720p"))
    return f"{rates} TFLOP/s, error {result['relative_error']:.1e}"


def _split(result: Result) -> str:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in result["shares"].items())
    return f"{shares}; {result['launches_per_layer']:.0f} launches a layer"


def _seconds(result: Result) -> str:
    peak = f", {result['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in result else ""
    return f"{result['seconds']:.1f} s{peak}"


def _offload(result: Result) -> str:
    told = (f"{way} {row['ratio']:.2f} ({row['peak_bytes'] / 1e9:.1f} GB)" for way, row in result["ways"].items())
    return f"{', '.join(told)}; {result['layers']} layers"


def _beside(result: Result) -> str:
    return ", ".join(f"{kind} {one['ratio_to_bf16']:.2f}" for kind, one in result["kinds"].items() if kind != "bf16")


def _loading(result: Result) -> str:
    rates = ", ".join(f"{what} {rate / 1e9:.1f}" for what, rate in result["bytes_per_second"].items())
    swaps = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result["swap_seconds"].items())
    return f"{rates} GB/s; swap {swaps}"


def _rates(result: Result) -> str:
    return f"{result['product_tflops']:.0f} TFLOP/s, {result['memory_bytes_per_second'] / 1e12:.2f} TB/s"


def _psnr(result: Result) -> str:
    return f"{result['psnr_db']:.0f} dB"


def _ratio(result: Result) -> str:
    return f"{result['time_ratio']:.2f}"


def _attentions(names: Sequence[str]) -> list[Row]:
    title, call = "attention of 14B at 480p and 720p", "speed.attention"
    return [_row(f"attention-{name}", f"{title}, {name}", call, 4, _attention, name) for name in names]


def _forwards(network: str, size: str, names: Sequence[str], seconds: float) -> list[Row]:
    begin, title, call = f"forward-{network}-{size}", f"a forward of {network} at {size}", "speed.forward"
    return [_row(f"{begin}-{one}", f"{title}, {one}", call, seconds, _forward, network, size, one) for one in names]


def _vaes(dtype: str) -> list[Row]:
    title, call = "81 frames at 480p", "speed.vae"
    ways = ("decode", "encode")
    return [_row(f"vae-{way}-{dtype}", f"VAE {way}, {title}, {dtype}", call, 15, _seconds, way, dtype) for way in ways]


ROWS = [
    _row("rates", "products in bf16; copies in memory", "speed.rates", 10, _rates),
    _row("ops", "ops beside their reference", "checks.ops", 15, _checked),
    _row("golden", "golden cases", "checks.golden", 20, _checked),
    _row("tiny-world", "a video of Tiny World beside the CPU's", "checks.tiny_world", 20, _psnr),
    *_attentions(BACK_END_NAMES),
    *_forwards("14B", "480p", BACK_END_NAMES, 14),
    *_forwards("14B", "720p", [AUTO], 35),
    *_forwards("5B", "704p", [AUTO], 10),
    _row("split", "where the time of layers of 14B at 480p goes", "speed.split", 8, _split),
    *_vaes("bf16"),
    *_vaes("fp32"),
    _row("offload", "time with streamed blocks to all resident (peak), by budget", "memory.offload", 90, _offload),
    _row("packed", "time with packed GGUF weights to bf16", "speed.packed", 15, _beside),
    _row("matmul", "time with weights in fp8 and int8 to bf16", "speed.matmul", 25, _beside),
    _row("loading", "loading, and the swap of experts", "memory.loading", 30, _loading),
    _row("video", "A14B, four steps, 81 frames at 480p", "video.four_steps", 40, _seconds),
    _row("diffusers", "our time to diffusers', layers of 14B at 480p", "speed.diffusers", 60, _ratio),
    *_forwards("14B", "720p", BACK_END_NAMES, 35),
]
NAMES = [row.name for row in ROWS]
