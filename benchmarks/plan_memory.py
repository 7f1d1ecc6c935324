"""The plan's peak memory against the measured one: python -m benchmarks.plan_memory [--out FILE]

Random checkpoints are written: a transformer of the width of Wan2.1 1.3B in bf16 (dense), the same as a Q8_0 GGUF file
that stays packed, two experts, one that starts from an image (i2v, with a small CLIP), one with the VAE of Wan2.2
(ti2v), one that is steered by a video (vace). Text encoder and VAE are random too; the VAE has its real size, the
vocabulary a quarter of it. Each is run by generate.py in a fresh process on the CPU, once so that denoising needs most
memory and once so that decoding does; the dense one also on two processes, which hold all weights or share them out.
`ratio` is what the plan says (--dry_run, the largest stage) over the peak resident memory that the run reports, of the
process that is furthest off; `floor` the same for the tiny embedded task, which holds next to no weights. Planned
seconds stand beside measured ones.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from argparse import RawTextHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from easydict import EasyDict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common import machine, report
from benchmarks.peers import build_ours
from benchmarks.peers_gguf import write_random
from wan.command import Parser, run_command
from wan.errors import SwanError
from wan.media import write_video
from wan.models.encoders import clip_model
from wan.models.vae import WanVAE
from wan.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
LAYERS, EXPERT_LAYERS = 11, 5  # some 1 GB and 0.5 GB in bf16
CLIP_LAYERS = 4
SOURCE_PX = 640  # of pictures and videos: larger than any video that is made
TEXT = {"dim": 1024, "dim_attn": 1024, "dim_ffn": 2816, "num_heads": 16, "num_layers": 4, "vocab": 64_000}
# The command line, with tasks of its own. Nothing else differs from generate.py.
RUN = """
import sys
from pathlib import Path
from wan import tasks
own = Path(sys.argv[1])
tasks.config_dir = lambda kind: own / kind
from wan.cli import main
sys.exit(main(sys.argv[2:]))
"""
# What needs most memory -> flags.
RUNS = {
    "denoise": ["--size", "320*320", "--frame_num", "9", "--vae_dtype", "bf16", "--vae_tile_px", "128"],
    "decode": ["--size", "384*384", "--frame_num", "5"],
    "decode in bf16": ["--size", "480*480", "--frame_num", "5", "--vae_dtype", "bf16"],
    "decode in tiles": ["--size", "384*384", "--frame_num", "5", "--vae_tile_px", "256"],
}
RANKS = {
    "2 ranks": ["--ulysses_size", "2", "--offload_model", "true"],
    "2 ranks, weights shared": ["--ulysses_size", "2", "--offload_model", "true", "--dit_fsdp", "--t5_fsdp"],
}
# What a kind of task starts from: the flags of pictures.
PICTURES = {"i2v": ["--image"], "flf2v": ["--first_frame", "--last_frame"], "ti2v": ["--image"]}
STEPS = [
    *("--prompt", "a cat on a roof in the rain", "--negative_prompt", "blurred", "--seed", "1"),
    *("--sample_steps", "2", "--sample_guide_scale", "1"),
]


def specs() -> dict[str, EasyDict]:
    """Case -> a task of the structure of an official one."""
    dense = _spec("t2v-1.3B", "random-dense", LAYERS)
    packed = _spec("t2v-1.3B", "random-q8", LAYERS)
    experts = _spec("t2v-A14B", "random-experts", EXPERT_LAYERS)
    image = _spec("i2v-14B", "random-i2v", EXPERT_LAYERS)
    new_vae = _spec("ti2v-5B", "random-ti2v", EXPERT_LAYERS)
    steered = _spec("vace-1.3B", "random-vace", EXPERT_LAYERS)
    steered.dit.vace_layers = list(range(0, EXPERT_LAYERS, 2))
    return {"dense": dense, "packed": packed, "experts": experts, "i2v": image, "ti2v": new_vae, "vace": steered}


def _spec(like: str, name: str, layers: int) -> EasyDict:
    spec = copy.deepcopy(load_task(like))
    spec.name = name
    spec.dit.update(dim=1536, ffn_dim=8960, num_heads=12, num_layers=layers, text_dim=TEXT["dim"])
    spec.text.update(TEXT)
    return spec


def write_checkpoint(folder: Path, spec: EasyDict, packed: bool) -> list[str]:
    """All files of a task, random, in `folder`; the flags that name what lies elsewhere than in its layout."""
    flags = []
    for subfolder in spec.get("experts", {"model": "."}).values():
        path = folder / subfolder / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if packed:
            write_random(folder / "model.gguf", dict(spec.dit), "Q8_0")
            flags = ["--gguf", str(folder / "model.gguf"), "--gguf_mode", "stream"]
        else:
            save_file(dict(_random(build_ours("dit", dict(spec.dit)))), path)
    torch.save(dict(_text_state(spec.text)), folder / spec.files.t5)
    if "clip" in spec.files:
        torch.save(dict(_random(clip_model(num_layers=CLIP_LAYERS))), folder / spec.files.clip)
    with torch.device("meta"):
        vae = WanVAE(**spec.vae)
    torch.save(dict(_random(vae, torch.float32)), folder / spec.files.vae)
    _write_tokenizer(folder / spec.files.tokenizer, spec.text.vocab)
    return flags


def _random(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    for name, one in model.state_dict().items():
        yield name, _noise(one.shape, dtype)


def _noise(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tuple(shape), dtype=dtype).mul_(0.02)


def _text_state(text: EasyDict) -> Iterator[tuple[str, Tensor]]:
    """Official names of a UMT5 encoder."""
    yield "token_embedding.weight", _noise((text.vocab, text.dim))
    yield "norm.weight", _noise((text.dim,))
    shapes = {
        "norm1.weight": (text.dim,),
        **{f"attn.{one}.weight": (text.dim_attn, text.dim) for one in "qkv"},
        "attn.o.weight": (text.dim, text.dim_attn),
        "pos_embedding.embedding.weight": (text.num_buckets, text.num_heads),
        "norm2.weight": (text.dim,),
        "ffn.gate.0.weight": (text.dim_ffn, text.dim),
        "ffn.fc1.weight": (text.dim_ffn, text.dim),
        "ffn.fc2.weight": (text.dim, text.dim_ffn),
    }
    for index in range(text.num_layers):
        for name, shape in shapes.items():
            yield f"blocks.{index}.{name}", _noise(shape)


def _write_tokenizer(folder: Path, size: int) -> None:
    """A unigram tokenizer of `size` pieces: letters, and random words in scripts as mixed as those of umt5-xxl."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import Unigram

    draw = random.Random(0)
    starts = (0x61, 0x430, 0x4E00, 0x3042, 0x905)
    pieces = dict.fromkeys(["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"])
    while len(pieces) < size:
        start = draw.choice(starts)
        word = "".join(chr(start + draw.randrange(26)) for _ in range(draw.randint(2, 9)))
        pieces["\u2581" * draw.randrange(2) + word] = None
    tokenizer = Tokenizer(Unigram([(piece, -10.0) for piece in pieces], unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ("<pad>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_conditions(folder: Path, spec: EasyDict) -> list[str]:
    """What a task starts from beside a prompt, in `folder`; the flags that name it."""
    flags = []
    for flag in PICTURES.get(spec.kind, []):
        path = folder / f"{flag.lstrip('-')}.png"
        Image.effect_noise((SOURCE_PX, SOURCE_PX), 50).convert("RGB").save(path)
        flags += [flag, str(path)]
    if spec.kind == "vace":
        path = folder / "source.mp4"
        frames = np.random.default_rng(0).integers(0, 256, (9, SOURCE_PX, SOURCE_PX, 3), dtype=np.uint8)
        write_video(path, frames, 16, {})
        flags += ["--src_video", str(path)]
    return flags


def compare(tasks: Path, flags: Sequence[str], ranks: int = 1) -> dict[str, Any]:
    """Plan and run of one command line."""
    plan = run_generate(tasks, [*flags, "--dry_run", "--json"], ranks)
    others = [plan["ranks"]["memory_bytes_but_of_first"]] * (ranks - 1) if ranks > 1 else []
    planned = [{stage: one["ram"] for stage, one in rank.items()} for rank in (plan["memory_bytes"], *others)]
    done = run_generate(tasks, flags, ranks)
    measured = [one["peak_memory_bytes"] for one in done.get("peak_by_rank", [done])]
    ratios = [max(one.values()) / peak for one, peak in zip(planned, measured, strict=True)]
    largest = max(planned[0], key=planned[0].get)
    told = [f"{max(one.values()):,}" for one in planned]
    print(f"planned {told}, measured {measured}, ratios {ratios}", file=sys.stderr, flush=True)
    return {
        "ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
        "planned_bytes": [max(one.values()) for one in planned],
        "measured_bytes": measured,
        "largest_stage": largest,
        "planned_by_stage": planned[0],
        "offload": plan["placement"]["offload"],
        "planned_seconds": plan["seconds"],
        "seconds": done["seconds"],
    }


def run_generate(tasks: Path, flags: Sequence[str], ranks: int = 1) -> dict[str, Any]:
    """The JSON line that the command prints."""
    command = [sys.executable, "-c", RUN]
    if ranks > 1:
        (tasks / "run.py").write_text(RUN)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command.append(str(tasks / "run.py"))
    command += [str(tasks), *flags, "--quiet", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SwanError(f"{' '.join(flags)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    cases: Sequence[str], runs: Sequence[str], ranks: Sequence[str], more: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each case and run. ranks: of RANKS; more: further flags, such as --offload block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks").mkdir()
        save = ["--save_file", str(folder / "video.mp4")]
        tiny = [*save, "--task", "t2v-tiny", "--size", "64*64", "--frame_num", "5", "--sample_steps", "1"]
        yield {"case": "floor", **compare(ROOT / "configs", [*tiny, "--seed", "1"])}
        for case in cases:
            spec = specs()[case]
            (folder / "tasks" / f"{spec.name}.yaml").write_text(yaml.safe_dump(plain(spec), allow_unicode=True))
            print(f"writing {case} ...", file=sys.stderr, flush=True)
            own = write_checkpoint(folder / case, spec, packed=case == "packed")
            own += write_conditions(folder, spec)
            common = ["--task", spec.name, "--ckpt_dir", str(folder / case), *own, *save, *STEPS, *more]
            for run in runs:
                print(f"{case}, {run} ...", file=sys.stderr, flush=True)
                yield {"case": case, "run": run, **compare(folder, [*common, *RUNS[run]])}
            for name in ranks if case == "dense" else ():
                print(f"{case}, {name} ...", file=sys.stderr, flush=True)
                yield {"case": case, "run": name, **compare(folder, [*common, *RUNS["denoise"], *RANKS[name]], 2)}
            shutil.rmtree(folder / case)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m benchmarks.plan_memory", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(specs()), default=list(specs()))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=["denoise", "decode"])
    parser.add_argument("--ranks", nargs="*", choices=list(RANKS), default=list(RANKS), help="of the dense case")
    parser.add_argument("--offload", help="as of generate.py")
    parser.add_argument("--resident_blocks", help="as of generate.py")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    given = {"--offload": args.offload, "--resident_blocks": args.resident_blocks}
    more = [word for flag, value in given.items() if value for word in (flag, value)]
    floor, *rows = measure(args.cases, args.runs, args.ranks, more)
    worst = max((abs(row["ratio"] - 1) for row in rows), default=0.0)
    report({"floor": floor, "worst_deviation": worst, "cases": rows, "machine": machine()}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
