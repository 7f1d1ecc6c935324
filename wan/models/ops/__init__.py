"""The elementwise chains of the transformer, chosen once a forward for the device that computes.

`Reference` says what they compute, and has a gradient, for the training of the tiny model. `Triton` has a kernel for
each; where that cannot be, `Cpu` and `Gpu` do it slice by slice.
"""

from __future__ import annotations

import functools

import torch

from wan import kernels
from wan.models.ops.compare import compared, is_close
from wan.models.ops.reference import Reference
from wan.models.ops.sliced import Cpu, Gpu, acting_type

OPS = {"reference": Reference(), "cpu": Cpu(), "gpu": Gpu()}


def choose_ops(name: str | None, device: torch.device) -> Reference:
    """Those of that name, "triton" among them; None: what fits the device, and whether a gradient is asked for."""
    if name == "triton":
        return _triton()
    if name is None and device.type == "cuda" and not torch.is_grad_enabled():
        return _for_gpu(device)
    if name is None:
        name = "reference" if torch.is_grad_enabled() else "cpu" if acting_type(device) == "cpu" else "gpu"
    return OPS[name]


@functools.cache
def _triton() -> Reference:
    from wan.models.ops.triton import Triton

    return Triton()


@functools.cache
def _for_gpu(device: torch.device) -> Reference:
    def agree() -> bool:
        types = (torch.float32, torch.bfloat16)
        return all(is_close(*pair) for dtype in types for _, *pair in compared(_triton(), dtype, device))

    return _triton() if kernels.are_there(device) and kernels.is_right("fused kernels", agree) else OPS["gpu"]
