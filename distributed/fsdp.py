"""Weights shared out among ranks: each keeps a part of every tensor and gathers a block's when it is used (FSDP2).

Loading goes meta device -> `shard_model` -> each rank reads its own rows -> `with_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def weight_mesh(device_type: str, local_size: int) -> DeviceMesh:
    """All ranks share one copy of the weights; on several machines of `local_size` ranks, those of each machine do, so
    that weights are gathered inside a machine (HSDP)."""
    size = dist.get_world_size()
    if 1 < local_size < size and size % local_size == 0:
        shape, names = (size // local_size, local_size), ("copies", "weights")
    else:
        shape, names = (size,), ("weights",)
    return dist.init_device_mesh(device_type, shape, mesh_dim_names=names)


def shard_model(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Share out the parameters of `model` by their first axis. Whole are those of one block at a time, the next one's
    on the way, and, during a forward, those outside of blocks."""
    from torch.distributed.fsdp import fully_shard

    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])


def own_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """From which row to which this rank keeps `parameter`, cut as `torch.chunk` does."""
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    step = -(-rows // ranks)
    return min(rank * step, rows), min((rank + 1) * step, rows)


def with_rows(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    """The parameter of which this rank keeps `rows`."""
    from torch.distributed.tensor import DTensor

    kept = DTensor.from_local(
        rows.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(kept, requires_grad=False)
