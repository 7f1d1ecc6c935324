"""Engines for videos of many kinds: one for each set of things that are loaded, of which one at a time is at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan.distributed.launch import World
from wan.distributed.parallel import Parallel
from wan.engine import Engine, Video
from wan.errors import Cancelled, UsageError
from wan.options import PART_OF, LoadOptions, Request, build_load, build_sample, check_device, of_part
from wan.tasks import load_task
from wan.tasks.kinds import kind_of
from wan.unfinished import FilmFile, Unfinished

_POLL_SECONDS = 0.1  # how often a call that waits for its turn looks whether it was cancelled


class Engines:
    """Makes videos of any task and checkpoint, from options of loading and of a video together, by their flags' names.

    Models of other engines stay while a video is planned beside them as it would be without them; else those used
    longest ago are let go of. Thread-safe: one video at a time, other calls wait for their turn.

    world: of processes that make each video together, which have met; all are called alike, and the first one writes.
    """

    def __init__(self, world: World | None = None):
        self._world, self._parallels = world or World(), {}
        self._engines: list[tuple[LoadOptions, Engine]] = []  # the one used last at the end
        self._turn = threading.Lock()

    def check(self, options: Mapping[str, Any]) -> Request:
        """What the options ask for, without work. Raises UsageError or SwanError, one line."""
        with self._my_turn(None):
            return build_sample(of_part(options, "sample"), self._engine(options).load)

    def plan(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `Engine.plan`; what other engines hold counts as free."""
        with self._my_turn(None):
            engine = self._engine(options)
            return engine.planned(build_sample(of_part(options, "sample"), engine.load), self._held_beside(engine))

    def generate(
        self, options: Mapping[str, Any], is_private: bool = False, called: Mapping[str, str] | None = None, **call: Any
    ) -> Video:
        """See `Engine.generate`: `call` are its arguments beside the options; is_private, called: see `Request`."""
        with self._my_turn(call.get("cancel")):
            engine = self._engine(options)
            request = build_sample(of_part(options, "sample"), engine.load)
            request = request.changed(is_private=is_private, called=called or {})
            self._make_room(engine, request)
            return engine.make(request, **call)

    def write(self, options: Mapping[str, Any], stem: Path, **call: Any) -> tuple[Path, dict[str, Any]]:
        """`generate` into STEM.mp4, or STEM.png where it is one frame: that path, and the report.

        A film of several clips goes there clip by clip, in the memory of one; what is left of one that failed is begun
        anew. The report also has a prompt that was extended. Raises UsageError or SwanError.
        """
        request = self.check(options)
        spec = load_task(request.load.task)
        path, is_writer = stem.with_name(f"{stem.name}.mp4"), self._world.rank == 0
        if kind_of(spec).clips(spec, request.sample) == 1:
            video = self.generate(options, **call)
            path = stem.with_name(f"{stem.name}.png") if len(video.frames) == 1 else path
            if is_writer:
                video.write(path)
        else:
            if is_writer:
                Unfinished(path).discard()
            with FilmFile(path, is_writer=is_writer) as film:
                video = self.generate(options, **call, on_clip=film)
                if is_writer:
                    film.finish(video)
        sample = video.request.sample
        return path, video.report | ({"prompt": sample.prompt} if sample.extended_from else {})

    def release(self) -> None:
        """Let go of all models; what is loaded next is loaded anew."""
        with self._my_turn(None):
            for _, engine in self._engines:
                engine.release()

    def close(self) -> None:
        """Gives all memory back."""
        with self._my_turn(None):
            for _, engine in self._engines:
                engine.close()
            self._engines.clear()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, options: Mapping[str, Any]) -> Engine:
        """The one that loads what the options name, made where there is none yet."""
        if unknown := sorted(str(name) for name in options if PART_OF.get(name) not in ("load", "sample")):
            raise UsageError(f"{unknown[0]} is no option of a video or of what is loaded")
        asked = build_load(of_part(options, "load"), self._world.size)
        at = next((at for at, (load, _) in enumerate(self._engines) if load == asked), None)
        pair = self._engines.pop(at) if at is not None else (asked, self._made(asked))
        self._engines.append(pair)
        return pair[1]

    def _made(self, load: LoadOptions) -> Engine:
        spec, size = load_task(load.task), self._world.size
        if size == 1:
            return Engine.of(load, spec)
        device = check_device(load.device)
        kind = "cuda" if device.startswith("cuda") else "cpu"
        if (load.grid, kind) not in self._parallels:
            self._parallels[load.grid, kind] = Parallel(*load.grid, device_type=kind, local_size=self._world.local_size)
        device = f"cuda:{self._world.local_rank}" if device == "cuda" else device
        return Engine.of(replace(load, device=device), spec, self._parallels[load.grid, kind])

    def _make_room(self, engine: Engine, request: Request) -> None:
        for _, other in self._engines:
            if other is engine or _is_planned_alike(engine, request, self._held_beside(engine)):
                return
            other.release()

    def _held_beside(self, engine: Engine) -> int:
        return sum(other.held_bytes for _, other in self._engines if other is not engine)

    @contextmanager
    def _my_turn(self, cancel: threading.Event | None) -> Iterator[None]:
        while not self._turn.acquire(timeout=_POLL_SECONDS):
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled")
        try:
            yield
        finally:
            self._turn.release()


def _is_planned_alike(engine: Engine, request: Request, beside: int) -> bool:
    """Whether a video lies now as it would if so many bytes more were free. One that never fits is refused later."""
    if not beside:
        return True
    alone = engine.planned(request, beside)
    try:
        now = engine.planned(request)
    except UsageError:
        return False
    return (now["placement"], now["notes"]) == (alone["placement"], alone["notes"])
