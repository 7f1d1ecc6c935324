"""Convert a checkpoint: python -m wan.convert --to gguf --type Q4_K_M --checkpoint-dir IN --output OUT.gguf

Exit codes as of generate.py. Progress and messages go to stderr; stdout gets one JSON line. `--help` imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan.command import Parser, run_command
from wan.errors import SwanError, UsageError
from wan.weights.recipes import RECIPES
from wan.weights.source import WEIGHT_SUFFIXES, Source, open_source, weight_files

if TYPE_CHECKING:
    from wan.weights.export import Value

COMPONENTS = ("dit", "high", "low", "t5")
_EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}
_DIFFUSERS = {"dit": "transformer", "high": "transformer", "low": "transformer_2", "t5": "text_encoder"}
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".")  # folders beside the weights, official first
_SPIECE = "spiece.model"

_TYPES_HELP = """\
types:
  F32 F16 BF16              not quantised
  Q8_0 Q6_K Q5_1 Q4_1       all matrices of the blocks in this type;
  IQ4_NL IQ4_XS               Q5_K_S and Q3_K_S: in Q5_K and Q3_K
  Q5_K_M Q4_K_M Q3_K_M      ffn.2 and the value projections in larger types
  Q4_K_S Q5_0 Q4_0          ffn.2 in a larger type, in Q4_K_S the first value projections too
  Q2_K                      value projections in Q3_K
  Q5_K Q4_K Q3_K            uniform: all matrices in this type, the text encoder's token table too
Embeddings, the head and the modulation stay in 16 or 32 bits. In the text encoder the token table is in Q6_K (Q8_0
with Q8_0), and ffn_down stands for ffn.2. Rows that are no whole number of blocks are stored in F16.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m wan.convert",
        description="Write a Wan transformer, or its text encoder, as one GGUF file.",
        epilog=_TYPES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--to", choices=["gguf"], default="gguf", help="format of the output; gguf is the only one")
    add("--type", required=True, metavar="TYPE", help="how to store the weights, see below")
    add(
        "--checkpoint-dir",
        required=True,
        metavar="PATH",
        help="a weight file (safetensors, .pth, GGUF), or a folder in the official or diffusers layout",
    )
    add("--output", required=True, metavar="FILE", help="the file to write, .gguf")
    add(
        "--component",
        choices=COMPONENTS,
        help="what to take from a folder: dit (default), high or low (an expert of Wan2.2), t5",
    )
    add("--tokenizer", metavar="DIR", help="folder with the spiece.model to put into a t5 file; default: beside it")
    add("--threads", type=int, metavar="N", help="default: one for each processor")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--quiet", action="store_true", help="no progress and no warnings on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit code. Never raises for a failed run."""
    with _terminable():
        return run_command(lambda: _main(argv))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C, so that the unfinished file is removed."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    type_name = args.type.upper().replace("-", "_")
    if type_name not in RECIPES:
        raise UsageError(f"--type {args.type}: no such type; types: {', '.join(RECIPES)}")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be 1 or more, not {args.threads}")
    output = _check_output(args.output, args.overwrite)
    source = open_source(find_weights(args.checkpoint_dir, args.component))
    for path in source.paths:
        if output.exists() and path.samefile(output):
            raise UsageError(f"--output {output} is the input")

    from wan.weights import export

    held = export.component_of(source)
    if args.component and held != ("t5" if args.component == "t5" else "dit"):
        from wan.weights.infer import identify

        raise SwanError(f"{source.describe()}: holds {identify(source) or held}, not the {args.component}")
    tokenizer = _find_tokenizer(args.tokenizer, source, held)
    if not args.quiet:
        _warn(source, type_name)
    with _progress(args.quiet) as on_progress:
        report = export.export_gguf(
            source, output, type_name, tokenizer=tokenizer, threads=args.threads, on_progress=on_progress
        )
    print(json.dumps(report), flush=True)
    return 0


def _check_output(name: str, overwrite: bool) -> Path:
    path = Path(name).expanduser().absolute()
    if path.suffix.lower() != ".gguf":
        raise UsageError(f"--output must end in .gguf, not {path.name!r}")
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"--output: no folder {path.parent}")
    if path.exists() and not overwrite:
        raise UsageError(f"--output: {path} exists; --overwrite replaces it")
    return path


def find_weights(checkpoint: str | Path, component: str | None = None) -> list[Path]:
    """The files of `component` ("dit", "high", "low", "t5"; None is "dit") for `open_source`; `checkpoint` may be one.

    Raises UsageError where there is no such path or an expert has to be named, SwanError for what the folder lacks.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"--checkpoint-dir: no such file or folder: {path} (a model of the hub: download it first)")
    part = component or "dit"
    experts = [path / folder for folder in (*_EXPERTS.values(), _DIFFUSERS["low"])]
    if part == "dit" and any(folder.is_dir() for folder in experts):
        raise UsageError(f"--checkpoint-dir: {path} holds two experts; choose with --component high or low")
    found = sorted(one for one in path.glob("models_t5*") if one.suffix in WEIGHT_SUFFIXES) if part == "t5" else []
    folders = [path / _EXPERTS[part]] if part in _EXPERTS else []
    folders.append(path / _DIFFUSERS[part])
    for folder in folders:
        found = found or (weight_files(folder) if folder.is_dir() else [])
    if not found and part not in _EXPERTS:
        found = _top_weights(path)
    if not found:
        looked_for = " and ".join(f"{folder.name}/" for folder in folders)
        raise SwanError(f"{path}: no weights for {part}; looked in it and for {looked_for}")
    return found


def _top_weights(folder: Path) -> list[Path]:
    """The transformer of an official folder, where other components lie beside it; else all weights of the folder."""
    for pattern in ("*.safetensors.index.json", "diffusion_pytorch_model*.safetensors"):
        if found := sorted(folder.glob(pattern)):
            return found
    return weight_files(folder)


def _find_tokenizer(given: str | None, source: Source, component: str) -> dict[str, Value]:
    """The tokenizer to put into the file, from the folder given or one beside the weights; empty if there is none."""
    if given and component != "t5":
        raise UsageError("--tokenizer has no meaning for a transformer")
    if component != "t5":
        return {}
    if given:
        path = Path(given).expanduser() / _SPIECE
        if not path.is_file():
            raise UsageError(f"--tokenizer: no {path}")
        return tokenizer_metadata(path, _vocab(source))
    near = [source.paths[0].parent, source.paths[0].parent.parent]
    for path in (folder / name / _SPIECE for folder in near for name in _TOKENIZERS):
        if path.is_file():
            return tokenizer_metadata(path, _vocab(source))
    return {}


def _vocab(source: Source) -> int:
    from wan.weights.infer import our_shapes

    return our_shapes(source, "t5")["shared.weight"][0]


def tokenizer_metadata(path: Path, vocab: int) -> dict[str, Value]:
    """Keys and values for the SentencePiece model in `path`, as llama.cpp's converter names them.

    The token table has `vocab` rows; where the model has fewer pieces, unused tokens fill up. Raises SwanError.
    """
    import numpy as np

    from wan.models.text import parse_spiece

    try:
        pieces, unk_id, charsmap = parse_spiece(path.read_bytes())
    except (OSError, ValueError, IndexError) as error:
        raise SwanError(f"{path}: not a usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    if len(pieces) > vocab:
        raise SwanError(f"{path}: has {len(pieces)} tokens, the text encoder {vocab}")
    unused = 5  # the numbers of the token types are those of SentencePiece
    pieces += [(f"[PAD{index}]", -1000.0, unused) for index in range(len(pieces), vocab)]
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in pieces], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in pieces], dtype=np.int32),
        "tokenizer.ggml.unknown_token_id": unk_id,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    special = {"tokenizer.ggml.eos_token_id": "</s>", "tokenizer.ggml.padding_token_id": "<pad>"}
    metadata |= {key: ids[piece] for key, piece in special.items() if piece in ids}
    if charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return metadata


def _warn(source: Source, type_name: str) -> None:
    from wan.weights.export import plan_tensors, quantised_before

    if before := quantised_before(source, plan_tensors(source, RECIPES[type_name])):
        loss = "quantising them again loses more than starting from the original"
        print(f"warning: the weights are {before} already; {loss}", file=sys.stderr)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar by bytes on stderr."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="convert", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


if __name__ == "__main__":
    sys.exit(main())
