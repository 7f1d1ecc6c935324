"""What a run refuses for its files, by their headers and sizes alone: nothing is loaded. `--dry_run` asks the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from wan.errors import SwanError, one_line
from wan.models.audio import empty_audio_encoder
from wan.models.dit import WanModel
from wan.models.encoders import empty_clip_encoder, empty_text_encoder
from wan.models.text import check_tokenizer
from wan.models.vae import empty_vae
from wan.options import Request
from wan.options.names import LoraChoice
from wan.plan.files import checkpoint_of
from wan.quant.products import choose_products
from wan.tasks.kinds import kind_of
from wan.weights.assign import check_weights
from wan.weights.checkpoint import Checkpoint
from wan.weights.infer import check_dit, check_encoder, infer_vae_config, our_shapes, vae_config
from wan.weights.lora import Lora, open_lora, weight_shapes
from wan.weights.source import Source


def check_files(checkpoint: Checkpoint) -> list[str]:
    """Every weight file of a run against its task, and the tokenizer against its encoder. Returns lines to show. Raises
    SwanError, one line, for the first that does not fit."""
    for name in checkpoint.components:
        check_component(name, checkpoint)
    return [*check_vocabulary(checkpoint), *_scale_notes(checkpoint)]


def faults(request: Request, spec: Any) -> list[str]:
    """What is wrong with the files that are here: a line for each component, as `check_files` and `open_loras` have it.
    Those that are missing are left to the plan, which lists them."""
    found = []

    def check(call: Callable[[], object]) -> None:
        try:
            call()
        except SwanError as error:
            found.append(one_line(error))

    checkpoint = checkpoint_of(request, spec)
    for name in filter(checkpoint.paths, checkpoint.components):
        check(partial(check_component, name, checkpoint))
    if checkpoint.paths("vae"):
        check(partial(check_encodes, request, spec))
    if checkpoint.paths("tokenizer") and checkpoint.paths("t5"):
        check(partial(check_vocabulary, checkpoint))
    check(partial(open_loras, request.sample.loras, spec))
    return list(dict.fromkeys(found))


def check_component(name: str, checkpoint: Checkpoint) -> None:
    """The files of a transformer, "vae", "tae", "t5", "clip" or "wav2vec" against the task: containers, sizes, and
    every name and shape against the model as it is built on the meta device. Raises SwanError, one line."""
    source, spec, part = checkpoint.source(name), checkpoint.spec, checkpoint.kind(name)
    if part == "dit":
        check_dit(source, spec)
        with torch.device("meta"):
            model = WanModel(**spec.dit)
    elif part == "vae":
        return _check_vae(source, spec)
    else:
        check_encoder(source, part, spec)
        makers = {"t5": empty_text_encoder, "clip": empty_clip_encoder, "wav2vec": empty_audio_encoder}
        model = makers[part](source)
    check_weights(model, source, part)


def _check_vae(source: Source, spec: Any) -> None:
    config = vae_config(source, spec)
    try:
        check_weights(empty_vae(config), source, "vae")
    except SwanError as error:
        if "widths" in config or config["dim"] == spec.vae["dim"]:
            raise
        others = "LightVAE Pro and Lite have layouts of their own, which are not read"
        raise SwanError(f"{error}, narrower than the task's; {others}") from None


def _scale_notes(checkpoint: Checkpoint) -> list[str]:
    """On what no shape tells, but only the name of a file."""
    found = {name: checkpoint.source(name) for name in ("vae", "tae") if name in checkpoint.components}
    configs = {name: infer_vae_config(source) for name, source in found.items()}
    seen = {True: "the Wan VAE makes them (LightTAE)", False: "the diffusion model sees them (TAEHV)"}
    return [
        f"{found[name].describe()}: told by its name, latents are taken as {seen[config['unscaled']]}"
        for name, config in configs.items()
        if "widths" in config
    ]


def settle_matmul(checkpoint: Checkpoint, asked: str, device: str) -> tuple[str, list[str]]:
    """What --matmul comes to with the transformers' files that are here, on a device, and lines to show: see
    `choose_products`."""
    if asked == "bf16":
        return asked, []
    stored = None
    for source in (checkpoint.source(name) for name in checkpoint.files.dit if checkpoint.paths(name)):
        kinds = ((source.block_type(name), source.info(name).shape) for name in source.keys())
        stored = (stored or set()) | {(kind, shape) for kind, shape in kinds if kind}
    return choose_products(asked, device, stored)


def check_encodes(request: Request, spec: Any) -> None:
    """That there is a VAE that encodes, where the request has something to encode. Raises SwanError, one line."""
    checkpoint = checkpoint_of(request, spec)
    if not kind_of(spec).encodes(request.sample):
        return
    if not checkpoint.paths("vae"):
        where = f"in {request.load.ckpt_dir}"
        raise SwanError(f"there is no VAE to encode with {where}, and --tae only decodes: give --vae FILE")
    source = checkpoint.source("vae")
    if vae_config(source, spec).get("encoder_width") == 0:
        raise SwanError(f"{source.describe()}: a TAE without an encoder, which this task needs; give it with --tae")


def check_vocabulary(checkpoint: Checkpoint) -> list[str]:
    """The tokenizer's pieces against the encoder's rows. Returns lines to show. Raises SwanError, one line."""
    table = our_shapes(checkpoint.source("t5"), "t5").get("shared.weight")  # none: this is no encoder, as others say
    return check_tokenizer(checkpoint.files.tokenizer, table[0]) if table else []


def open_loras(asked: Mapping[str, LoraChoice], spec: Any) -> dict[str, list[tuple[Lora, float]]]:
    """Expert -> its LoRAs with their strengths, checked by their headers against the shapes of the task. Raises
    SwanError, one line."""
    names = list(spec.get("experts") or ["model"])
    if not asked:
        return {name: [] for name in names}
    with torch.device("meta"):
        shapes = weight_shapes(WanModel(**spec.dit))
    loras = {}
    for name in names:
        flags = ("lora", f"lora_{name}")
        loras[name] = [(open_lora(path, shapes, name), x) for flag in flags for path, x in asked.get(flag, ())]
        if lost := [lora for lora, _ in loras[name][len(asked.get("lora", ())) :] if not lora.updates]:
            raise SwanError(f"--lora_{name}: {lost[0].notes[0].removeprefix('warning: ')}")
    return loras
