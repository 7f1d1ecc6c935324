"""The engine: models that are loaded once and make many videos. The command line and the benchmarks are its clients."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan import media
from wan.cache import StepContext
from wan.conditioning.film import Made
from wan.distributed.parallel import Parallel
from wan.errors import Cancelled, UsageError
from wan.options import LoadOptions, Request, build_load, build_sample
from wan.options.files import check_save_file
from wan.options.names import LORA_FLAGS, LoraChoice
from wan.options.phases import check_phase_loras
from wan.pipeline import Result, WanPipeline
from wan.plan import start_lines
from wan.preview import preview_of
from wan.tasks import load_task
from wan.tasks.kinds import kind_of
from wan.weights.checkpoint import Checkpoint

_POLL_SECONDS = 0.1  # how often a call that waits for its turn looks whether it was cancelled


@dataclass(frozen=True)
class Event:
    """kind: "stage" (one begins or ends), "step" (one of denoising has ended), "preview", "note" or "warning".

    done, total: of what the stage counts; seconds: so far in this stage; left: of it, estimated, None where unknown
    frames: uint8 [T', h, w, 3] of a preview, one pixel a latent cell, or by a TAE [T', H, W, 3]; text: of a note or
        warning
    """

    kind: str
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None
    frames: np.ndarray | None = None
    text: str = ""


@dataclass(frozen=True)
class Video:
    """frames: uint8 [T, H, W, 3]; latents: fp32 [z, T', h, w]; request: what it was made from; report: as the command
    line prints it, but for the file and the memory; cache: telemetry of the cache, where there was one."""

    frames: np.ndarray
    latents: Tensor
    request: Request
    report: dict[str, Any] = field(default_factory=dict)
    cache: Any = None

    def save(self, path: str | Path) -> Path:
        """Write an mp4, or one frame as PNG, with the settings inside. Raises UsageError or SwanError; atomic."""
        if not len(self.frames):
            raise UsageError("the clips of this video were handed to on_clip: there are no frames to save")
        path = Path(check_save_file(os.fspath(path) or ".", len(self.frames)))
        self.write(path)
        return path

    def write(self, path: str | Path) -> None:
        """`save`, to a path that was checked before."""
        media.write_video(path, self.frames, self.request.sample.fps, self.request.settings(), self.sound)

    @property
    def sound(self) -> media.Sound | None:
        """What is heard with it."""
        return kind_of(load_task(self.request.load.task)).sound(self.request.sample)


@dataclass(frozen=True)
class Clip:
    """A part of a film. frames: uint8 [T, H, W, 3]; made: what there is of the film, with this; request: the film's."""

    frames: np.ndarray
    made: Made
    request: Request


class Engine:
    """Models of a task, and what makes videos with them.

    Options are those of the command line, by the names and with the defaults of its flags: those that say what is
    loaded are given here, those that say what is made to `generate`. Models are loaded when a video first needs them.
    `residency`: stage (as the plan of one video has it, most are let go of after their stage) or keep (they stay while
    memory allows, the least recently used goes first); auto is keep.

    Thread-safe: one video at a time, other calls wait for their turn. On several processes each makes an engine with
    its `parallel`, and all are called alike, cancelling included.

    `latents` is None until a call has denoised; from then on it holds the result, whatever happens later in the call.
    """

    def __init__(self, *, parallel: Parallel | None = None, **options: Any):
        """Checks the options, finds the files and checks them; loads nothing. Raises UsageError or SwanError."""
        parallel = parallel or Parallel()
        load = build_load(options, parallel.world.size)
        self._open(load, load_task(load.task), parallel)

    @classmethod
    def of(cls, load: LoadOptions, spec: Any, parallel: Parallel | None = None) -> Engine:
        """The engine of options that were checked, and their task."""
        engine = cls.__new__(cls)
        engine._open(load, spec, parallel or Parallel())
        return engine

    def _open(self, load: LoadOptions, spec: Any, parallel: Parallel) -> None:
        self._pipe = WanPipeline.from_load(load, spec, parallel)
        self._pipe.keeps = load.residency != "stage"
        self._loras: dict[str, LoraChoice] = {}
        self._preview: Callable[[Tensor], np.ndarray] | None = None
        self._turn, self._owner = threading.Lock(), 0  # the thread whose turn it is
        self._is_closed = False

    @property
    def load(self) -> LoadOptions:
        """What it was made with, and what was decided since."""
        return self._pipe.load

    @property
    def checkpoint(self) -> Checkpoint:
        """Its files, opened."""
        return self._pipe.checkpoint

    @property
    def device(self) -> torch.device:
        return self._pipe.device

    @property
    def latents(self) -> Tensor | None:
        return self._pipe.latents

    @property
    def held_bytes(self) -> int:
        """Of the models that are loaded now, but for what stays in files: the system takes that back if it must."""
        return self._pipe.taken_bytes()

    def plan(self, **options: Any) -> dict[str, Any]:
        """What a video would take, with the memory that there is now: see `wan.plan.make_plan`."""
        return self.planned(build_sample(options, self.load))

    def planned(self, request: Request, beside: int = 0) -> dict[str, Any]:
        """`plan`, for options that were checked. beside: bytes that others of this process would let go of."""
        with self._my_turn(None):
            return self._pipe.planned(request, beside)

    def generate(
        self,
        *,
        on_event: Callable[[Event], object] | None = None,
        cancel: threading.Event | None = None,
        on_clip: Callable[[Clip], object] | None = None,
        preview_every: int = 0,
        **options: Any,
    ) -> Video:
        """Make a video. Nothing is written.

        Args:
            on_event: is told what happens, by the thread that called; what it raises ends the call.
            cancel: setting it ends the call between two steps, chunks of the VAE or weights that are loaded.
            on_clip: takes each Clip of a film as it is made; the video has no frames then, and a long one takes no
                more memory than a short one.
            preview_every: so many steps apart previews are among the events; 0: none.
            options: by the names of their flags. Pictures may be paths, PIL images or uint8 arrays [H, W, 3].

        Raises UsageError or SwanError, one line, Cancelled among them. After that the engine can be used as before.
        """
        request = build_sample(options, self.load)
        return self.make(request, on_event=on_event, cancel=cancel, on_clip=on_clip, preview_every=preview_every)

    def make(
        self,
        request: Request,
        *,
        on_event: Callable[[Event], object] | None = None,
        cancel: threading.Event | None = None,
        on_clip: Callable[[Clip], object] | None = None,
        made: Made | None = None,
        preview_every: int = 0,
    ) -> Video:
        """`generate`, for options that were checked. made: that of an earlier call's last Clip, to go on from."""
        _check_call(on_event, cancel, on_clip, preview_every)
        tell = on_event or (lambda event: None)
        with self._my_turn(cancel) as check:
            pipe = self._pipe
            pipe.latents, pipe.check = None, check
            if pipe.parallel.world.size > 1:  # a random one: of the first rank
                request = request.changed(seed=pipe.parallel.gather_objects(request.sample.seed)[0])
            if request.sample.use_prompt_extend:
                request = self._extended(request, tell, check)
            first = not pipe.plan
            loras = request.sample.loras or self._loras
            request = request.changed(**{flag: loras.get(flag, ()) for flag in LORA_FLAGS})
            check_phase_loras(request.sample.by_phase, loras)
            plan = pipe.plan_for(request)
            if loras != pipe.asked_loras:
                pipe.set_loras(**loras)
            request = pipe.decided(request)
            for line in request.warnings:
                tell(Event("warning", text=line))
            for line in [*(start_lines(plan) if first else plan["notes"]), *pipe.take_notes()]:
                tell(_note(line))
            stages = _Stages(tell, plan)
            show = self._shows(tell, preview_every) if preview_every else None
            take = on_clip and (lambda frames, made: on_clip(Clip(frames, made, request)))
            result = pipe(request, progress=stages, on_clean=show, on_clip=take, made=made)
            cache = pipe.cache.telemetry if request.sample.cache else None
            return Video(result.frames, result.latents, request, _report(pipe, request, result), cache)

    def set_loras(self, lora: Any = (), lora_high: Any = (), lora_low: Any = ()) -> None:
        """From now on make videos with these LoRAs, unless a call brings its own; see `WanPipeline.set_loras`."""
        with self._my_turn(None):
            self._pipe.set_loras(lora, lora_high, lora_low)
            self._loras = self._pipe.asked_loras

    def release(self) -> None:
        """Let go of all models. They will be loaded anew when a video needs them."""
        with self._my_turn(None):
            self._pipe.release()

    def close(self) -> None:
        """The last call: gives all memory back."""
        if not self._is_closed:
            with self._my_turn(None):
                self._pipe.release()
                self._is_closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _my_turn(self, cancel: threading.Event | None) -> Iterator[Callable[[], None]]:
        """Yields what raises Cancelled once `cancel` is set."""

        def check() -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled")

        if self._owner == threading.get_ident():
            raise UsageError("the engine is at work on this call: it cannot be called from its own on_event")
        while not self._turn.acquire(timeout=_POLL_SECONDS):
            check()
        self._owner = threading.get_ident()
        try:
            if self._is_closed:
                raise UsageError("the engine is closed: make another one")
            check()
            yield check
        finally:
            self._owner = 0
            self._turn.release()

    def _extended(self, request: Request, tell: Callable[[Event], object], check: Callable[[], None]) -> Request:
        """By the first of several processes."""
        from wan.prompt_extend import extended

        parallel, made = self._pipe.parallel, None
        if parallel.world.rank == 0:
            made = extended(request, self.device, lambda kind, text: tell(Event(kind, text=text)), check).sample
        made = parallel.gather_objects(made)[0]
        names = ("prompt", "prompts", "extended_from", "use_prompt_extend")
        return request.changed(**{name: getattr(made, name) for name in names})

    def _shows(self, tell: Callable[[Event], object], every: int) -> Callable[[StepContext, Tensor], None]:
        if self._preview is None:
            self._preview = self._pipe.with_decoder(preview_of)

        def show(ctx: StepContext, clean: Tensor) -> None:
            if (ctx.step + 1) % every == 0 or ctx.step + 1 == ctx.steps:
                tell(Event("preview", "denoise", ctx.step + 1, ctx.steps, frames=self._preview(clean[0])))

        return show


def _check_call(on_event: Any, cancel: Any, on_clip: Any, preview_every: Any) -> None:
    if on_event is not None and not callable(on_event):
        raise UsageError(f"on_event must be a function of one event, not {on_event!r:.100}")
    if on_clip is not None and not callable(on_clip):
        raise UsageError(f"on_clip must be a function of one clip, not {on_clip!r:.100}")
    if cancel is not None and not hasattr(cancel, "is_set"):
        raise UsageError(f"cancel must be a threading.Event, not {cancel!r:.100}")
    if isinstance(preview_every, bool) or not isinstance(preview_every, int) or preview_every < 0:
        raise UsageError(f"preview_every must be a whole number of steps, 0 for none, not {preview_every!r:.100}")


class _Stages:
    """Progress of a pipeline as events. What is left is first told by the plan, then by the steps so far."""

    def __init__(self, tell: Callable[[Event], object], plan: Mapping[str, Any]):
        self._tell, self._stage, seconds = tell, "", plan["seconds"]
        encode = seconds.get("encode_text", 0) + seconds.get("encode_image", 0)
        load = seconds.get("load", 0) / len(plan.get("steps_by_expert", "1"))
        self._expected = {**seconds, "encode": encode, "load": load}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage != self._stage:
            self._stage, self._begun, self._from, self._done = stage, now, done, done
        seconds, made = now - self._begun, done - self._from
        left = seconds / made * (total - done) if made else self._expected.get(stage, 0) * (total - done) / total
        kind, self._done = "step" if stage == "denoise" and done > self._done else "stage", done
        self._tell(Event(kind, stage, done, total, seconds, left))


def _note(line: str) -> Event:
    is_warning = line.startswith("warning: ")
    return Event("warning" if is_warning else "note", text=line.removeprefix("warning: "))


def _report(pipe: WanPipeline, request: Request, result: Result) -> dict[str, Any]:
    (_, height, width, _), digests = result.frames.shape, result.made.sha256
    modes = {name: mode for name, mode in pipe.placement.packed.items() if mode}
    return {
        "task": request.load.task,
        "seed": request.sample.seed,
        "size": f"{width}x{height}",
        "frames": result.made.frames,
        "clips": result.made.clips,
        "fps": request.sample.fps,
        "steps": request.sample.steps,
        **({"phases": request.sample.phases} if request.sample.phases else {}),
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "offload": pipe.placement.offload,
        "attention": pipe.attention,
        **({"gguf_mode": modes} if modes else {}),
        **({"matmul": pipe.load.matmul} if pipe.load.matmul != "bf16" else {}),
        **({"cache": pipe.cache.telemetry.report()} if request.sample.cache else {}),
        # Of the frames; of several clips, of the hashes of theirs.
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
    }
