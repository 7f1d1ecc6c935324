"""Swan: inference for the Wan 2.1 and 2.2 video diffusion models. Importing the package imports no torch."""

__version__ = "0.1.0"
