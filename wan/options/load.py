"""LoadOptions: what is loaded, and where it lies and computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from wan.distributed.grid import Grid
from wan.errors import UsageError
from wan.models.attention_names import AUTO, BACK_END_NAMES
from wan.options.files import check_ckpt_dir, check_file
from wan.options.machine import (
    check_attention,
    check_budget,
    check_device_name,
    check_dtype,
    check_matmul,
    check_offload,
    check_resident_blocks,
    check_t5_dtype,
    make_grid,
)
from wan.options.names import (
    DEFAULT_TASK,
    DTYPE_NAMES,
    FILE_FLAGS,
    GGUF_FLAGS,
    GGUF_MODES,
    RESIDENCY_NAMES,
    T5_DTYPE_NAMES,
    VAE_DTYPE_NAMES,
)
from wan.options.schema import Option, derived, flag_of, is_given, option
from wan.options.values import absolute, choice, whole
from wan.tasks import task_names

_WEIGHTS, _MACHINE = "weights", "machine"
_weights, _machine = partial(option, _WEIGHTS), partial(option, _MACHINE)
_ranks = partial(option, "several processes, started by torchrun", stored=False)


def _part(part: str, what: str, **more: Any) -> Any:
    return _weights("path", what, lambda at, given: check_file(at.spec, at.get, part), **more)


def _released(what: str, check: Any = lambda at, given: given) -> Any:
    return _machine("bool", f"release {what} after use; default: as the other models", check, stored=False)


def _budget(flag: str, what: str) -> Any:
    help = f"{what}, in GB; default: what is free"
    return _machine("number", help, lambda at, given: check_budget(given, flag), stored=False, flag=flag)


def _clip_offload(at: Any, given: bool | None) -> bool | None:
    if given is not None and "clip" not in at.spec.files:
        raise UsageError(f"--clip_offload has no meaning for {at.spec.name}, which has no image encoder")
    return given


@dataclass(frozen=True)
class LoadOptions:
    """The models of an engine, with every default filled in and everything checked.

    task_told:   how it was told from the checkpoint; "" where it was given, or is the default
    ckpt_dir:    folder or hub id; ckpt_option: what the user gave (None: the embedded checkpoint)
    checkpoint:  what was found there, once it was looked for: a `wan.weights.checkpoint.Checkpoint`, or None
    dit ... wav2vec: single files given in place of the checkpoint's own, absolute, or None
    matmul:      "bf16", "fp8", "int8" or "auto", which is decided once the files and the device are known
    dtype:       compute type of DiT and image encoder: bf16, fp16, fp32 or mixed; t5_dtype: of the text encoder;
                 auto_dtype, auto_t5_dtype: it was not asked for, and the plan may take another, see
                 `wan.plan.settle_dtype`
    offload:     none (models stay), model (each is released after its stage), block, phase (parts of the DiT come as
                 they are used too), or auto: what fits, but for none
    may_offload: whether none, where it does not fit, gives way to what does: the default on several processes
    resident_blocks: how many blocks of the DiT stay on the device with block and phase; None: as many as fit
    t5_offload ... vae_offload: whether the text encoder, the image encoder, the VAE is released after use; None: as the
                 other models are
    grid:        processes that share the work: cfg x ring x ulysses
    """

    task: str = option(
        "what to make",
        "name",
        f"one of: {', '.join(task_names())}; default: told from the checkpoint that is given, else {DEFAULT_TASK},"
        " which needs no download",
        lambda at, given: at.spec.name,
    )
    task_told: str = derived(lambda at: at.told, compare=False)
    ckpt_dir: str = _weights(
        "path", "checkpoint folder, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B", check_ckpt_dir, value="DIR"
    )
    ckpt_option: str | None = derived(lambda at: absolute(at.get["ckpt_dir"]))
    checkpoint: Any = derived(lambda at: None, compare=False, repr=False)
    dit: str | None = _part("dit", "take the DiT from this file or folder")
    high: str | None = _part("high", "take the high-noise expert from this file or folder")
    low: str | None = _part("low", "take the low-noise expert from this file or folder")
    vae: str | None = _part("vae", "take the VAE from this file, which may be a LightVAE or a TAE")
    tae: str | None = _part("tae", "decode with the TAE of this file; the VAE, if it has anything to do, encodes")
    t5: str | None = _part("t5", "take the text encoder from this file")
    clip: str | None = _part("clip", "take the image encoder from this file")
    wav2vec: str | None = _part("wav2vec", "take the audio encoder from this file or folder")
    tokenizer: str | None = _part("tokenizer", "take the tokenizer from this folder", value="DIR")
    gguf_mode: str = _weights(
        "name",
        "quantised weights: resident (dequantised once), stream (at each use, in little memory) or auto (default:"
        " resident where the memory is free)",
        lambda at, given: choice(given, "auto", "gguf_mode", GGUF_MODES),
    )
    device: str = _machine(
        "name",
        "auto (default), cpu, cuda, cuda:N or mps",
        lambda at, given: check_device_name(given, ranks=at.world_size),
    )
    dtype: str = _machine(
        "name",
        f"compute type: {', '.join(DTYPE_NAMES)}; auto is the task's, usually bf16, or on a CPU without units for bf16"
        " mixed: weights in bf16, products in fp32",
        lambda at, given: check_dtype(at)[0],
    )
    auto_dtype: bool = derived(lambda at: check_dtype(at)[1], compare=False)
    t5_dtype: str = _machine(
        "name",
        f"compute type of the text encoder: {', '.join(T5_DTYPE_NAMES)}; auto is the task's, whatever --dtype is",
        lambda at, given: check_t5_dtype(at)[0],
    )
    auto_t5_dtype: bool = derived(lambda at: check_t5_dtype(at)[1], compare=False)
    vae_dtype: str = _machine(
        "name",
        f"compute type of the VAE: {', '.join(VAE_DTYPE_NAMES)}; default fp32",
        lambda at, given: choice(given, "fp32", "vae_dtype", VAE_DTYPE_NAMES),
    )
    attention: str = _machine(
        "name",
        f"attention back end: auto (default: by the GPU, type and packages), {', '.join(BACK_END_NAMES)}; several with"
        " commas between them: the first that can be used",
        check_attention,
    )
    matmul: str = _machine(
        "name",
        "how fp8 and int8 weights of the DiT, a scale a row, are multiplied: bf16 (default: dequantised), fp8, int8"
        " (activations are rounded too, by a CUDA device) or auto (so where that was measured to be faster)",
        check_matmul,
    )
    offload: str = _machine(
        "name",
        "none: all models stay on the device; model: each is released after its stage; block, phase: and the DiT's"
        " blocks, or the three parts of each, come as they are used; auto: the fastest of the last three that fits",
        check_offload,
        stored=False,
    )
    may_offload: bool = derived(
        lambda at: at.world_size > 1 and at.get["offload"] is None and at.get["offload_model"] is None
    )
    residency: str = _machine(
        "name",
        "which models stay between their uses: stage (as little memory as the plan needs), keep (as many as memory"
        " allows) or auto: keep, but stage for the one video of a command line",
        lambda at, given: choice(given, "auto", "residency", RESIDENCY_NAMES),
        stored=False,
    )
    resident_blocks: int | None = _machine(
        "whole",
        "blocks that stay on the device with block and phase; default auto",
        check_resident_blocks,
        stored=False,
    )
    t5_offload: bool | None = _released("the text encoder")
    clip_offload: bool | None = _released("the image encoder", _clip_offload)
    vae_offload: bool | None = _released("the VAE")
    t5_cpu: bool = _machine("flag", "run the text encoder on the CPU", is_given)
    vram_bytes: int | None = _budget("vram_gb", "GPU memory that the plan may use")
    ram_bytes: int | None = _budget("ram_gb", "memory of the machine that it may use")
    ulysses_size: int | None = _ranks("whole", "share tokens and heads among N (default: all processes that are left)")
    ring_size: int | None = _ranks("whole", "share tokens among N groups, keys and values going round; default 1")
    cfg_parallel: bool = _ranks("flag", "the two branches of guidance on half of them each", is_given)
    grid: Grid = derived(lambda at: make_grid(at.get, at.world_size))
    dit_fsdp: bool = _ranks("flag", "share the weights of the DiT out among all (FSDP)", is_given)
    t5_fsdp: bool = _ranks("flag", "share the weights of the text encoder out among all", is_given)
    dist_timeout: int = _ranks(
        "number",
        "give up when a process has not answered for S seconds; default 600",
        lambda at, given: whole(given, 600, "dist_timeout", 1, 86_400),
        value="S",
    )

    OTHERS: ClassVar[dict[str, Option]] = {
        **{
            flag: Option("path", f"the same as --{part}, for a GGUF file", _WEIGHTS, stored=False)
            for flag, part in GGUF_FLAGS.items()
        },
        "convert_model_dtype": Option("flag", "the same as --dtype bf16", _MACHINE, stored=False),
        "offload_model": Option(
            "bool",
            "true: --offload auto; false: --offload none; default true, with several processes false where that fits",
            _MACHINE,
            stored=False,
        ),
    }

    @property
    def files(self) -> dict[str, str]:
        """Single files given in place of the checkpoint's own, by component."""
        return {part: path for part in FILE_FLAGS if (path := getattr(self, part))}


_MAY_BE_AUTO = ("gguf_mode", "device", "offload", "residency", "attention", "matmul")  # left to whoever loads


def check_built(wanted: LoadOptions, has: LoadOptions) -> None:
    """Raises UsageError where options ask for other models than those that are there. What names no file for a
    component takes the one there is."""
    for one in fields(LoadOptions):
        asked, there = getattr(wanted, one.name), getattr(has, one.name)
        is_auto = (asked == AUTO and one.name in _MAY_BE_AUTO) or getattr(wanted, f"auto_{one.name}", False)
        is_open = asked is None or is_auto
        if one.compare and asked != there and not is_open and one.name not in ("may_offload", "ckpt_option"):
            told = "that of the checkpoint" if there is None else there
            raise UsageError(
                f"--{flag_of(one)} is {asked} in this request, and {told} in the pipeline that it was given to: make a"
                " pipeline for it"
            )
