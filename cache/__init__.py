"""Reuse of transformer work between sampling steps. Knows nothing of Wan.

`CacheManager` and the policies need torch; what is imported here does not.
"""

from importlib import import_module

from wan.cache.context import StepContext

_LAZY = {"CacheManager": "manager", "NoCache": "manager", "NO_CACHE": "manager"}
__all__ = ["NO_CACHE", "CacheManager", "NoCache", "StepContext"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
