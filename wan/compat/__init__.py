"""Entry points for code written for other GGUF loaders: gguf_loader, CineWan, VideoX-Fun and diffusers.

`python -m wan.compat.run_gguf_t2v --help` is their command line. Importing this package loads nothing.
"""

from importlib import import_module

_HOME = {
    "load_gguf_pipeline": "pipeline",
    "load_gguf_transformer": "transformer",
    "create_wan_transformer_gguf": "state_dict",
}
__all__ = ["create_wan_transformer_gguf", "load_gguf_pipeline", "load_gguf_transformer"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
