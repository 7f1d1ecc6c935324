"""Rows that say whether the device computes what it should."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import BF16, Bench, Skip, fill, relative
from benchmarks.random_weights import on_meta
from wan.models.dit import WanModel
from wan.models.ops import OPS, choose_ops
from wan.models.ops.compare import compared, is_close
from wan.quant.blocks import UNPACK
from wan.quant.dequantize import dequantize
from wan.quant.ggml import BY_NAME, random_blocks
from wan.quant.products import quantize_tokens

_DTYPES = {"fp32": torch.float32, "bf16": BF16, "fp16": torch.float16}
_WIDTHS = {"a width of 256": 256, "an odd width": 264}  # in two heads
_MARGIN, _LEAST = 1.5, 1e-5
_SAME_DB = 30.0  # videos of one seed drift apart by rounding; other content has less than 20 dB


@torch.inference_mode()
def ops(bench: Bench) -> dict[str, Any]:
    """Each op of those chosen for the device beside its formula; dequantisation and rounding beside the CPU's;
    then small transformers with each set, beside `reference` in fp32 on the CPU: right where they are off by no more
    than 1.5 times what `reference` is off in the same type on the device."""
    rows, wrong = {}, []
    for dtype_name, dtype in _DTYPES.items():
        for width in (104,) if bench.tiny else (104, 5120):
            for name, made, wanted in compared(choose_ops(None, bench.device), dtype, bench.device, width):
                case = f"{name}, {dtype_name}, width {width}"
                rows[case] = relative(made, wanted)
                wrong += [] if is_close(made, wanted) else [case]
    for case, made, wanted in _unpacked(bench.device):
        rows[case] = relative(made, wanted)
        wrong += [] if torch.equal(made.cpu(), wanted) else [case]
    models, wrong_models = _models(bench)
    return {"cases": len(rows) + len(models), "wrong": wrong + wrong_models, "errors": rows | models}


def _unpacked(device: torch.device) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Weights of each type, dequantised there and on the CPU; the same bits are wanted."""
    for name in UNPACK:
        blocks = random_blocks(BY_NAME[name], 64)
        for dtype in (torch.float32, BF16):
            made, wanted = (dequantize(one, BY_NAME[name], dtype) for one in (blocks.to(device), blocks))
            yield f"{name} to {dtype}", made, wanted
    for kind in ("fp8", "int8"):
        tokens = torch.randn(64, 5120, generator=torch.Generator().manual_seed(0)).to(BF16)
        made, wanted = (quantize_tokens(one, kind)[0].float() for one in (tokens.to(device), tokens))
        yield f"tokens to {kind}", made, wanted


def _models(bench: Bench) -> tuple[dict[str, dict[str, float]], list[str]]:
    rows, wrong = {}, []
    for label, width in _WIDTHS.items():
        config = bench.shapes.dit["5B"] | {"dim": width, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
        config |= {"text_dim": 32, "text_len": 16}
        exact = fill(on_meta(config | {"ops": "reference"}), torch.device("cpu"), torch.float32).eval()
        for dtype_name, dtype in _DTYPES.items():
            for times in ("one time", "many times"):
                args = _small_inputs(config, times)
                wanted = exact(*args)
                errors = {
                    name or "chosen": _error(exact, config, name, dtype, args, wanted, bench.device)
                    for name in (*OPS, None)
                }
                case = f"a model, {label}, {dtype_name}, {times}"
                rows[case] = errors
                limit = max(_LEAST, _MARGIN * errors["reference"])
                wrong += [f"{name}: {case}" for name, error in errors.items() if not error <= limit]
    return rows, wrong


def _small_inputs(config: dict[str, Any], times: str) -> tuple:
    """Two samples of two frames; of one time, or with a first frame that is clean."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config["in_dim"], 2, 8, 12, generator=generator)
    text = torch.randn(2, config["text_len"], config["text_dim"], generator=generator)
    count = x[0, 0].numel() // 4
    t = torch.tensor([500.0, 500.0])
    if times == "many times":
        t = t[:, None].repeat(1, count)
        t[:, : count // 2] = 0
    return x, t, text


def _error(
    exact: WanModel,
    config: dict[str, Any],
    ops: str | None,
    dtype: torch.dtype,
    args: tuple,
    wanted: torch.Tensor,
    device: torch.device,
) -> float:
    with torch.device("meta"):
        model = WanModel(**config | {"ops": ops}).eval()
    values = {
        name: one.detach().to(device, one.dtype if model.keep_fp32(name) else dtype).clone()
        for name, one in exact.named_parameters()
    }
    model.load_state_dict(values, assign=True)
    x, t, text = args
    return relative(model.to(device)(x.to(device), t, text.to(device)), wanted)


def golden(bench: Bench) -> dict[str, Any]:
    """The recorded cases of the folder SWAN_GOLDEN, with models and inputs on the device; those of models alone."""
    if not (folder := os.environ.get("SWAN_GOLDEN")):
        raise Skip("SWAN_GOLDEN names no folder of recorded cases")
    from tests.golden.__main__ import replay
    from tests.golden.cases import load_cases
    from tests.golden.runners import model, tae, vae

    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # the cases are fp32
    lines: dict[str, str] = {}
    counts = {"passed": 0, "failed": 0}
    try:
        for case in load_cases(Path(folder)):
            if not any(kind.matches(case) for kind in (model, tae, vae)) or (bench.tiny and len(lines) == 3):
                continue
            case.tensors = {name: one.to(bench.device) for name, one in case.tensors.items()}
            with torch.no_grad(), torch.device(bench.device):
                outcome, line = replay(case)
            del case.tensors
            counts[outcome] += 1
            lines[case.name] = " ".join(line.split()[1:])
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return counts | {"cases": lines, "wrong": [name for name, line in lines.items() if "FAIL" in line]}


def tiny_world(bench: Bench) -> dict[str, Any]:
    """A video of the embedded model by the engine, on the device and on the CPU, in fp32."""
    from benchmarks.tiny_world_gguf import psnr
    from wan import Engine

    sample: dict[str, Any] = {"prompt": "a blue square moving up on a white background", "seed": 1, "task": "t2v-tiny"}
    if bench.tiny:
        sample |= {"size": "32*48", "frame_num": 5, "sample_steps": 1}
    frames, reports = [], {}
    for device in dict.fromkeys(("cpu", bench.device.type)):
        with Engine(task=sample.pop("task", "t2v-tiny"), device=device) as engine:
            video = engine.generate(**sample)
        frames.append(video.frames)
        reports[device] = {name: video.report[name] for name in ("seconds", "attention") if name in video.report}
    db = psnr(frames[0], frames[-1])
    return {"psnr_db": db, "wrong": [] if db > _SAME_DB else [f"{db:.0f} dB to the CPU's video"], "reports": reports}
