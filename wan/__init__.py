"""Swan: inference for the Wan 2.1 and 2.2 video diffusion models. Importing the package imports no torch."""

from os import path as _path

__version__ = "0.1.0"

_HERE = __path__[0]
if not _path.isdir(_path.join(_HERE, "cache")):  # a checkout: cache/, configs/ and distributed/ lie beside wan/
    __path__.append(_path.dirname(_path.abspath(_HERE)))
