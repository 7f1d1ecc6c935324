"""Swan: inference for the Wan 2.1 and 2.2 video diffusion models. Importing the package imports no torch."""

from importlib import import_module as _import_module
from os import path as _path
from typing import Any as _Any

__version__ = "0.1.0"

_HERE = __path__[0]
if not _path.isdir(_path.join(_HERE, "cache")):  # a checkout: cache/, configs/ and distributed/ lie beside wan/
    __path__.append(_path.dirname(_path.abspath(_HERE)))


def __getattr__(name: str) -> _Any:
    if name == "Engine":  # here, for it imports torch
        return _import_module("wan.engine").Engine
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
