"""Parallelism that stands beside the model. Knows nothing of Wan. Importing it imports no torch, for `--help`."""

from typing import Any

__all__ = ["Parallel"]


def __getattr__(name: str) -> Any:
    if name == "Parallel":
        from wan.distributed.parallel import Parallel

        return Parallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
