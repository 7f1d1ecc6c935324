"""LightX2V's pipeline class and its JSON configurations, over the engine: the import is all that changes in a script.

    from wan.compat.lightx2v import LightX2VPipeline

Names, defaults and meanings are those of LightX2V (github.com/ModelTC/LightX2V, August 2026). `keys` says of each of
its keys what becomes of it here, `translate` does it, for the class as for `generate.py --config_json`. No torch, until
`create_generator`.
"""

from wan.compat.lightx2v.pipeline import LightX2VPipeline

__all__ = ["LightX2VPipeline"]
