"""Options in a file: JSON or YAML, by the names of their flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import open_plain, parse_json
from wan.options import FLAGS

_MOST_BYTES = 1 << 20


def config_options(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, but for the options that are `given` (not None). Paths in it start from the folder of today,
    as those of the command line do.

    Raises UsageError where there is no such file or it holds another thing than options, SwanError if it is damaged.
    """
    told = read_table(path, "config", "options by their names, as {task: t2v-14B, sample_steps: 30}")
    if unknown := [one for one in told if one not in FLAGS]:
        raise UsageError(f"--config: {printable(path)}: unknown option {printable(str(unknown[0]))}; see --help")
    return told | {one: value for one, value in given.items() if value is not None}


class _UniqueNames(yaml.SafeLoader):
    """Plain data, in which no name may be there twice: the first one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
            raise ValueError(f"duplicate name {twice[:200]}")
        return super().construct_mapping(node, deep)


def read_table(path: str, flag: str, what: str) -> dict[Any, Any]:
    """A JSON or YAML file that must hold `what`, a table; flag: of whoever asks, for messages. Raises as above."""
    name = printable(path)
    if not os.path.isfile(path):
        raise UsageError(f"--{flag}: no file {name}")
    with open_plain(path) as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise UsageError(f"--{flag}: {name} is larger than {_MOST_BYTES:,} bytes: it is no file of options")
    try:
        told = parse_json(text, unique=True) if path.lower().endswith(".json") else yaml.load(text, _UniqueNames)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise SwanError(f"--{flag}: {name} is neither JSON nor YAML: {one_line(error)}") from error
    if not isinstance(told, dict) or not told:
        raise UsageError(f"--{flag}: {name} must hold {what}")
    return told
