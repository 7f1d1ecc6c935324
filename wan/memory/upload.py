"""Stored weights on their way from files to a device: through a ring of pinned buffers, by a queue of their own.

While one piece is copied, the next is read by several threads. What the device does with a weight then, dequantising it
or merging LoRAs, is enqueued behind its copy, and the host goes on reading. Pinned are a few buffers, never a weight.

NOT RUN BY US on a GPU: tests run it on a simulated device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wan.memory.offload import Device, Event, make_device

PIECE_BYTES, PIECES = 32 << 20, 3
ReadAt = Callable[[int, Tensor], bool]  # read(first byte, out): bytes of a weight into the host's memory


class Upload:
    """device: as for a ring of blocks, see `offload`; kind: of torch's devices, "cuda"."""

    def __init__(self, device: Device, kind: str, piece_bytes: int = PIECE_BYTES, pieces: int = PIECES):
        self._device, self.kind, self._piece_bytes = device, kind, piece_bytes
        self._stagings: list[tuple[Tensor, Event | None]] = [(device.staging(piece_bytes), None) for _ in range(pieces)]

    def bring(self, size_bytes: int, read: ReadAt, unit_bytes: int = 1) -> Tensor | None:
        """uint8 [size_bytes] on the device, for what is enqueued from now on; None where `read` says False.

        Pieces begin and end at multiples of `unit_bytes`.
        """
        slot, copied = self._device.slot(size_bytes), None
        allocated = self._device.computed()  # its memory may have been let go of a moment ago by what still computes
        step = self._piece_bytes // unit_bytes * unit_bytes
        for first in range(0, size_bytes, step):
            staging, last_copy = self._stagings.pop(0)
            try:
                if last_copy is not None:
                    self._device.join(last_copy)
                piece = staging[: min(step, size_bytes - first)]
                if not read(first, piece):
                    return None
                copied = last_copy = self._device.copy(piece, slot[first : first + len(piece)], allocated)
            finally:
                self._stagings.append((staging, last_copy))
        if copied is not None:
            self._device.wait(copied)
        return slot


def make_upload(device: torch.device | str) -> Upload | None:
    """How weights come to a GPU; None for other devices, where they are read into place or moved."""
    device = torch.device(device)
    return Upload(make_device(device), device.type) if device.type == "cuda" else None
