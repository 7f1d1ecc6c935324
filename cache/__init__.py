"""Reuse of transformer work between sampling steps. Knows nothing of Wan."""

from cache.context import StepContext

__all__ = ["StepContext"]
