"""A configuration of LightX2V as a file, and `generate.py --config_json FILE`. No torch, but for quantised files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan.compat.lightx2v.translate import Translated, translate
from wan.errors import SwanError, printable
from wan.options import Request, build_request
from wan.options.config import read_table


def read_config(path: str) -> dict[str, Any]:
    """The keys of the file, not yet checked. Raises UsageError or SwanError where it holds none."""
    keys = read_table(str(path), "config_json", 'keys of LightX2V, as {"infer_steps": 40}')
    return {str(name): value for name, value in keys.items()}


def file_request(path: str, given: Mapping[str, Any], world_size: int = 1) -> tuple[Request, tuple[str, ...]]:
    """The request of a file, and lines on what of it has no effect. given: our options, which go before the file's.

    Raises UsageError or SwanError, one line, which names the file and its key where these are at fault.
    """
    theirs: Translated = translate(read_config(path), printable(path), given)
    try:
        request = build_request(theirs.options, world_size)
    except SwanError as error:
        raise theirs.renamed(error) from None
    if theirs.schemes:
        from wan.weights.checkpoint import Checkpoint

        load = request.load
        theirs.check_schemes(Checkpoint(load.ckpt_dir, theirs.spec, load.files, partial=True))  # nothing is downloaded
    return request, theirs.notes
