"""After each stage: are its numbers finite? Else the run ends with one line, of what computed them and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from wan.cache import StepContext
from wan.conditioning.condition import Condition
from wan.denoise import scale_of
from wan.distributed.parallel import Parallel
from wan.finite import NotFinite, is_finite, largest
from wan.options import LoadOptions, Request
from wan.weights.locate import CheckpointFiles

# Latents have a deviation of about 1 and reach some 10; guidance of 1000 makes 300 of that. What is beyond this is no
# picture, and soon overflows in squares.
LARGEST_LATENT = 1e4
_ENCODED = {  # encoder -> stage, and what it makes
    "t5": ("encode_text", "the embedding of the prompt"),
    "clip": ("encode_image", "what the image encoder makes of the image"),
    "wav2vec": ("encode_audio", "what the audio encoder makes of the audio"),
}
_WIDER = {"fp16": "bf16 or fp32", "bf16": "fp32"}


class StageChecks:
    """Each raises NotFinite, on all ranks alike. load: what the models are loaded by; attention: the DiT's back end.
    Both are set once they are decided."""

    attention = "sdpa"

    def __init__(self, files: CheckpointFiles, parallel: Parallel):
        self._files, self._parallel = files, parallel
        self.load: LoadOptions

    def encoded(self, encoder: str, *made: Tensor) -> None:
        """What "t5", "clip" or "wav2vec" has made."""
        if not all(map(is_finite, made)):
            (stage, what), load = _ENCODED[encoder], self.load
            types = {"t5": ("t5_dtype", load.t5_dtype), "clip": ("dtype", load.dtype), "wav2vec": ("dtype", "fp32")}
            raise _error(stage, f"{what} is not finite", getattr(self._files, encoder), types[encoder], encoder)

    def image(self, condition: Condition, source: Tensor | None) -> None:
        if not all(map(is_finite, [*condition.tensors(), *([] if source is None else [source])])):
            raise self._of_vae("encode_image", "the latent of the image is not finite")

    def step(self, request: Request, ctx: StepContext, latent: Tensor, model: nn.Module | None) -> None:
        """The one wait for the device in a step: the progress that is shown next has been made."""
        size = largest(latent)
        is_bad = not size < LARGEST_LATENT
        if not self._parallel.world.sum((float(is_bad),))[0]:
            return
        what = "the latent of another rank is not finite"
        if is_bad:
            what = f"the latent reaches {size:.2g} (10 is usual)" if math.isfinite(size) else "the latent is not finite"
        weight, scale = _bad_weight(model), scale_of(ctx.expert, request.sample.phase_of_step[ctx.step].guide_scale)
        tries = [f"a --sample_guide_scale below {scale:g}"] if scale > 1 and not weight else []
        tries += ["no cache"] if request.sample.cache and not weight else []
        tries += ["--attention sdpa"] if self.attention != "sdpa" and not weight else []
        tries += ["no --lora"] if request.sample.loras else []
        flag = "dit" if ctx.expert == "model" else ctx.expert
        stage, dtype = f"denoise, step {ctx.step + 1} of {ctx.steps}", ("dtype", self.load.dtype)
        raise _error(stage, what, self._files.dit[ctx.expert], dtype, flag, weight, tries)

    @contextmanager
    def decoding(self, vae: nn.Module) -> Iterator[None]:
        """Around `decode` of a VAE or TAE, which finds them frame by frame, before it clamps them."""
        try:
            yield
        except NotFinite as error:
            name = "tae" if self._files.tae else "vae"
            raise self._of_vae("decode", f"{error} is not finite", name, _bad_weight(vae)) from None

    def _of_vae(self, stage: str, what: str, name: str = "vae", weight: str = "") -> NotFinite:
        return _error(stage, what, getattr(self._files, name), ("vae_dtype", self.load.vae_dtype), name, weight)


def _error(
    stage: str,
    what: str,
    paths: Sequence[Path],
    dtype: tuple[str, str],
    file_flag: str,
    weight: str = "",
    tries: Sequence[str] = (),
) -> NotFinite:
    """paths: of the weights; dtype: (its flag, the type that was computed in); weight: the name of one that is not
    finite; tries: what else may help."""
    type_flag, name = dtype
    wider = [f"--{type_flag} {_WIDER[name]}"] if name in _WIDER else []
    weights = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    weights += f", whose {weight} is not finite" if weight else ""
    advice = [*wider, *tries, f"another file with --{file_flag}"]
    return NotFinite(f"{stage}: {what} (computed in {name} with {weights}); try {' or '.join(advice)}")


def _bad_weight(model: nn.Module | None) -> str:
    """The name of the first weight of a model that is not finite; "" if none can be seen."""
    for name, weight in model.named_parameters() if model is not None else ():
        is_here = type(weight.data) is Tensor and not weight.is_meta  # and whole: not shared out among ranks
        if is_here and weight.is_floating_point() and weight.numel() and not is_finite(weight.data):
            return name
    return ""
