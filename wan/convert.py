"""Convert a checkpoint, to one GGUF file or to a folder with quantised weights:

    python -m wan.convert --to gguf --type Q4_K_M --checkpoint-dir IN --output OUT.gguf
    python -m wan.convert --to fp8 --checkpoint-dir IN --output-dir OUT
    python -m wan.convert --checkpoint-dir IN --output-dir OUT --quantize --bits 4    # as mlx-video has it

Exit codes as of generate.py. Progress and messages go to stderr; stdout gets one JSON line. `--help` imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.command import module_parser, put, run_command, run_process
from wan.distributed.signals import Signals, listening
from wan.errors import SwanError, UsageError
from wan.tasks import load_task, task_names
from wan.weights.locate import CheckpointFiles, locate
from wan.weights.source import Source, open_source, weight_files
from wan.weights.write.recipes import RECIPES

if TYPE_CHECKING:
    from wan.weights.write.export import Value

COMPONENTS = ("dit", "high", "low", "t5")
_NOWHERE = "--checkpoint-dir: no such file or folder: {} (a model of the hub: download it first)"
_DTYPES = ("float16", "float32", "bfloat16")
_FOLDER_FLAGS = ("output_dir", "dtype", "model_version", "quantize", "bits", "group_size")
_MLX_FLAGS = ("quantize", "bits", "group_size")
_FILE_FLAGS = ("type", "output", "component", "tokenizer", "threads")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".")  # folders beside the weights, official first
_SPIECE = "spiece.model"

_TYPES_HELP = """\
formats (--to):
  gguf        one file with the transformer or the text encoder, in one of the types below
  fp8, int8   a folder in the official layout; matrices of transformer and text encoder in 8 bits, one scale a row
  nvfp4, mxfp8  the same in ComfyUI's formats: 4 or 8 bits, one scale for 16 or 32 weights of a row
  mlx         a folder as mlx-video has it; with --quantize the transformer's matrices in 4 or 8 bits
types (--type):
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
    told = "Write a Wan checkpoint, or a part of it, with quantised weights."
    parser = module_parser("wan.convert", told, epilog=_TYPES_HELP)
    add = parser.add_argument
    formats = ["gguf", "fp8", "int8", "nvfp4", "mxfp8", "mlx"]
    add("--to", choices=formats, help="format of the output; default: gguf with --type or --output, else mlx")
    add("--type", metavar="TYPE", help="gguf: how to store the weights, see below")
    add(
        "--checkpoint-dir",
        required=True,
        metavar="PATH",
        help="a weight file (safetensors, .pth, GGUF), or a folder in the official or diffusers layout",
    )
    add("--output", metavar="FILE", help="gguf: the file to write, .gguf")
    add(
        "--component",
        choices=COMPONENTS,
        help="gguf: what to take from a folder: dit (default), high or low (an expert of Wan2.2), t5",
    )
    add("--tokenizer", metavar="DIR", help="gguf: folder with the spiece.model for a t5 file; default: beside it")
    add("--threads", type=int, metavar="N", help="gguf: default: one for each processor")
    add("--output-dir", metavar="DIR", help="all but gguf: the folder to write; default: wan_mlx_model for mlx")
    add("--dtype", choices=_DTYPES, help="all but gguf: type of what is not quantised; default: bfloat16")
    add("--model-version", choices=["auto", "2.1", "2.2"], help="all but gguf: default: auto, told from the folder")
    add("--quantize", action="store_true", default=None, help="mlx: quantise the transformer")
    add("--bits", type=int, choices=[4, 8], help="mlx: default: 4")
    add("--group-size", type=int, choices=[32, 64, 128], help="mlx: weights that share a scale; default: 64")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--quiet", action="store_true", help="no progress and no warnings on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit code. Never raises for a failed run."""
    with listening() as signals:
        return run_command(lambda: _main(argv, signals))


def _main(argv: Sequence[str] | None, signals: Signals) -> int:
    args = make_parser().parse_args(argv)
    to = args.to or ("gguf" if args.type or args.output else "mlx")
    unfit = _FOLDER_FLAGS if to == "gguf" else (*_FILE_FLAGS, *(_MLX_FLAGS if to != "mlx" else ()))
    for name in unfit:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning with --to {to}")
    report = _to_gguf(args, signals) if to == "gguf" else _to_folder(args, to, signals)
    try:
        put(json.dumps(report))
    except SwanError as error:
        raise SwanError(f"{error}; what was asked for is in {report.get('file') or report['folder']}") from error
    return 0


def _to_gguf(args: argparse.Namespace, signals: Signals) -> dict[str, Any]:
    if not (args.type and args.output):
        raise UsageError("--to gguf needs --type and --output (see --help)")
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

    from wan.weights.write import export

    held = export.component_of(source)
    if args.component and held != ("t5" if args.component == "t5" else "dit"):
        from wan.weights.infer import identify

        raise SwanError(f"{source.describe()}: holds {identify(source) or held}, not the {args.component}")
    tokenizer = _find_tokenizer(args.tokenizer, source, held, args.quiet)
    if not args.quiet:
        _warn(source, type_name)
    with _progress(args.quiet, signals) as on_progress:
        return export.export_gguf(
            source, output, type_name, tokenizer=tokenizer, threads=args.threads, on_progress=on_progress
        )


def _to_folder(args: argparse.Namespace, to: str, signals: Signals) -> dict[str, Any]:
    if to != "mlx" and not args.output_dir:
        raise UsageError(f"--to {to} needs --output-dir")
    if not args.quantize and (args.bits or args.group_size):
        raise UsageError(f"{'--bits' if args.bits else '--group-size'} goes with --quantize")
    checkpoint = Path(args.checkpoint_dir).expanduser()
    output = Path(args.output_dir or "wan_mlx_model").expanduser().absolute()
    if not output.parent.is_dir():
        raise UsageError(f"--output-dir: no folder {output.parent}")
    if Path(os.path.realpath(checkpoint)).is_relative_to(os.path.realpath(output)):
        raise UsageError(f"--output-dir {output} holds the input")

    import torch

    from wan.weights.write.folder import Form, export_folder, make_config, vae_version

    bits = (args.bits or 4) if args.quantize else 0
    form = Form(to, getattr(torch, args.dtype or "bfloat16"), bits, args.group_size or 64)
    parts = {part: open_source(paths) for part, paths in find_parts(checkpoint).items()}
    is_22 = "high" in parts or ("vae" in parts and vae_version(parts["vae"]) == "2.2")
    version = args.model_version or "auto"
    if version == "2.1" and is_22:
        raise UsageError(f"--model-version 2.1: {checkpoint} holds a model of Wan2.2")
    version = ("2.2" if is_22 else "2.1") if version == "auto" else version
    if not args.quiet and (to != "mlx" or bits):
        kinds = (source.block_type(name) for source in parts.values() for name in source.keys())
        _warn_again({kind.name for kind in kinds if kind})
    with _progress(args.quiet, signals) as on_progress:
        return export_folder(
            parts,
            output,
            form,
            copies=_find_copies(checkpoint),
            config=make_config(parts, form, version),
            replace=args.overwrite,
            on_progress=on_progress,
        )


def find_parts(checkpoint: Path) -> dict[str, list[Path]]:
    """Files of "dit", or "high" and "low", and of "t5" and "vae" where they are there. `checkpoint` may be one file.

    Raises UsageError where there is no such path, SwanError where it has no transformer.
    """
    if checkpoint.is_file():
        from wan.weights.write.export import component_of

        return {component_of(open_source(checkpoint)): [checkpoint]}
    if not checkpoint.is_dir():
        raise UsageError(_NOWHERE.format(checkpoint))
    files = _located(checkpoint)
    parts = ["dit"] if "model" in files.dit else sorted(files.dit)
    found = {part: find_weights(checkpoint, part) for part in parts}
    return found | {part: paths for part in ("t5", "vae") if (paths := getattr(files, part))}


def _located(folder: Path) -> CheckpointFiles:
    """What generate.py would take from it for the task of which most is there."""
    found, problems = [], []
    for name in task_names():
        try:
            found.append(locate(folder, load_task(name), partial=True))
        except SwanError as error:
            problems.append(error)

    def rank(one: CheckpointFiles) -> tuple[int, bool]:
        return sum(map(bool, (*one.dit.values(), one.vae, one.t5))), all(one.dit.values())

    most = max(found, key=rank, default=None)
    if problems and (most is None or not any(most.dit.values())):
        raise problems[0]  # several files to choose from
    return most


def _find_copies(checkpoint: Path) -> dict[str, Path]:
    """What goes along as it is: the tokenizer, and the encoders of images and audio."""
    if not checkpoint.is_dir():
        return {}
    patterns = ("models_clip*", "image_encoder", "wav2vec2*", "audio_encoder")
    found = {path.name: path for pattern in patterns for path in checkpoint.glob(pattern)}
    if (tokenizer := _located(checkpoint).tokenizer) is not None:
        found[_TOKENIZERS[0]] = tokenizer
    return found


def _check_output(name: str, overwrite: bool) -> Path:
    path = Path(name).expanduser().absolute()
    if path.suffix.lower() != ".gguf":
        raise UsageError(f"--output must end in .gguf, not {path.name!r}")
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"--output: no folder {path.parent}")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"--output: {path} exists; --overwrite replaces it")
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise UsageError(f"--output: {path} is a link to a folder that is not there")
    if Path(real := os.path.realpath(path)).suffix.lower() != ".gguf":
        raise UsageError(f"--output: {path} is a link to {real}, which is no .gguf file: not replaced")
    return path


def find_weights(checkpoint: str | Path, component: str | None = None) -> list[Path]:
    """The files of `component` ("dit", "high", "low", "t5"; None is "dit") for `open_source`; `checkpoint` may be one.

    Raises UsageError where there is no such path or an expert has to be named, SwanError for what the folder lacks.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(_NOWHERE.format(path))
    files, part = _located(path), component or "dit"
    if part == "dit" and len(files.dit) == 2:
        raise UsageError(f"--checkpoint-dir: {path} holds two experts; choose with --component high or low")
    found = files.t5 if part == "t5" else files.dit.get("model" if part == "dit" else part)
    if not found and part in ("dit", "t5") and not any((*files.dit.values(), files.vae, files.t5)):
        found = weight_files(path)  # a folder of this component alone
    if not found:
        raise SwanError(f"{path}: no weights for {part} in it")
    return found


def _find_tokenizer(given: str | None, source: Source, component: str, quiet: bool) -> dict[str, Value]:
    """The tokenizer to put into the file, from the folder given or one beside the weights; empty if there is none."""
    if given and component != "t5":
        raise UsageError("--tokenizer has no meaning for a transformer")
    if component != "t5":
        return {}
    if given:
        path = Path(given).expanduser() / _SPIECE
        if not path.is_file():
            raise UsageError(f"--tokenizer: no {path}")
        return tokenizer_metadata(path, _vocab(source), quiet)
    near = [source.paths[0].parent, source.paths[0].parent.parent]
    for path in (folder / name / _SPIECE for folder in near for name in _TOKENIZERS):
        if path.is_file():
            return tokenizer_metadata(path, _vocab(source), quiet)
    return {}


def _vocab(source: Source) -> int:
    from wan.weights.infer import our_shapes

    return our_shapes(source, "t5")["shared.weight"][0]


def tokenizer_metadata(path: Path, vocab: int, quiet: bool = False) -> dict[str, Value]:
    """Keys and values for the SentencePiece model in `path`, as llama.cpp's converter names them.

    The token table has `vocab` rows; where the model has a few pieces less, unused tokens fill up. Raises SwanError.
    """
    import numpy as np

    from wan.models.text import check_vocabulary, parse_spiece

    try:
        pieces, unk_id, charsmap = parse_spiece(path.read_bytes())
    except (OSError, ValueError, IndexError) as error:
        raise SwanError(f"{path}: not a usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    note = check_vocabulary(path, len(pieces), vocab)
    if note and not quiet:
        print(note, file=sys.stderr)
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
    from wan.quant.schemes import Scheme
    from wan.weights.write.export import plan_tensors, quantised_before

    planned = plan_tensors(source, RECIPES[type_name])
    kinds = [source.block_type(one.source_name) for one in planned if one.type.torch_dtype is None]
    before = {kind.name for kind in kinds if isinstance(kind, Scheme)} or {quantised_before(source, planned)}
    _warn_again(before - {None})


def _warn_again(kinds: set[str]) -> None:
    if kinds:
        loss = "quantising them again loses more than starting from the original"
        print(f"warning: the weights are {', '.join(sorted(kinds))} already; {loss}", file=sys.stderr)


@contextlib.contextmanager
def _progress(quiet: bool, signals: Signals) -> Iterator[Callable[[int, int], None]]:
    """While it is open, tensors are written: a bar by bytes on stderr, and the place where a signal ends the run."""
    from tqdm import tqdm

    # Kept back meanwhile: an exception between any two instructions may find a thread that is started and not yet known
    # to its pool.
    with signals.held(), tqdm(unit="B", unit_scale=True, desc="convert", file=sys.stderr, disable=quiet) as bar:

        def show(done: int, total: int) -> None:
            signals.check()
            bar.total = total
            bar.update(done - bar.n)

        yield show


if __name__ == "__main__":
    run_process(main)
