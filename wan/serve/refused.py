"""Why a request is refused, in the shape of OpenAI's errors, and without what is of nobody's business."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?<![\w.:/*~-])~?(?:/[^\s/'\";,:()]+)*/(?=[^\s/'\";,:()])")
_HIDDEN: set[str] = set()
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """status: of HTTP; code: for programs; param: the field at fault; retry_s: when to try again."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = without_paths(str(self))
        param = self.param and self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def bad(param: str | None, message: str, code: str = "invalid_value") -> Refused:
    """Of a request that is wrong."""
    return Refused(400, message, code, param)


def without_paths(text: str) -> str:
    """A message with the names of files, but not of the folders they are in."""
    for folder in sorted(_HIDDEN, key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?:[^\s/'\";,:()]+/)*", "", text)
    return _PATH.sub("", text.encode("utf-8", "replace").decode())


def hide(folder: Path) -> None:
    """From now on no message names this folder: it may have blanks in its name."""
    _HIDDEN.add(f"{folder}/")
