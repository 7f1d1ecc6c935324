"""What attention on a CPU reaches of the rate of products: python -m benchmarks.attention [--tokens 2048] [--out FILE]

One thread, by the time that the processor spent on it, so that other work beside it matters little; heads of 128
numbers. By type, in GFLOP/s: `linear`, a product of the width of 1.3B; `torch`, its kernel, for keys as they come out
of the layers and copied head by head; `ours`, where there is one; `heads`, for each head the products and the softmax
of some rows as three calls, with scores in the type of the keys, and in fp32, by fp32 products; `scores` and `values`,
these products alone, and `tile`, one of the size that torch's kernel works with. `error` is to fp64, relative;
`softmax_share` the time of the softmax over that of both products at the rate of `linear`. `forward`: seconds of two
layers of 1.3B in bf16 with either kernel, by turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import DTYPES, machine, report
from benchmarks.random_weights import TEXT_LEN, RandomSource, inputs, on_meta
from wan.command import Parser, run_command
from wan.models import attention
from wan.weights.assign import load_weights

WIDTH, HEADS, HEAD = 1536, 2, 128
ROWS = 256  # of scores at a time
TILE = (32, 512)  # queries, keys


def measure(dtype: torch.dtype, tokens: int, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD, generator=generator).to(dtype) for _ in range(3))
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    apart = [one.contiguous() for one in (q, k, v)]
    x, weight = torch.randn(tokens, WIDTH).to(dtype), torch.randn(WIDTH, WIDTH).to(dtype)
    scores = apart[0][0, 0] @ apart[1][0, 0].t()
    small, keys = torch.randn(TILE[0], HEAD).to(dtype), torch.randn(TILE[1], HEAD).to(dtype)
    whole, half = 4 * tokens**2 * HEADS * HEAD, 2 * tokens**2 * HEAD
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "linear": (2 * tokens * WIDTH**2, lambda: F.linear(x, weight)),
        "torch": (whole, lambda: F.scaled_dot_product_attention(q, k, v)),
        "torch, copied": (whole, lambda: F.scaled_dot_product_attention(*apart)),
        "heads": (whole, lambda: by_heads(*apart, dtype)),
        "heads, scores in fp32": (whole, lambda: by_heads(*apart, torch.float32)),
        "scores": (half, lambda: apart[0][0, 0] @ apart[1][0, 0].t()),
        "values": (half, lambda: scores @ apart[2][0, 0]),
        "tile": (100 * 2 * TILE[0] * TILE[1] * HEAD, lambda: [small @ keys.t() for _ in range(100)]),
    }
    rows = [one.transpose(1, 2) for one in (q, k, v)]
    if attention.attend(*rows) is not None:
        calls["ours"] = whole, lambda: attention.attend(*rows).out.transpose(1, 2)
    rates = {name: flops / _seconds(call, runs) / 1e9 for name, (flops, call) in calls.items()}
    exact = F.scaled_dot_product_attention(*(one.double() for one in apart))
    errors = {name: _error(call(), exact) for name, (flops, call) in calls.items() if flops == whole}
    products = 2 * half / rates["linear"] / 1e9
    share = _seconds(lambda: scores.softmax(-1), runs) / products
    return {"gflop_per_second": rates, "error": errors, "softmax_share": share}


def forward(tokens: int, runs: int) -> dict[str, Any]:
    """Of two layers, by turns."""
    config = {"model_type": "t2v", "dim": WIDTH, "ffn_dim": 8960, "num_heads": 12, "num_layers": 2}
    model = load_weights(on_meta(config).eval(), RandomSource(on_meta(config)), "dit", dtype=torch.bfloat16)
    args = inputs(
        config | {"text_dim": 4096, "text_len": TEXT_LEN}, (16, 3, 2 * (tokens // 96), 64), torch.device("cpu")
    )
    kept, seconds, out = attention.attend, {}, {}
    for _ in range(runs):
        for name, attend in (("ours", kept), ("torch", lambda *_: None)):
            attention.attend = attend
            out[name] = model(*args)
            seconds[name] = min(seconds.get(name, float("inf")), _seconds(lambda: model(*args), 1, warm=False))
    attention.attend = kept
    return {"seconds": seconds, "ratio": seconds["ours"] / seconds["torch"], "difference": _error(*out.values())}


def by_heads(q_BHLD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention by calls for each head; dtype: of the scores."""
    out = torch.empty_like(q_BHLD)
    for head in range(q_BHLD.shape[1]):
        keys_DM, values_MD = k_BHMD[0, head].to(dtype).t(), v_BHMD[0, head]
        for start in range(0, q_BHLD.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            scores = (q_BHLD[0, head, rows].to(dtype) @ keys_DM).mul_(q_BHLD.shape[-1] ** -0.5)
            torch.mm(scores.softmax(-1).to(values_MD.dtype), values_MD, out=out[0, head, rows])
    return out


def _seconds(call: Callable[[], Any], runs: int, warm: bool = True) -> float:
    if warm:
        call()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="default 2048")
    parser.add_argument("--runs", type=int, default=3, help="of each, the shortest counts; default 3")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = {name: measure(DTYPES[name], args.tokens, args.runs) for name in ("bf16", "fp32")}
        whole = forward(args.tokens, args.runs)
    report({"machine": machine(), "tokens": args.tokens, "types": rows, "forward": whole}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
