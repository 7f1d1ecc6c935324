"""Parallelism that stands beside the model. Knows nothing of Wan."""

from distributed.parallel import Parallel

__all__ = ["Parallel"]
