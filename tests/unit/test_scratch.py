"""What the C library does with freed memory. In processes of their own: these settings are of a process."""

import contextlib
import platform
import resource

import pytest
import torch

from benchmarks.common import in_fresh_process
from benchmarks.loading import anonymous_bytes
from wan.quant.scratch import freed_memory_kept, return_freed_memory

SIZE = 64 << 20  # more than glibc ever keeps by itself

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults_and_rest(is_kept):
    """(pages that came fresh, for the second to the fourth of four tensors; bytes that stay when all is over)"""
    return_freed_memory()
    before, faults = anonymous_bytes(), 0
    with freed_memory_kept() if is_kept else contextlib.nullcontext():
        for round in range(4):
            started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(SIZE, dtype=torch.uint8).fill_(1)
            faults += (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - started) * (round > 0)
    return faults, anonymous_bytes() - before


def test_freed_memory_serves_the_next_tensor():
    faults, rest = in_fresh_process(faults_and_rest, True)
    assert faults < 100 and rest < SIZE / 4
    assert in_fresh_process(faults_and_rest, False)[0] >= 3 * SIZE / (2 << 20)  # pages may be large ones


def rest_afterwards():
    with freed_memory_kept():
        pass
    before = anonymous_bytes()
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return anonymous_bytes() - before


def test_afterwards_large_tensors_are_given_back_at_once():
    assert in_fresh_process(rest_afterwards) < SIZE / 4
