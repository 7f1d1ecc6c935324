"""Measured numbers that policies need, by model: shipped ones in cache/data, and files that calibration writes.

    {"format": "cache-coefficients-1", "models": {NAME: {
        "teacache": {"embedding" or "projection": {"polynomial": {EXPERT: [highest power first]},
                                                   "range": {EXPERT: [least x, largest x]}}},
        "magcache": {"ratios": {EXPERT: [1, gamma_1, ...]}}}}}

EXPERT is "model", or "high" and "low". Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

FORMAT = "cache-coefficients-1"
_SHIPPED = [Path(__file__).with_name("data") / f"{name}.json" for name in ("published", "tiny")]


def load_coefficients(model: str | None, path: str | os.PathLike | None = None) -> dict[str, Any]:
    """What is known of `model`: from the file `path`, where given, else from the shipped ones; {} if nothing.

    A file of one model holds for any model. Raises ValueError for a file that is none, or holds only other models.
    """
    if path is not None:
        models = read_coefficients(path)
        if model in models or len(models) == 1:
            return models[model] if model in models else next(iter(models.values()))
        raise ValueError(f"{path}: holds coefficients of {', '.join(models) or 'no model'}, not of {model}")
    for file in _SHIPPED:
        if model in (models := read_coefficients(file)):
            return models[model]
    return {}


def read_coefficients(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Model -> its coefficients. Raises ValueError, one line, for a file that does not follow the format."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a coefficients file ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("models"), dict):
        raise ValueError(f"{path}: not a coefficients file (its format is not {FORMAT})")
    for name, entry in data["models"].items():
        try:
            for signal in entry.get("teacache", {}).values():
                _check(signal["polynomial"], 1)
                _check(signal.get("range", {}), 2, 2)
            if "magcache" in entry:
                _check(entry["magcache"]["ratios"], 1)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the coefficients of {name} are damaged ({error})") from None
    return data["models"]


def write_coefficients(path: str | os.PathLike, models: dict[str, dict[str, Any]], note: str) -> None:
    """Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"format": FORMAT, "note": note, "models": models}, indent=1) + "\n")
    os.replace(temporary, path)


def _check(by_expert: dict[str, list[float]], least: int, most: float = math.inf) -> None:
    for expert, numbers in by_expert.items():
        fits = isinstance(numbers, list) and least <= len(numbers) <= most
        if not fits or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"{expert}: not the list of numbers that it should be")
