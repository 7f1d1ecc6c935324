"""Kernels in Triton: where they are used, and how they become operations of torch.

A module that holds such kernels is named `triton` and is imported by functions alone, for Triton is not everywhere.
NOT RUN BY US on a GPU: what they compute is tested by Triton's interpreter on a CPU, and that they compile for GPUs
(tests/ops). So the first call on a device is compared with torch's own formulas, which are used where it fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wan.errors import one_line

_LIBRARY = torch.library.Library("swan", "FRAGMENT")  # what is defined with it lives as long as it does


def are_there(device: torch.device) -> bool:
    """Whether kernels are compiled for this device: CUDA, where Triton is installed. SWAN_TRITON=0 turns them off."""
    if device.type != "cuda" or os.environ.get("SWAN_TRITON") == "0":
        return False
    return importlib.util.find_spec("triton") is not None


def is_right(what: str, compare: Callable[[], bool]) -> bool:
    """Whether a first call gives the right numbers; where it does not, a warning says so. what: "... kernels"."""
    try:
        if compare():
            return True
        reason = "its numbers are wrong"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver can say
        reason = one_line(error) or type(error).__name__
    warnings.warn(f"no {what}: {reason}; torch's formulas are used, slower", stacklevel=3)
    return False


def operation(schema: str, empty: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes what launches a kernel an operation of torch, `swan::NAME(...)`, which modes of dispatch see as one.

    empty: gives its result for tensors on the meta device. A CPU has it by the interpreter alone.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            device = next(one.device for one in args if isinstance(one, Tensor))
            # Triton launches on the present device, whatever that of the tensors.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return launch(*args)

        _LIBRARY.define(schema)
        for key, function in (("CPU", run), ("CUDA", run), ("Meta", empty)):
            _LIBRARY.impl(name, function, key)
        return getattr(torch.ops.swan, name).default

    return register
