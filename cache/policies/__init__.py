"""The policies. Every module here registers its own; those named in PRIORITY come first, the others follow by name."""

from importlib import import_module
from pkgutil import iter_modules

from wan.cache.policy import POLICIES

PRIORITY = ("fbcache", "teacache")

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _name in (*PRIORITY, *sorted(POLICIES.keys() - set(PRIORITY))):
    POLICIES[_name] = POLICIES.pop(_name)
