"""What the C library does with freed memory. In processes of their own: these settings are of a process."""

import contextlib
import platform
import resource

import pytest
import torch

from benchmarks.common import in_fresh_process
from benchmarks.loading import anonymous_bytes
from wan.quant.scratch import freed_memory_kept, freed_memory_returned, return_freed_memory

SIZE = 64 << 20  # bytes: more than glibc ever keeps by itself

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults_and_rest(is_kept):
    """(pages that came fresh for twelve tensors, one after another; bytes that stay when all is over)"""
    return_freed_memory()
    before, started = anonymous_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with freed_memory_kept() if is_kept else contextlib.nullcontext():
        for _ in range(12):
            torch.empty(SIZE, dtype=torch.uint8).fill_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - started
    return faults, anonymous_bytes() - before


def test_freed_memory_serves_the_next_tensor():
    kept, rest = in_fresh_process(faults_and_rest, True)
    fresh, _ = in_fresh_process(faults_and_rest, False)
    assert rest < SIZE / 4
    # The first is always fresh. In its place a small piece may settle (of the pool of threads, which starts now), and
    # in that of the next, so that one or two more are; then the places are large enough.
    assert kept < fresh / 3


def rest_afterwards():
    with freed_memory_kept():
        pass
    before = anonymous_bytes()
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return anonymous_bytes() - before


def test_afterwards_large_tensors_are_given_back_at_once():
    assert in_fresh_process(rest_afterwards) < SIZE / 4


def left_below_another(is_returned):
    """Bytes that stay of a tensor that is freed below one that is not, when larger ones have come and gone."""
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)
    with freed_memory_returned() if is_returned else contextlib.nullcontext():
        before = anonymous_bytes()
        below, above = (torch.empty(size, dtype=torch.uint8).fill_(1) for size in (24 << 20, 100 << 10))
        del below
        left = anonymous_bytes() - before
        del above
    return left


def test_memory_is_returned_from_between_others():
    assert in_fresh_process(left_below_another, True) < 6 << 20 < 18 << 20 < in_fresh_process(left_below_another, False)
