"""Whoever has a key of the server gets to the page: a form that takes the key, and a cookie that says it was given."""

from __future__ import annotations

from html import escape

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from wan.serve.body import read_body
from wan.serve.guard import COOKIE, Keys
from wan.serve.web.texts import language_of, text

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_PAGE = """<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; margin: 0 16px }}
form {{ display: grid; gap: 12px; width: min(100%, 340px) }}
h1 {{ font-size: 22px; margin: 0 }}
input, button {{ font: inherit; padding: 10px 12px; border-radius: 8px; width: 100%; box-sizing: border-box }}
input {{ border: 1px solid #8888 }}
button {{ background: #2563eb; color: #fff; border: 0; cursor: pointer }}
p {{ color: #dc2626; margin: 0 }}
small {{ opacity: .75 }}
</style></head><body><form method="post" action="login"><h1>{title}</h1>
<label>{key}<input name="key" type="password" autocomplete="current-password" required autofocus></label>
<small>{help}</small>{wrong}<button>{log_in}</button></form></body></html>"""


def login_page(accept_language: str, is_wrong: bool = False) -> Response:
    """For those who have not given a key yet."""
    language = language_of(accept_language)
    told = {name: escape(text(name, language)) for name in ("title", "key", "log_in")}
    wrong = f'<p role="alert">{escape(text("key_wrong", language))}</p>' if is_wrong else ""
    page = _PAGE.format(language=language, help=escape(text("key_help", language)), wrong=wrong, **told)
    return HTMLResponse(page, 401, _HEADERS)


def add_login(app: FastAPI, keys: Keys) -> None:
    @app.post("/login")
    async def login(request: Request) -> Response:
        async with read_body(request) as body:
            key = body.get("key")
        if not isinstance(key, str) or not keys.has(key.strip()):
            return login_page(request.headers.get("accept-language", ""), is_wrong=True)
        answer = RedirectResponse("./", 303)
        # The browser itself says how it came; of a proxy's headers uvicorn believes those from this machine alone.
        is_secure = "https" in (request.url.scheme, request.headers.get("origin", "").partition(":")[0])
        answer.set_cookie(COOKIE, keys.cookie(key.strip()), httponly=True, samesite="strict", secure=is_secure)
        return answer

    @app.get("/login")
    async def again(request: Request) -> Response:
        """Where a browser is after a wrong key, when it is loaded anew."""
        return RedirectResponse("./", 303)

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        answer = RedirectResponse("./", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer
