"""A pipeline is built for the models of one Request and called with others: those must want the same models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wan.errors import UsageError
from wan.request.options import LoraChoice

# Fields of Request that say what is loaded and where it lies, by the option to name. All others are honoured by a call.
_OPTIONS = {
    **{name: name for name in ("task", "ckpt_dir", "gguf_mode", "device", "dtype", "t5_dtype", "vae_dtype")},
    **{name: name for name in ("attention", "t5_cpu", "offload", "resident_blocks", "vae_offload")},
    **{"vram_bytes": "vram_gb", "ram_bytes": "ram_gb", "grid": "ulysses_size, --ring_size, --cfg_parallel"},
    **{name: name for name in ("dit_fsdp", "t5_fsdp", "dist_timeout")},
}
_NO_WISH = {"gguf_mode": "auto", "device": "auto", "offload": "auto"}  # beside None: left to whoever built the pipeline


def check_built(request: Any, built: Any, loras: Mapping[str, LoraChoice]) -> None:
    """Raises UsageError where `request` wants other models than those of `built`, the Request of a pipeline.

    loras: those that it has by now. A request that names no LoRAs, or no file for a component, takes the pipeline's.
    """
    for option, wanted, has in _differences(request, built, loras):
        raise UsageError(
            f"--{option} is {wanted} in this request, and {has} in the pipeline that it was given to: make a pipeline"
            " for it with WanPipeline.from_request"
        )


def _differences(request: Any, built: Any, loras: Mapping[str, LoraChoice]) -> Iterator[tuple[str, Any, Any]]:
    for field, option in _OPTIONS.items():
        wanted, has = getattr(request, field), getattr(built, field)
        left_open = wanted is None or wanted == _NO_WISH.get(field) or (field == "dtype" and request.auto_dtype)
        if wanted != has and not left_open:
            yield option, wanted, has
    for part, wanted in request.files.items():
        has = built.files.get(part, "that of the checkpoint")
        if wanted != has:
            yield part, wanted, has
    if request.loras and request.loras != loras:
        for flag in {**request.loras, **loras}:
            wanted, has = (_told(one.get(flag, ())) for one in (request.loras, loras))
            if wanted != has:
                yield flag, wanted, f"{has} (see set_loras)"


def _told(chosen: LoraChoice) -> str:
    return ", ".join(f"{path}:{strength:g}" for path, strength in chosen) or "none"
