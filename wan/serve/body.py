"""The body of a request, as JSON or as a form, to one object of fields."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from wan.files import parse_json
from wan.options.values import shown
from wan.serve.refused import Refused, bad

MOST_TEXT_BYTES = 64_000_000  # of a body of JSON, and of a field that is no file: they are held in memory
_MOST_FIELDS, _MOST_FILES, _MOST_DEPTH = 300, 110, 4
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


@asynccontextmanager
async def read_body(request: Request) -> AsyncIterator[dict[str, Any]]:
    """Fields by name; files, which are there until this ends, as uploads. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        limits = {"max_files": _MOST_FILES, "max_fields": _MOST_FIELDS, "max_part_size": MOST_TEXT_BYTES}
        async with request.form(**limits) as form:
            yield _nested(form.multi_items())
        return
    if kind not in ("application/json", ""):
        raise Refused(415, "a request is JSON or multipart/form-data", "unsupported_media_type")
    yield await _json(request)


async def _json(request: Request) -> dict[str, Any]:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_TEXT_BYTES:
            told = f"JSON has at most {MOST_TEXT_BYTES:,} bytes: send files as multipart/form-data"
            raise Refused(413, told, "too_large")
        parts.append(part)
    try:
        body = await asyncio.to_thread(parse_json, b"".join(parts) or b"{}", True)
    except ValueError as error:
        raise bad(None, "the request is not valid JSON", "invalid_json") from error
    if not isinstance(body, dict):
        raise bad(None, "the request must be an object of fields", "invalid_json")
    return body


def _nested(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of a form, with those called a[b] and a[] as objects and lists, as the `openai` client writes them."""
    found: dict[str, Any] = {}
    for name, value in items:
        match = _NAME.fullmatch(name)
        keys = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])] if match else []
        if not keys or len(keys) > _MOST_DEPTH:
            raise bad(None, f"unknown field {shown(name)}", "unknown_parameter")
        _put(found, keys, value, name)
    return found


def _put(found: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    if keys[-1] == "":
        keys, value, is_list = keys[:-1], [value], True
    else:
        is_list = False
    for key in keys[:-1]:
        found = found.setdefault(key, {})
        if key == "" or not isinstance(found, dict):
            raise bad(None, f"unknown field {shown(name)}", "unknown_parameter")
    there = found.get(keys[-1])
    if there is None:
        found[keys[-1]] = value
    elif isinstance(there, list):
        there.extend(value if is_list else [value])
    elif isinstance(there, dict) or is_list:
        raise bad(None, f"the field {shown(name)} is there twice")
    else:  # a name twice is a list
        found[keys[-1]] = [there, value]
