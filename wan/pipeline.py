"""The pipeline of every task: encode the prompt and the images, denoise, decode."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wan.cache import NO_CACHE, NoCache, StepContext
from wan.cache.options import make_manager
from wan.cache.telemetry import merged
from wan.conditioning.condition import Condition
from wan.conditioning.film import Film, Made
from wan.conditioning.sizes import latent_shape
from wan.denoise import OnStep, boundary_of, denoise, experts_of
from wan.distributed.parallel import Parallel
from wan.memory.residency import Residency, empty_cache
from wan.models.dit import WanModel
from wan.models.dit.sequence import Times
from wan.models.vae_base import VideoVAE
from wan.options import LoadOptions, Request
from wan.options.load import check_built
from wan.options.phases import check_phase_loras
from wan.plan.runs import DTYPES
from wan.quant.scratch import freed_memory_kept, freed_memory_returned
from wan.solvers import solver_of
from wan.tasks.kinds import kind_of
from wan.weights.checkpoint import Checkpoint

NEGATIVE = None  # among texts by their prompts
T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)
OnClip = Callable[[np.ndarray, Made], None]  # (frames of a clip, uint8 [T, H, W, 3], and what there is with it)


@dataclass(frozen=True)
class Result:
    """`frames` uint8 [T, H, W, 3]; `latents` fp32 [z, T', h, w], of the last clip; `seconds` by stage.

    `frames` is empty where each clip was handed on as it was made; `made` counts them all.

    Within "denoise" lie "load" (of the first expert), "swap" (waiting for the second) and "wait_for_blocks" (the host,
    for blocks that are streamed), where there were such.
    """

    frames: np.ndarray
    latents: Tensor
    seconds: dict[str, float]
    made: Made


class WanPipeline(Residency):
    """A task with its checkpoint, and the stages of a video. Models are loaded when a stage first needs them.

    On several processes each makes one, with its `parallel`, and all are called alike; each returns the whole result.

    `latents` is None until a run has denoised; from then on it holds the result, whatever happens later. `cache` is the
    cache of the last run, with its telemetry.
    """

    def __init__(self, checkpoint: Checkpoint, load: LoadOptions, parallel: Parallel | None = None):
        super().__init__(checkpoint, load, parallel)
        self.latents: Tensor | None = None
        self.cache: NoCache = NO_CACHE

    def __call__(
        self,
        request: Request,
        progress: Progress | None = None,
        cache: NoCache | None = None,
        on_clean: OnStep | None = None,
        on_clip: OnClip | None = None,
        made: Made | None = None,
    ) -> Result:
        """Makes one video. `progress(stage, done, total)` is called as each stage goes on; on_clean: see `denoise`.
        on_clip: takes the frames of each clip, which are not kept then; made: what there is of it already.

        `cache` takes the place of the one that the request asks for. Raises UsageError where the request wants other
        models than the pipeline was built for, NotFinite where a stage makes what is no number. After an error or an
        interruption, what the plan releases is released.

        Autograd is off, as everywhere but in tools/tiny, unless the environment says WAN_INFERENCE_ONLY=0.
        """
        check_built(request.load, self.load)
        if (wanted := request.sample.loras) and wanted != self.asked_loras:
            self.set_loras(**wanted)
        check_phase_loras(request.sample.by_phase, self.asked_loras)
        handled = sys.exc_info()[1]  # by the caller, and none of ours
        with torch.inference_mode(os.environ.get("WAN_INFERENCE_ONLY", "1") != "0"), _threads(self.plan.get("threads")):
            try:
                return self._run(request, progress, cache, on_clean, on_clip, made or Made())
            except BaseException as error:
                self.experts.forget_prepared()  # or the program could not end before it is loaded
                _clear_frames(error, handled)
                gc.collect()
                empty_cache()
                raise

    def _run(
        self,
        request: Request,
        progress: Progress | None,
        cache: NoCache | None,
        on_clean: OnStep | None,
        on_clip: OnClip | None,
        made: Made,
    ) -> Result:
        self.latents, self.cache = None, cache or NO_CACHE
        seconds: Counter[str] = Counter()

        def report(stage: str, done: int, total: int) -> None:
            self.check()
            if progress is not None:
                progress(stage, done, total)

        film = kind_of(self.spec).film(self.spec, request.sample)
        if made.clips:
            film.resume(made)
        parts = []
        frames = np.empty((0, request.sample.height, request.sample.width, 3), np.uint8)
        for clip, latents in self._sample(request, film, seconds, report, on_clean, made.clips):
            with _timed("decode", seconds, report, self.device, clip, film.clips):
                frames = _as_pixels(film.frames(clip, self._decode(latents, self._tile_px(request))))
            digest = hashlib.sha256(frames.tobytes()).hexdigest()
            made = Made(clip + 1, made.frames + len(frames), (*made.sha256, digest), film.state)
            if on_clip is None:
                parts.append(frames)
            else:
                on_clip(frames, made)
        frames = parts[0] if len(parts) == 1 else np.concatenate(parts or [frames[:0]])
        return Result(frames, self.latents, dict(seconds), made)

    def _sample(
        self,
        request: Request,
        film: Film,
        seconds: Counter[str],
        report: Progress,
        on_clean: OnStep | None = None,
        first: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """The clips of a film, from `first` on: their numbers, and the latents that are to be decoded. film: is told of
        each clip's frames before the next one is asked for."""
        if first >= film.clips:  # all are there
            return
        self.experts.take_seconds()
        with _timed("encode", seconds, report, self.device, ends=False):
            prompts = list(dict.fromkeys(map(film.prompt, range(first, film.clips))))
            texts = self._encode_texts(request, prompts)
        for clip in range(first, film.clips):
            with _timed("encode", seconds, report, self.device, clip, film.clips, begins=clip > first):
                self._hear(film, clip)
                condition = self._encode_images(film, clip, request)
            is_loaded = any(name in self.experts for name in self.files.dit)
            with _timed("denoise", seconds, report, self.device, clip, film.clips, request.sample.steps, is_loaded):
                seen = {"cond": texts[film.prompt(clip)], "uncond": texts.get(NEGATIVE)}
                latents = self._denoise(request, seen, film, clip, condition, report, on_clean)
                self.latents = latents[0].cpu()
            seconds.update(self.experts.take_seconds())
            yield clip, film.latents(clip, latents)

    # Stages

    def _encode_texts(self, request: Request, prompts: Sequence[str]) -> dict[str | None, Tensor]:
        """By the prompts; NEGATIVE is that of the negative one, where there is guidance."""
        negative = [request.sample.negative_prompt] if request.sample.is_guided else []
        groups = [[prompts[0], *negative], *([prompt] for prompt in prompts[1:])]

        def encode() -> list[Tensor]:
            with self._model("t5") as encoder:
                rows = [row.to(self.device) for group in groups for row in encoder(group)]
                del encoder  # or its memory could not be given back on leaving
            return rows

        # Ranks that share the encoder's weights all encode; else one does, and no other has to load it.
        embeddings = encode() if self.load.t5_fsdp else self.parallel.once(encode, self.device)
        self.checks.encoded("t5", *embeddings)
        return dict(zip([prompts[0], *(NEGATIVE for _ in negative), *prompts[1:]], embeddings, strict=True))

    def _hear(self, film: Film, clip: int) -> None:
        """What a clip needs of the audio and is not heard yet."""
        if not (windows := film.unheard(clip)):
            return
        through = self.device if self.parallel.world.size > 1 else "cpu"

        def hear() -> list[Tensor]:
            with self._model("wav2vec") as encoder:
                return [film.hear(encoder, window, DTYPES[self.load.dtype]).to(through) for window in windows]

        for window, features in zip(windows, self.parallel.once(hear, through), strict=True):
            self.checks.encoded("wav2vec", features)
            film.heard[window] = features.cpu()

    def _condition(self, film: Film, clip: int, request: Request) -> Condition:
        """With the VAE, which is loaded when something is to be encoded, and stays until all is."""
        with ExitStack() as stage:
            held: list[VideoVAE] = []

            def encode(video: Tensor) -> Tensor:
                if not held:
                    held.append(stage.enter_context(self._model("vae", "encode_image")))
                return held[0].encode(video.to(self.device), tile_px=self._tile_px(request), group=self.parallel.world)

            condition = film.condition(clip, encode)
            held.clear()
        return condition

    def _encode_images(self, film: Film, clip: int, request: Request) -> Condition:
        condition = self._condition(film, clip, request)
        self.checks.image(condition, film.source)
        if condition.clip_images:

            def look() -> list[Tensor]:
                with self._model("clip") as clip:
                    return [clip([image.to(self.device) for image in condition.clip_images])]

            clip_fea = self.parallel.once(look, self.device)[0]
            self.checks.encoded("clip", clip_fea)
            condition = replace(condition, clip_fea=clip_fea)
        return condition

    def _denoise(
        self,
        request: Request,
        texts: Mapping[str, Tensor],
        film: Film,
        clip: int,
        condition: Condition,
        report: Progress,
        on_clean: OnStep | None = None,
    ) -> Tensor:
        sample, spec = request.sample, self.spec
        shape = latent_shape(spec.vae.z_dim, sample.frame_num, sample.height, sample.width, spec.vae_stride[1])
        solver = solver_of(sample, film.fresh_noise(clip))
        shape = (1, shape[0], shape[1] + condition.extra_frames, *shape[2:])
        start = film.start(clip, shape, solver.sigmas[0].item(), solver.noise_scale).to(self.device)

        if sample.cache and self.cache is NO_CACHE:
            self.cache = make_manager(sample.cache, sample.coefficients, self.parallel)
        cached = {} if self.cache is NO_CACHE else {"cache": self.cache}
        apart = cached and self.parallel.cfg.size > 1  # each half then knows what it decided, and not the other
        decided = len(self.cache.telemetry.decisions) if apart else 0

        def predict(latent: Tensor, times: Times, ctx: StepContext) -> Tensor:
            model, here = self._expert(ctx, film.clips, report), {**cached, "ctx": ctx} if cached else {}
            self._use_loras(ctx.expert, phases[ctx.step])
            self.check()
            return model(latent, times, [texts[ctx.branch]], **condition.inputs(ctx), **here)

        timesteps, boundary = solver.timesteps.tolist(), boundary_of(spec, sample)
        experts = experts_of(timesteps, boundary, sample.boundary_step_index, solver.first)
        following, phases = set(experts), sample.phase_of_step
        for step, name in reversed(list(enumerate(experts, solver.first))):
            if name not in self.experts:  # it will be loaded with those of its first step
                self.loras[name] = self._loras_of(name, phases[step])

        def on_step(ctx: StepContext, latent: Tensor) -> None:
            self.checks.step(request, ctx, latent, self.experts.get(ctx.expert))
            report("denoise", clip * ctx.steps + ctx.step + 1, film.clips * ctx.steps)
            if ctx.step == solver.first:
                self._read_ahead(following - {ctx.expert})

        try:
            with self._freed_memory():
                latents = denoise(
                    predict,
                    solver,
                    start,
                    guide_scale=lambda step: phases[step].guide_scale,
                    boundary=boundary,
                    boundary_step_index=sample.boundary_step_index,
                    condition=condition,
                    cache=self.cache,
                    parallel=self.parallel,
                    on_step=on_step,
                    on_clean=on_clean and (lambda ctx, clean: on_clean(ctx, clean[:, :, condition.extra_frames :])),
                    run=clip,
                )
        finally:
            if self.placement.offload != "none" and not self.keeps:
                self.experts.release()
                empty_cache()
        if apart:
            decisions = self.cache.telemetry.decisions
            decisions[decided:] = merged(self.parallel.gather_objects(decisions[decided:]))
        return latents[:, :, condition.extra_frames :]

    def _expert(self, ctx: StepContext, clips: int, report: Progress) -> WanModel:
        """The network of a step. Loading it is told as a stage of its own, after which denoising goes on."""
        if ctx.expert in self.experts:
            if next(reversed(self._used), "") != ctx.expert:
                self._make_room("denoise", ctx.expert)
            return self.experts[ctx.expert]
        report("load", 0, 1)
        model = self.experts[ctx.expert]
        report("load", 1, 1)
        report("denoise", ctx.run * ctx.steps + ctx.step, clips * ctx.steps)
        return model

    def decided(self, request: Request) -> Request:
        """The request with what was left to the plan as it has decided; a video stores it."""
        return request.changed(
            dtype=self.load.dtype,
            auto_dtype=False,
            matmul=self.load.matmul,
            t5_dtype=self.load.t5_dtype,
            auto_t5_dtype=False,
            vae_tile_px=self._tile_px(request),
            checkpoint=None,
        )

    def _tile_px(self, request: Request) -> int:
        return self.placement.vae_tile_px if request.sample.vae_tile_px is None else request.sample.vae_tile_px

    def _freed_memory(self) -> AbstractContextManager:
        """What becomes of it while a transformer computes on a CPU."""
        if self.device.type != "cpu":
            return nullcontext()
        return freed_memory_returned() if self.load.dit_fsdp else freed_memory_kept()

    def _decode(self, latents: Tensor, tile_px: int) -> Tensor:
        """[3, T, H, W] in [-1, 1]."""
        with self._model(self.checkpoint.decoder) as vae, self.checks.decoding(vae):
            return vae.decode(latents, tile_px=tile_px, group=self.parallel.world)[0]

    def with_decoder(self, use: Callable[[VideoVAE], T]) -> T:
        """What `use` makes with the VAE or TAE that decodes."""
        with self._model(self.checkpoint.decoder) as vae, torch.inference_mode():
            return use(vae)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """While this is open, so many threads at most compute; None: as many as before."""
    before = torch.get_num_threads()
    if count is None or count >= before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_pixels(video: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1], which is changed, to uint8 [T, H, W, 3]: truncated, not rounded, as the official code
    writes its videos."""
    pixels = video.add_(1).mul_(127.5).clamp_(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


@contextmanager
def _timed(
    stage: str,
    seconds: Counter[str],
    report: Progress,
    device: torch.device,
    clip: int = 0,
    clips: int = 1,
    steps: int = 1,
    begins: bool = True,
    ends: bool = True,
) -> Iterator[None]:
    """The part of a stage that one clip has, of so many steps; begins, ends: whether that is told here."""
    started = time.perf_counter()
    if begins:
        report(stage, clip * steps, clips * steps)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if ends:
        report(stage, (clip + 1) * steps, clips * steps)
    seconds[stage] += time.perf_counter() - started


def _clear_frames(error: BaseException | None, before: BaseException | None) -> None:
    """Whoever holds an error would hold the models and tensors of the functions that it ended. before: an older one."""
    while error is not None and error is not before:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
