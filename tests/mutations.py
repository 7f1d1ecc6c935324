"""Damaged files by the thousand: each is refused with an error of ours or read rightly, quickly and in little memory.

SWAN_FUZZ_FILES: how many files of each kind (1,000 by default); SWAN_FUZZ_SEED: the first of their seeds. A failure
names the seed of its file, which alone makes it again: SWAN_FUZZ_SEED=N SWAN_FUZZ_FILES=1.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Sequence

from wan.errors import SwanError

FILES = int(os.environ.get("SWAN_FUZZ_FILES", 1_000))
SEED = int(os.environ.get("SWAN_FUZZ_SEED", 0))
SECONDS = 10  # the issue is two; a busy machine takes several times as long, what hangs takes for ever
SLACK_BYTES = 4 << 20  # what Python needs for a few hundred entries
BATCHES = 10

Change = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7C, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def boundary(data: bytearray, rng: random.Random) -> None:
    """A number becomes one at which readers go wrong, in either byte order."""
    width = rng.choice((2, 4, 8))
    sizes = (len(data) - 1, len(data), len(data) + 1, rng.randrange(len(data)))
    value = rng.choice((0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, *sizes))
    start = rng.randrange(max(1, len(data) - width))
    data[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice((rng.randrange(len(data)), max(0, len(data) - rng.randrange(1, 64)))) :]


def extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.randrange(1, 200))


def duplicate(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    data[end:end] = data[start:end]


def delete(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    del data[start:end]


def swap(data: bytearray, rng: random.Random) -> None:
    start, end = _span(data, rng)
    other = rng.randrange(max(1, len(data) - (end - start)))
    one, two = data[start:end], data[other : other + end - start]
    data[start:end], data[other : other + end - start] = two, one


def digit(data: bytearray, rng: random.Random) -> None:
    """A number that is written out, as in JSON, becomes another."""
    starts = [at for at in range(len(data)) if chr(data[at]).isdigit()]
    if starts:
        at = rng.choice(starts)
        data[at : at + 1] = rng.choice((b"-1", b"0", b"99999999999999999999", b"1e400", b"NaN", b"[]", b'"x"', b"null"))


ANYWHERE: tuple[Change, ...] = (*[flip] * 5, *[set_byte] * 2, *[boundary] * 2, *[swap] * 2)
ANYWHERE += (truncate, extend, duplicate, delete, digit)


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(max(1, len(data)))
    return start, min(start + rng.choice((1, 4, 8, 32, 100)), len(data))


def mutated(base: bytes, seed: int, changes: Sequence[Change] = ANYWHERE, head: int | None = None) -> bytes:
    """A damaged copy of `base`. head: so many bytes at the start are its header, which is damaged more often."""
    rng, data = random.Random(seed), bytearray(base)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        here = head if head is not None and rng.random() < 0.7 else len(data)
        part = bytearray(data[:here])
        if part:
            rng.choice(changes)(part, rng)
            data[:here] = part
    return bytes(data)


def survive(
    bases: Sequence[bytes],
    batch: int,
    attempt: Callable[[bytes], None],
    slack_bytes: int = SLACK_BYTES,
    **how: object,
) -> None:
    """Every seed of one of the BATCHES: `attempt` takes a damaged file, reads it, and checks what it has read. It may
    raise SwanError; anything else, much time or more memory of Python's than twice the file's size is a failure.

    attempt: writes the bytes to a file of its own. slack_bytes: memory on top of twice the size. how: see `mutated`.
    """
    refused = 0
    seeds = range(SEED + batch, SEED + FILES, BATCHES)
    for seed in seeds:
        data = mutated(bases[seed // BATCHES % len(bases)], seed, **how)
        try:
            with limits(seed, len(data), slack_bytes):
                attempt(data)
        except SwanError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, f"seed {seed}: {error!r} is not one line"
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    if len(seeds) >= 100:
        assert refused, "no file was refused: the mutations do nothing"


@contextlib.contextmanager
def limits(seed: int, size_bytes: int, slack_bytes: int = SLACK_BYTES):
    def too_long(*_):
        raise AssertionError(f"seed {seed}: more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak <= 2 * size_bytes + slack_bytes, f"{peak:,} bytes of memory for {size_bytes:,}"
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
