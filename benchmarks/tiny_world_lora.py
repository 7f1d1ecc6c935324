"""What the embedded LoRAs do, by the judge of Tiny World.

    python -m benchmarks.tiny_world_lora stripes     strengths, removal, beside packed weights, expert by expert
    python -m benchmarks.tiny_world_lora distilled   four distilled steps, four and twenty of the plain model

Both make the clips of tiny_world.py again for each row and print JSON. `stripes` is the rate of clips with a striped
background, the others are the rates at which the words of the prompt are right. `psnr_db` compares the frames with
those of the row `to`, clip by clip; null where all are equal. `nearest_shape`: the rate at which the shape's outline is
the one that fits best, however badly.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from benchmarks.judge import judge
from benchmarks.tiny_world import CASES_PER_HALF, TASK, Outcome, cases, make_request, rates, run, stripes_rate
from benchmarks.tiny_world_gguf import psnr
from wan.command import Parser, run_command
from wan.engine import Engine
from wan.options import Request
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

I2V = "i2v-tiny"
PRESET = "distill-4step"
Row = tuple[str, list[Outcome], Request, str | None]  # name, what was made, the last request, the row to compare with


def lora(name: str, task: str = TASK) -> str:
    """The path of an embedded LoRA."""
    return str(embedded_checkpoint(load_task(task)) / "loras" / f"{name}.safetensors")


def open_engine(**options: Any) -> Engine:
    """An engine of t2v-tiny with these options of loading, and LoRAs."""
    clip, seed = cases()[0]
    request = make_request(clip.prompt, seed, None, None, **options)
    engine = Engine.of(request.load, load_task(TASK))
    engine.set_loras(**request.sample.loras)
    return engine


def strengths(count: int) -> Iterator[Row]:
    """One engine, whose LoRAs are changed between the rows."""
    engine = open_engine()
    yield "none", *run(count, None, None, engine), None
    for strength in (0, 0.5, 1):
        engine.set_loras((lora("stripes"), strength))
        yield f"stripes:{strength}", *run(count, None, None, engine), "none"
    engine.set_loras()
    yield "removed", *run(count, None, None, engine), "none"


def packed(count: int) -> Iterator[Row]:
    """The same weights in Q8_0, dequantised with the LoRA merged, and packed with it beside them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "q8_0.gguf")
        export_gguf(open_source(open_engine().checkpoint.files.dit["model"]), file, "Q8_0")
        merged = {"gguf": str(file), "gguf_mode": "resident", "lora": lora("stripes")}
        yield "Q8_0, stripes:1 merged", *run(count, None, None, open_engine(**merged)), None
        beside = open_engine(**merged | {"gguf_mode": "stream"})
        yield "Q8_0, stripes:1 beside", *run(count, None, None, beside), "Q8_0, stripes:1 merged"


def experts(count: int) -> Iterator[Row]:
    """i2v-tiny with the LoRA of either expert and of both."""
    flags = {f"lora_{name}": lora(f"stripes-{name}", I2V) for name in ("high", "low")}
    for name, chosen in {"none": (), "high": ("lora_high",), "low": ("lora_low",), "both": tuple(flags)}.items():
        options = {flag: flags[flag] for flag in chosen}
        yield f"{I2V}, {name}", *run(count, None, None, task=I2V, **options), None if name == "none" else f"{I2V}, none"


def stripes(count: int) -> Iterator[Row]:
    yield from strengths(count)
    yield from packed(count)
    yield from experts(count)


def distilled(count: int) -> Iterator[Row]:
    """Steps and guidance as the rows say; the distilled model is sampled with its preset."""
    engine = open_engine()
    plain = "20 steps, guidance"
    yield plain, *run(count, None, None, engine), None
    yield "4 steps, guidance", *run(count, 4, None, engine), plain
    yield "preset", *run(count, None, None, engine, preset=PRESET), plain
    engine.set_loras(lora(PRESET))
    yield "preset, distilled", *run(count, None, None, engine, preset=PRESET), plain
    engine.set_loras([lora(PRESET), lora("stripes")])
    yield "preset, distilled, stripes:1", *run(count, None, None, engine, preset=PRESET), plain


COMPARISONS = {"stripes": stripes, "distilled": distilled}


def figures(row: Row, others: dict[str, list[Outcome]]) -> dict[str, Any]:
    """One entry of the JSON; `others` are the rows made so far."""
    name, outcomes, request, to = row
    nearest = [judge(one.frames, min_overlap=0).shape == one.clip.shape for one in outcomes]
    found = {
        "row": name,
        "steps": request.sample.steps,
        "solver": request.sample.solver,
        "shift": request.sample.shift,
        "guide_scale": request.sample.guide_scale[0],
        **rates(outcomes),
        "nearest_shape": round(sum(nearest) / len(nearest), 4),
        "stripes": stripes_rate(outcomes),
        "seconds_per_clip": round(statistics.median(one.seconds for one in outcomes), 3),
    }
    if to is None:
        return found
    pairs = [(one.frames, other.frames) for one, other in zip(outcomes, others[to], strict=True)]
    same = all(np.array_equal(*pair) for pair in pairs)
    return found | {"to": to, "psnr_db": None if same else round(statistics.mean(psnr(*pair) for pair in pairs), 2)}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.tiny_world_lora", description=__doc__.splitlines()[0])
    every = 2 * CASES_PER_HALF
    parser.add_argument("what", choices=COMPARISONS)
    parser.add_argument("--clips", type=int, default=every, choices=range(1, every + 1), metavar="N", help="first N")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here as well")
    args = parser.parse_args(argv)
    made: dict[str, list[Outcome]] = {}
    rows = []
    for row in COMPARISONS[args.what](args.clips):
        rows.append(figures(row, made))
        made[row[0]] = row[1]
        print(json.dumps(rows[-1]), file=sys.stderr)
    load = row[2].load
    result = {"clips": args.clips, "rows": rows, "device": load.device, "dtype": load.dtype, "machine": machine()}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
