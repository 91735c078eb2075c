"""The gate before every page: names of the host, login, headers, the prefix of a proxy."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagster_taskiq.dashboard.access import SECURITY_HEADERS, Access
from dagster_taskiq.messages.plain_text import plain_name

#: What a stranger may see: nothing of it says anything of the servers.
_FOR_STRANGERS = ("/static/", "/login", "/health")

#: A browser asks with this to see a page.
_HTML = "text/html"


def cookie_of(headers: Headers, name: str) -> str | None:
    """The value of a cookie; None where there is none."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[name].value if name in cookies else None


class Gate:
    """Lets through to an app what may be let through.

    Args:
        prefix: of the paths of this page, with or without which a proxy may ask.
        login_cookie: its name.
    """

    def __init__(self, app: ASGIApp, access: Access, prefix: str, login_cookie: str) -> None:
        self._app = app
        self._access = access
        self._prefix = prefix
        self._login_cookie = login_cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        path = self._own_path(scope["path"])
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], path, headers)
        if refusal is not None:
            await refusal(scope, receive, send_safely)
            return
        scope = {**scope, "path": path, "root_path": "", "raw_path": quote(path).encode()}
        scope["user_name"] = self._user(headers) or ""
        await self._app(scope, receive, send_safely)

    def _own_path(self, path: str) -> str:
        if self._prefix and (path == self._prefix or path.startswith(f"{self._prefix}/")):
            return path[len(self._prefix) :] or "/"
        return path

    def _user(self, headers: Headers) -> str | None:
        cookie = cookie_of(headers, self._login_cookie)
        return self._access.user_of(headers.get("authorization"), cookie)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        """What is answered in place of the page; None to let it through."""
        if path == "/health":  # a probe asks by whatever name
            return None
        host = headers.get("host", "")
        if not self._access.is_own_host(host):
            name = plain_name(host.partition(":")[0])
            text = (
                f"This page does not go by the name {name!r}: start it with --allow-host {name}.\n"
            )
            return PlainTextResponse(text, 421)
        if method not in ("GET", "HEAD") and not self._access.is_own_form(
            host, headers.get("origin"), headers.get("sec-fetch-site")
        ):
            text = (
                "This form comes from another page. Behind a proxy: start it with --allow-host.\n"
            )
            return PlainTextResponse(text, 403)
        if self._user(headers) is not None or path.startswith(_FOR_STRANGERS):
            return None
        if self._access.basic is None and _HTML in headers.get("accept", ""):
            then = f"?next={quote(path, safe='')}" if path != "/" else ""
            return RedirectResponse(f"{self._prefix}/login{then}", 303)
        challenge = (
            {}
            if self._access.basic is None
            else {"WWW-Authenticate": 'Basic realm="dagster-taskiq", charset="UTF-8"'}
        )
        return PlainTextResponse("Log in to see this page.\n", 401, challenge)
