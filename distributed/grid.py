"""How many processes stand along each axis, and what they send each other. No torch, for plans and `--help`."""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """Processes along each axis of `parallel.Parallel`."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        return self.cfg * self.ring * self.ulysses

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence of tokens."""
        return self.ring * self.ulysses

    def flags(self) -> str:
        """What makes this grid on the command line."""
        parts = ["--cfg_parallel"] if self.cfg == 2 else []
        parts += [f"--ring_size {self.ring}"] if self.ring > 1 else []
        parts += [f"--ulysses_size {self.ulysses}"] if self.ulysses > 1 else []
        return " ".join(parts)


def split(total: int, parts: int) -> list[int]:
    """Sizes of `parts` runs of `total`; the first ones are larger by one where it does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def choose_grid(size: int, cfg_parallel: bool = False, ring: int | None = None, ulysses: int | None = None) -> Grid:
    """The grid of `size` processes; an axis that is not given takes what is left, ulysses before ring.

    Raises ValueError, one line that lists what is possible, where the axes do not make up `size`.
    """
    cfg = 2 if cfg_parallel else 1
    rest = size // cfg // (ring or 1) // (ulysses or 1) or 1
    grid = Grid(cfg, ring or (rest if ulysses else 1), ulysses or rest)
    if grid.size == size:
        return grid
    given = [("--ring_size", ring), ("--ulysses_size", ulysses)]
    asked = " ".join(["--cfg_parallel"] * cfg_parallel + [f"{flag} {value}" for flag, value in given if value])
    if size == 1:
        raise ValueError(f"{asked} needs {grid.size} processes, there is 1: torchrun --nproc_per_node={grid.size}")
    choices = ", ".join(one.flags() for one in grids(size))
    raise ValueError(f"{asked} cannot be made of {size} processes; choose one of: {choices}")


def grids(size: int) -> list[Grid]:
    """Every grid of `size` processes."""
    return [
        Grid(cfg, ring, size // cfg // ring)
        for cfg in (1, 2)
        if size % cfg == 0
        for ring in range(1, size // cfg + 1)
        if size // cfg % ring == 0
    ]


def attention_bytes(grid: Grid, tokens: int, width: int, bytes_per_value: int) -> dict[str, float]:
    """Bytes that a rank sends, on average, for one self-attention over a sequence, by axis.

    Ulysses exchanges q, k, v and the output with the U - 1 others of its group, the ring passes k and v of a group on
    R - 1 times: 4 S d b (U-1)/(U P) and 2 S d b (R-1)/P (arXiv 2309.14509, 2310.01889; S tokens, d width, P = U R).
    """
    values = tokens * width * bytes_per_value / grid.sequence
    return {
        "ulysses": 4 * values * (grid.ulysses - 1) / grid.ulysses,
        "ring": 2 * values * (grid.ring - 1),
    }


def weight_bytes(ranks: int, stored_bytes: float) -> float:
    """Bytes that a rank receives in a forward when weights are shared out over `ranks`: all but its own part."""
    return stored_bytes * (ranks - 1) / ranks
