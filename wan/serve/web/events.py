"""What an event of the page says: gradio takes for granted that its own scripts sent it."""

from __future__ import annotations

import os
import re
from typing import Any

import gradio as gr

from wan.serve.refused import bad
from wan.serve.web.uploads import Uploads

_KINDS = {str: "a text", bool: "true or false"}


def checked(blocks: gr.Blocks, uploads: Uploads, told: Any) -> dict[str, Any]:
    """The parts of it that the page needs, and no others. Raises Refused."""
    told = told if isinstance(told, dict) else {}
    index, data, session, more = (told.get(name) for name in ("fn_index", "data", "session_hash", "event_data"))
    listener = blocks.fns.get(index) if type(index) is int else None
    if listener is None:
        raise bad("fn_index", "fn_index must be the number of an event of the page")
    if not isinstance(data, list) or len(data) != len(listener.inputs):
        raise bad("data", f"data must be a list of {len(listener.inputs)} values for this event of the page")
    if not isinstance(session, str) or not re.fullmatch(r"\w{1,64}", session, re.ASCII):
        raise bad("session_hash", "session_hash must be a text of 1 to 64 letters and digits")
    more = {} if more is None else more
    if not isinstance(more, dict) or not isinstance(more.get("id", ""), str):
        raise bad("event_data", "event_data must be an object, with a text as its id")
    data = [_value(uploads, component, one) for component, one in zip(listener.inputs, data)]
    return {"fn_index": index, "data": data, "session_hash": session, "event_data": {"id": more.get("id", "")}}


def _value(uploads: Uploads, component: Any, value: Any) -> Any:
    """What a component sends, by what it had at first."""
    if value is None or component.stateful:  # the latter is kept here
        return None
    if isinstance(component, gr.BrowserState):  # a page of another version may have kept it
        first, value = component.default_value, value if isinstance(value, dict) else {}
        return {name: value[name] for name in first if type(value.get(name)) is type(first[name])}
    name = component.elem_id.removeprefix("swan-")
    if component.data_model is None:
        if not isinstance(value, type(component.value)):
            raise bad(name, f"{name} must be {_KINDS[type(component.value)]}")
        return value
    if isinstance(value, list) and getattr(component, "file_count", "single") == "multiple":
        return [_file(uploads, name, one) for one in value]
    return _file(uploads, name, value)


def _file(uploads: Uploads, name: str, value: Any) -> dict[str, Any]:
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or not uploads.holds(path):
        raise bad(name, f"{name}: an event of the page names files that were sent to it, and no others")
    path = path if os.path.isfile(path) else str(uploads.folder)  # which is none: it is asked for again
    return {"path": path, "meta": {"_type": "gradio.FileData"}}
