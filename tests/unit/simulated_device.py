"""A device that computes nothing and remembers the order of everything: is there a chance that data is used wrongly?

Every operation knows what it must come after: what was given to the same lane before, and the events it waits for. Two
operations that no chain of these connects may run in any order, so if one of them writes what the other uses, there is
a race, whether or not it shows on a given day.
"""

import threading
from dataclasses import dataclass, field

import torch


@dataclass
class Operation:
    lane: str  # "reader" (the host's thread), "copy" or "compute"
    reads: int | None  # a buffer
    writes: int | None
    unit: int | None = None
    after: set[int] = field(default_factory=set)  # all operations that surely ended before it starts


class SimulatedDevice:
    """An event is the number of an operation. forget: names of guarantees that it breaks, to see that this is found."""

    def __init__(self, forget=()):
        self.operations: list[Operation] = []
        self._forget, self._lock = forget, threading.Lock()
        self._last: dict[str, int] = {}
        self._waits: dict[str, set[int]] = {"reader": set(), "copy": set(), "compute": set()}

    # What a ring asks for

    def slot(self, size_bytes):
        slot = torch.zeros(size_bytes, dtype=torch.uint8)
        self._add("compute", None, slot)  # the memory was let go of by what still computes with it
        return slot

    def staging(self, size_bytes):
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def copy(self, staging, slot, after):
        is_first = after is not None and self.operations[after].reads is None
        if after is not None and ("memory is free" if is_first else "slot is free") not in self._forget:
            self._waits["copy"].add(after)
        slot.copy_(staging)
        # Given to the device by the reader, so it comes after all that the reader has done.
        return self._add("copy", staging, slot, extra=self._last.get("reader"))

    def computed(self):
        return self._last.get("compute")

    def wait(self, event):
        if "copy is complete" not in self._forget:
            self._waits["compute"].add(event)

    def join(self, event):
        if "pinned buffer is free" not in self._forget:
            self._waits["reader"].add(event)

    # What the test does with it

    def fill(self, unit, staging):
        staging.fill_(unit + 1)
        self._add("reader", None, staging, unit)

    def compute(self, slot, unit):
        assert slot.eq(unit + 1).all()
        self._add("compute", slot, None, unit)

    def _add(self, lane, reads, writes, unit=None, extra=None):
        with self._lock:
            direct = self._waits[lane] | {one for one in (self._last.get(lane), extra) if one is not None}
            self._waits[lane] = set()
            after = direct.union(*(self.operations[one].after for one in direct))
            buffers = [None if one is None else one.data_ptr() for one in (reads, writes)]
            self.operations.append(Operation(lane, *buffers, unit, after))
            self._last[lane] = len(self.operations) - 1
            return self._last[lane]

    def races(self):
        """Pairs of operations on the same buffer, one of them writing, that may happen in either order."""
        found = []
        for late, operation in enumerate(self.operations):
            for early, other in enumerate(self.operations[:late]):
                shared = {operation.writes} & {other.reads, other.writes} | {operation.reads} & {other.writes}
                if shared - {None} and early not in operation.after:
                    found.append((other, operation))
        return found
