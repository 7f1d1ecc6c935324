"""What is asked of a longer prompt; it is made in `wan.prompt_extend`."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from wan.errors import UsageError
from wan.options.schema import Asked
from wan.options.values import choice, or_default

METHODS, LANGUAGES = ("local", "api"), ("zh", "en")
_LOCAL_MODEL, _API_URL = "Qwen/Qwen2.5-3B-Instruct", "https://api.openai.com/v1"


def check_extend(at: Asked, name: str, given: Any) -> str | None:
    """The value of --prompt_extend_NAME; None where the prompt stays as it is. Raises UsageError."""
    flag = f"prompt_extend_{name}"
    if not at.done["use_prompt_extend"]:
        if given is not None:
            raise UsageError(f"--{flag} is for --use_prompt_extend")
        return None
    if name == "method":
        return choice(given, "local", flag, METHODS)
    if name == "target_lang":
        return choice(given, "zh", flag, LANGUAGES)
    is_local = at.done["prompt_extend_method"] == "local"
    if name == "model":
        if not is_local and not given:
            raise UsageError("--prompt_extend_method api needs --prompt_extend_model, a model of that service")
        return given or _LOCAL_MODEL
    if is_local:
        if given is not None:
            raise UsageError("--prompt_extend_url is for --prompt_extend_method api")
        return None
    url = or_default(given, os.environ.get("OPENAI_BASE_URL") or _API_URL)
    try:
        is_address = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--prompt_extend_url must be an address as {_API_URL}, not {url[:100]!r}")
    return url
