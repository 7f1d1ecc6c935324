"""The elementwise chains of the transformer, chosen once a forward for the device that computes.

A compiler would fuse these. Without one, `Cpu` and `Gpu` do it slice by slice; `Reference` says what they compute, and
has a gradient, for the training of the tiny model.
"""

from __future__ import annotations

import torch

from wan.models.ops.reference import Reference
from wan.models.ops.sliced import Cpu, Gpu, acting_type

OPS = {"reference": Reference(), "cpu": Cpu(), "gpu": Gpu()}


def choose_ops(name: str | None, device: torch.device) -> Reference:
    """Those of that name; None: what fits the device, and whether a gradient is asked for."""
    if name is None:
        name = "reference" if torch.is_grad_enabled() else "cpu" if acting_type(device) == "cpu" else "gpu"
    return OPS[name]
