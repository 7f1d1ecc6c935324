"""Which network of a task runs at a step, which ones are in memory, and how they come there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from wan.memory.offload import Resident, Streamed, is_streamed, make_device, streamed_modules
from wan.memory.upload import make_upload
from wan.models.dit import WanModel
from wan.models.encoders import Shard
from wan.quant.packed import PackedTensor
from wan.weights.assign import ModelWeights
from wan.weights.lora import Base, Lora, set_loras, with_loras
from wan.weights.names import Rows
from wan.weights.source import Source, Span

_PIECE_BYTES = 512 << 10  # the kernel reads no more than some MB for each request
CPU = torch.device("cpu")
Check = Callable[[], None]


class _Forgotten(Exception):
    """Nobody asks any more for what is being loaded."""


class Experts:
    """The networks of a task by name ("model", or "high" and "low"), each loaded when it is first asked for.

    load(name, device, check): reads one; `check` is to be called before each weight, and ends it by what it raises.
    device(): where they compute. `keep_all` False: asking for one lets go of the other first, so that two experts never
    share the memory.
    """

    def __init__(
        self, load: Callable[[str, torch.device, Check], WanModel], device: Callable[[], torch.device], keep_all: bool
    ):
        self._load, self._device, self.keep_all = load, device, keep_all
        self._models: dict[str, WanModel] = {}
        self._coming: dict[str, Future[WanModel]] = {}
        self._seconds: dict[str, float] = {}
        self._waited_before = 0.0  # for blocks of experts that were let go

    def __getitem__(self, name: str) -> WanModel:
        if name not in self._models:
            started = time.perf_counter()
            if not self.keep_all:
                self._let_go(*self._models)
            device = self._device()
            if name in self._coming:
                self._models[name] = self._coming[name].result().to(device)
                del self._coming[name]
            else:
                self._models[name] = self._load(name, device, lambda: None)
            self._seconds[name] = time.perf_counter() - started
        return self._models[name]

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def get(self, name: str) -> WanModel | None:
        """One that is loaded, else None."""
        return self._models.get(name)

    def prepare(self, name: str) -> None:
        """Load one into RAM, in the background; it is moved to the device when it is asked for."""
        if name in self._models or name in self._coming:
            return
        self._coming[name] = future = Future()

        def check() -> None:
            if self._coming.get(name) is not future:
                raise _Forgotten

        def load() -> None:
            try:
                with _queue_of_its_own(self._device()):
                    model = self._load(name, CPU, check)
                future.set_result(model)
            except BaseException as error:  # told to whoever asks for it
                future.set_exception(error)

        # No daemon: a thread in the middle of torch at the end of the interpreter aborts the process.
        threading.Thread(target=load, name=f"expert {name}").start()

    def forget_prepared(self) -> None:
        """What is being loaded ahead is not used any more; the loading ends before its next weight."""
        self._coming.clear()

    def release(self) -> None:
        """Let go of all of them."""
        self.forget_prepared()
        self._let_go(*self._models)

    def let_go(self, name: str) -> None:
        """Let go of one, if it is loaded."""
        if name in self._models:
            self._let_go(name)

    def _let_go(self, *names: str) -> None:
        for name in names:
            offload = self._offload(self._models.pop(name))
            self._waited_before += offload.waited_seconds
            offload.close()

    def take_seconds(self) -> dict[str, float]:
        """What was waited for since the last such call: to "load" the first expert, to "swap" it for the other, and, by
        the host, for streamed blocks ("wait_for_blocks")."""
        first, *others = [*self._seconds.values(), 0.0]
        taken = {"load": first, "swap": sum(others), "wait_for_blocks": self._waited()}
        self._seconds, self._waited_before = {}, 0.0
        for offload in self._offloads():
            offload.waited_seconds = 0.0
        return {what: seconds for what, seconds in taken.items() if seconds}

    def _waited(self) -> float:
        return self._waited_before + sum(offload.waited_seconds for offload in self._offloads())

    def _offloads(self) -> list[Resident]:
        return [self._offload(model) for model in self._models.values()]

    @staticmethod
    def _offload(model: torch.nn.Module) -> Resident:
        return getattr(model, "offload", Resident())  # a caller's may have none


@contextlib.contextmanager
def _queue_of_its_own(device: torch.device) -> Iterator[None]:
    """What this thread enqueues on a GPU does not wait for what computes there, and has ended on leaving."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        yield
        if stream is not None:
            stream.synchronize()


def load_expert(
    model: WanModel,
    source: Source,
    *,
    device: torch.device,
    compute_device: torch.device,
    dtype: torch.dtype,
    kept: torch.dtype | None = None,
    packed: bool,
    loras: Sequence[tuple[Lora, float]] = (),
    shard: Shard | None = None,
    granularity: str | None = None,
    resident_blocks: Collection[int] = (),
    blocks_from: str = "ram",
    check: Check = lambda: None,
) -> WanModel:
    """Fill a transformer that was built on the meta device. packed: quantised weights stay so; kept: of `load_weights`.

    granularity: "block" or "phase" to stream the blocks to `device`, see `offload`, from "ram" or "disk", but for those
    of the indices `resident_blocks`. compute_device: where LoRAs are merged. check: called before each weight.
    """
    share = shard and (lambda model: shard(model, list(model.units().values())))
    weights = ModelWeights(model, source, "dit", dtype=dtype, kept=kept, stream=packed, shard=share)
    units = streamed_modules(model.units(), granularity, resident_blocks) if granularity else {}
    stream_to = make_device(device) if units else None
    prefixes = tuple(f"{path}." for path in units)
    parameters = dict(model.named_parameters())
    at_rest = torch.device("cpu" if blocks_from == "ram" else "meta")

    def place(name: str) -> torch.device:
        travels = name.startswith(prefixes) and name in parameters and is_streamed(name, parameters[name])
        return at_rest if travels else device

    def merged(name: str, stored: str | Rows, rows: Span | None, held: Tensor | PackedTensor | None) -> Tensor | None:
        shape = tuple(model.get_parameter(name).shape)
        return with_loras(model, name, Base(source, stored, shape, rows, held), compute_device)

    set_loras(model, source, loras, compute_device)  # of packed layers; all others get them as they are read, once
    weights.fill(place, merged, make_upload(device), check)
    if device != compute_device and not units:
        model.to(device)  # what LoRAs have put beside packed layers
    if units:
        merging = torch.cuda.Stream(compute_device) if compute_device.type == "cuda" else None

        def read(name: str, out: Tensor) -> None:
            with torch.cuda.stream(merging):  # in the stream of what computes, it would wait for all that was enqueued
                changed = merged(name, weights.stored(name), None, None)
                weights.read(name, out) if changed is None else out.copy_(changed)

        model.offload = Streamed(units, stream_to, read)
    return model


def read_ahead(paths: Sequence[Path]) -> threading.Thread:
    """Has the system read files into its cache, in the background. They take no memory of this process."""

    def advise() -> None:
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:  # whoever needs the file will say what is wrong
                for start in range(0, os.fstat(file.fileno()).st_size, _PIECE_BYTES):
                    os.posix_fadvise(file.fileno(), start, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=advise if hasattr(os, "posix_fadvise") else lambda: None, daemon=True)
    thread.start()
    return thread
