"""The header of a safetensors file: a JSON object, tensor -> element type, shape and place. No torch.

Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wan.errors import SwanError
from wan.weights.source import truncated

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Parsed header and the offset at which the data begins."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise SwanError(f"{path}: not a safetensors file (header length {header_bytes:,} of {size_bytes:,} bytes)")
        data_start = 8 + header_bytes
        if data_start > size_bytes:
            raise truncated(path, data_start, size_bytes, "at least ")
        text = file.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SwanError(f"{path}: the safetensors header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise SwanError(f"{path}: the safetensors header is damaged (not a JSON object)")
    return header, data_start


def _without_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(name for name in names if names.count(name) > 1)}")
    return result
