"""Weights that come to the device when they are used: whole blocks of the DiT, or the three parts of each.

The rest of the model and some blocks stay on the device. The others (units) take turns in a ring of slots there: while
one computes, the next is on its way, read by a thread from RAM or from disk and, for a GPU, copied from pinned memory
by a stream of its own. Nothing waits but by events: a copy for the last use of its slot, or of the memory that the slot
was made of, a computation for its copy, the thread for the copy that still reads its pinned buffer. Pinned are two
buffers of a unit, never the model.

`model.offload.hold(module)` stands around each use of a block or part; for one that is resident it does nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wan.quant.scratch import empty_bytes
from wan.weights.containers.opened import READERS
from wan.weights.in_turn import in_turn

SLOTS = 2  # one computes, one arrives
_ALIGNMENT = 256
Event = Any
Read = Callable[[str, Tensor], None]  # read(name, out): a weight, by its name in the model, into the host's memory


class Device(Protocol):
    """What a ring asks of a device. An event stands for a point in one of its two queues, copying and computing."""

    def slot(self, size_bytes: int) -> Tensor:
        """uint8 on the device; what was let go of, which may still be in use by what computes, is made use of again."""

    def staging(self, size_bytes: int) -> Tensor | None:
        """uint8 that the device can copy from; None where the host writes to the slots itself."""

    def copy(self, staging: Tensor, slot: Tensor, after: Event | None) -> Event:
        """Enqueue a copy that starts after `after`; the event of its end. Returns at once."""

    def computed(self) -> Event:
        """The end of what computes so far."""

    def wait(self, event: Event) -> None:
        """What computes from now on starts after `event`."""

    def join(self, event: Event) -> None:
        """The calling thread waits for `event`."""


class Cpu:
    """The host is the device: it has read a unit when it has written the slot, and computes when it is called."""

    def slot(self, size_bytes: int) -> Tensor:
        return empty_bytes(size_bytes)

    def staging(self, size_bytes: int) -> None:
        return None

    def computed(self) -> None:
        return None

    def wait(self, event: None) -> None:
        pass


class Cuda:
    """A GPU. Copies have a stream of their own; what computes is the current stream of the calling thread."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def slot(self, size_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def staging(self, size_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, staging: Tensor, slot: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        slot.record_stream(self._stream)  # should the slot be let go of, its memory is not used before this has ended
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            slot.copy_(staging, non_blocking=True)
            return self._stream.record_event(torch.cuda.Event(blocking=True))

    def computed(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def join(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class _Slot:
    """Device memory for one unit at a time."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.unit: int | None = None
        self.arrival: Future[Event] | None = None  # of that unit; its result comes when the copy is enqueued
        self.used: Event | None = None  # the end of the last computation with it, or with its memory before
        self.is_held = False


class Ring:
    """Units 0..n-1 of at most `size_bytes`, used in this order over and over, though some may be left out.

    fill(unit, buffer): writes it to uint8 memory of the host; called by one thread, never for two units at once.
    """

    def __init__(
        self, device: Device, count: int, size_bytes: int, fill: Callable[[int, Tensor], None], slots: int = SLOTS
    ):
        self._device, self._count, self._fill = device, count, fill
        self._slots = [_Slot(device.slot(size_bytes)) for _ in range(min(slots, count))]
        # Their memory may have been let go of a moment ago by what still computes with it.
        allocated = device.computed()
        for slot in self._slots:
            slot.used = allocated
        stagings = [device.staging(size_bytes) for _ in self._slots]
        self._stagings: list[tuple[Tensor, Event | None]] = [(one, None) for one in stagings if one is not None]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self.units_read = 0

    @contextlib.contextmanager
    def hold(self, unit: int) -> Iterator[Tensor]:
        """The unit, on the device for what is enqueued within; the following ones are sent for."""
        following = [(unit + ahead) % self._count for ahead in range(1, len(self._slots))]
        slot = self._bring(unit, following)
        self._device.wait(slot.arrival.result())
        slot.is_held = True
        try:
            for one in following:
                self._bring(one, following)
            yield slot.buffer
        finally:
            slot.is_held, slot.used = False, self._device.computed()
            self._slots.append(self._slots.pop(self._slots.index(slot)))  # the one used last is overwritten last

    def forget(self) -> None:
        """Units have changed: those in the ring are not used any more."""
        for slot in self._slots:
            if slot.arrival is not None:
                with contextlib.suppress(Exception):  # that of a unit nobody will see
                    slot.arrival.result()
            slot.unit = slot.arrival = None

    def close(self) -> None:
        """The last call: gives the memory back."""
        self._reader.shutdown(cancel_futures=True)
        self._slots, self._stagings = [], []

    def _bring(self, unit: int, needed: Collection[int]) -> _Slot:
        """The slot that has the unit, or will have it; not one of those that have the units `needed` next."""
        for slot in self._slots:
            if slot.unit == unit:
                if not slot.arrival.done() or slot.arrival.exception() is None:
                    return slot
                slot.unit = None  # what failed is tried again
        slot = next(slot for slot in self._slots if not slot.is_held and slot.unit not in needed)
        slot.unit = unit
        slot.arrival = self._reader.submit(self._read, unit, slot.buffer, slot.used)
        return slot

    def _read(self, unit: int, slot: Tensor, used: Event | None) -> Event:
        self.units_read += 1
        if not self._stagings:
            self._fill(unit, slot)
            return None
        staging, copied = self._stagings.pop(0)
        try:
            if copied is not None:
                self._device.join(copied)
            self._fill(unit, staging)
            copied = self._device.copy(staging, slot, used)
        finally:
            self._stagings.append((staging, copied))
        return copied


class Resident:
    """The offload of a model whose weights all stay where they are. waited_seconds: of the host, for weights."""

    waited_seconds = 0.0
    _here = contextlib.nullcontext()

    def hold(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """Around each use of `module`: its weights are on the device for what is enqueued within."""
        return self._here

    def forget(self) -> None:
        """Weights at rest have changed."""

    def close(self) -> None:
        """Gives memory back; the model cannot be used any more where its weights came through here."""


class _Weight(NamedTuple):
    """A weight of a unit: its place in the model, what stands there while it is not on the device, and its bytes."""

    name: str
    module: nn.Module
    leaf: str
    at_rest: nn.Parameter
    start: int

    def within(self, buffer: Tensor) -> Tensor:
        end = self.start + self.at_rest.numel() * self.at_rest.dtype.itemsize
        return buffer[self.start : end].view(self.at_rest.dtype).view(self.at_rest.shape)


class Streamed(Resident):
    """The offload of a model of which some blocks, or their parts, come through a ring.

    What they hold at rest is in RAM, or on the meta device: such a weight is read each time, by a thread.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: Device, read: Read):
        self._read = read
        self._units: list[list[_Weight]] = []
        self._index: dict[nn.Module, int] = {}
        sizes = []
        for path, module in modules.items():
            unit, size = [], 0
            for name, parameter in module.named_parameters():
                if is_streamed(f"{path}.{name}", parameter):
                    place, _, leaf = name.rpartition(".")
                    unit.append(_Weight(f"{path}.{name}", module.get_submodule(place), leaf, parameter, size))
                    size += -(-parameter.numel() * parameter.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            self._index[module] = len(self._units)
            self._units.append(unit)
            sizes.append(size)
        self.size_bytes = max(sizes)  # of a slot
        self.ring = Ring(device, len(self._units), self.size_bytes, self._fill)

    @contextlib.contextmanager
    def _hold(self, index: int) -> Iterator[None]:
        started = time.perf_counter()
        with self.ring.hold(index) as buffer:
            self.waited_seconds += time.perf_counter() - started
            for weight in self._units[index]:
                setattr(weight.module, weight.leaf, nn.Parameter(weight.within(buffer), requires_grad=False))
            try:
                yield
            finally:
                for weight in self._units[index]:
                    setattr(weight.module, weight.leaf, weight.at_rest)

    def hold(self, module: nn.Module) -> contextlib.AbstractContextManager:
        index = self._index.get(module)
        return self._here if index is None else self._hold(index)

    def forget(self) -> None:
        self.ring.forget()

    def close(self) -> None:
        self.ring.close()
        self._units, self._index = [], {}
        del self._read

    def _fill(self, index: int, buffer: Tensor) -> None:
        unread = (weight for weight in self._units[index] if weight.at_rest.is_meta)
        jobs = ((one.at_rest.nbytes, partial(self._read, one.name, one.within(buffer))) for one in unread)
        for _ in in_turn(jobs, READERS):
            pass
        for weight in self._units[index]:
            if weight.at_rest.is_meta:
                continue
            if guard := getattr(weight.module, "guard", None):
                guard(weight.at_rest)  # it lies in a file
            weight.within(buffer).copy_(weight.at_rest)


def is_streamed(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a block that is streamed travels: the matrices, which are almost all of its bytes.

    What LoRAs put beside packed matrices stays.
    """
    return parameter.ndim == 2 and ".branches." not in name


def streamed_modules(
    units: Mapping[str, nn.Module], granularity: str, resident: Collection[int]
) -> dict[str, nn.Module]:
    """Those of the units of a DiT (`WanModel.units`) that are streamed, by their paths, in the order of their use.

    granularity: "block", or "phase" for the parts of each; resident: indices of the units that stay on the device.
    """
    streamed = {path: unit for i, (path, unit) in enumerate(units.items()) if i not in resident}
    if granularity == "block":
        return streamed
    return {f"{path}.{part}": getattr(unit, part) for path, unit in streamed.items() for part in unit.parts}


def make_device(device: torch.device) -> Device:
    """The plan streams to no other kinds."""
    return Cuda(device) if device.type == "cuda" else Cpu()
