"""The pages' addresses, and the stream of changes that keeps a page up to date."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from urllib.parse import parse_qs, quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from dagster_taskiq.dashboard.access import Access
from dagster_taskiq.dashboard.actions import ACTIONS, Action, Subject
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.dashboard.flight import title_of
from dagster_taskiq.dashboard.gate import Gate
from dagster_taskiq.dashboard.looks import Watch
from dagster_taskiq.dashboard.orders import Orders
from dagster_taskiq.dashboard.pages import Pages, View, Wish
from dagster_taskiq.dashboard.words import short_id
from dagster_taskiq.messages.plain_text import plain_name

#: The most pages that are kept up to date at a time.
MAX_VIEWERS = 200

#: The longest form that is read.
_MAX_FORM_BYTES = 16 * 1024

#: The longest reason, in characters.
_MAX_REASON = 500

_KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def make_app(watch: Watch, orders: Orders, face: Face, access: Access, name: str = "") -> Starlette:
    """The page as an ASGI app, which closes its watch at its end.

    Args:
        name: of its cookies, to tell it from another one on the same host.
    """
    web = _Web(watch, orders, face, access, name)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await watch.close()

    return Starlette(
        routes=[
            Route("/", web.overview),
            Route("/runs/{run_id:path}", web.run),
            Route("/ended", web.ended),
            Route("/events", web.events),
            Route("/static/{name}", web.static),
            Route("/login", web.login, methods=["GET", "POST"]),
            Route("/logout", web.log_out, methods=["POST"]),
            Route("/order", web.order, methods=["GET", "POST"]),
            Route("/health", web.health),
        ],
        middleware=[
            Middleware(Gate, access=access, prefix=face.prefix, login_cookie=web.login_cookie)
        ],
        exception_handlers={HTTPException: web.say_error},
        lifespan=lifespan,
    )


class _Web:
    """What each address answers."""

    def __init__(self, watch: Watch, orders: Orders, face: Face, access: Access, name: str) -> None:
        self._watch = watch
        self._orders = orders
        self._face = face
        self._access = access
        self._pages = Pages(face)
        self._files = _static_files()
        self._viewers = 0
        self.login_cookie = f"dagster_taskiq_login{name}"
        self._form_cookie = f"dagster_taskiq_form{name}"

    # --- what is seen ---

    async def overview(self, request: Request) -> Response:
        """All of it."""
        return await self._page(Wish())

    async def ended(self, request: Request) -> Response:
        """What has ended."""
        return await self._page(Wish(View.ENDED))

    async def run(self, request: Request) -> Response:
        """One run."""
        return await self._page(Wish(View.RUN, plain_name(request.path_params["run_id"])))

    async def _page(self, wish: Wish) -> Response:
        look = await self._watch.latest()
        return HTMLResponse(self._pages.page(look, self._orders.recent(), wish))

    async def events(self, request: Request) -> Response:
        """What changes of a page, as it does."""
        if self._viewers >= MAX_VIEWERS:
            return PlainTextResponse(f"There are {MAX_VIEWERS} viewers already.\n", 503)
        query = request.query_params
        views = [it for it in View if it.value == query.get("view", "")]
        if not views:
            raise HTTPException(404)
        wish = Wish(views[0], plain_name(query.get("run", "")))
        headers = {"X-Accel-Buffering": "no"}  # a proxy would hold back what is streamed
        return StreamingResponse(
            self._changes(wish), headers=headers, media_type="text/event-stream"
        )

    async def _changes(self, wish: Wish) -> AsyncIterator[str]:
        self._viewers += 1
        try:
            sent: Mapping[str, str] = {}
            number = -1
            while (look := await self._watch.after(number)) is not None:
                number = look.number
                parts = self._pages.parts(look, self._orders.recent(), wish)
                news = {name: html for name, html in parts.items() if sent.get(name) != html}
                sent = parts
                yield f"data: {json.dumps(news)}\n\n"
        finally:
            self._viewers -= 1

    async def static(self, request: Request) -> Response:
        """A style or a script."""
        name = request.path_params["name"]
        if name not in self._files:
            raise HTTPException(404)
        kind = _KINDS[name.rpartition(".")[2]]
        headers = {"Cache-Control": "no-cache"}
        return Response(self._files[name], headers=headers, media_type=kind)

    async def health(self, request: Request) -> Response:
        """That this process lives; of the servers it says nothing."""
        return PlainTextResponse("ok\n")

    # --- login ---

    async def login(self, request: Request) -> Response:
        """The form that asks for the token, and what becomes of it."""
        if request.method != "POST":
            then = request.query_params.get("next", "")
            return HTMLResponse(self._pages.render("login.html", is_wrong=False, then=then))
        form = await _form_of(request)
        then = form.get("next", "")
        if not self._access.is_token(form.get("token", "").strip()):
            return HTMLResponse(self._pages.render("login.html", is_wrong=True, then=then), 401)
        answer = RedirectResponse(self._face.prefix + _own_path(then), 303)
        self._set_cookie(request, answer, self.login_cookie, self._access.login_cookie(), "lax")
        return answer

    async def log_out(self, request: Request) -> Response:
        """Forget the login of this browser."""
        answer = RedirectResponse(self._face.path("login"), 303)
        answer.delete_cookie(self.login_cookie, path=self._face.path())
        return answer

    # --- orders ---

    async def order(self, request: Request) -> Response:
        """The page that asks whether an order is meant, and the order."""
        if not self._face.may_act:
            raise HTTPException(
                403, "Orders are given here only if the page was started with --allow-actions."
            )
        if request.method == "POST":
            return await self._give(request, await _form_of(request))
        query = request.query_params
        action = _action_of(query.get("do", ""))
        session = self._session(request) or secrets.token_urlsafe(24)
        page = self._pages.render(
            "order.html",
            action=action,
            target=query.get("on", ""),
            name=self._name_of(action, query.get("on", "")),
            form_token=self._access.form_token(session),
        )
        answer = HTMLResponse(page)
        self._set_cookie(request, answer, self._form_cookie, session, "strict")
        return answer

    def _name_of(self, action: Action, target: str) -> str:
        """What people call what an order is about, by what was seen last.

        Not by the address, which anybody may have made.
        """
        overview = self._watch.look.overview
        names = {
            Subject.WORKER: {it.worker_id: it.name for it in overview.workers},
            Subject.QUEUE: {it.name: it.name for it in overview.queues},
            Subject.TASK: {
                it.task_id: f"{title_of(it)} of run {short_id(it.run_id)}"
                for it in overview.tasks()
            },
        }[action.subject]
        if target not in names:
            raise HTTPException(410, f"That {action.subject.value} is not there any more.")
        return names[target]

    async def _give(self, request: Request, form: Mapping[str, str]) -> Response:
        if not self._access.is_form_token(self._session(request), form.get("form_token", "")):
            raise HTTPException(
                403,
                "This form was not made for this browser by this process. Go "
                "back to the page and choose again.",
            )
        action = _action_of(form.get("do", ""))
        reason = form.get("reason", "").strip()[:_MAX_REASON]
        await self._orders.give(action, form.get("on", ""), reason, request.scope["user_name"])
        return RedirectResponse(self._face.path() + "#orders", 303)

    def _session(self, request: Request) -> str | None:
        return request.cookies.get(self._form_cookie)

    def _set_cookie(
        self, request: Request, answer: Response, name: str, value: str, same_site: str
    ) -> None:
        # behind a proxy the browser speaks TLS with that; who lies here lies to itself
        is_secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        answer.set_cookie(
            name,
            value,
            path=self._face.path(),
            httponly=True,
            secure=is_secure,
            samesite="strict" if same_site == "strict" else "lax",
        )

    async def say_error(self, request: Request, error: Exception) -> Response:
        """A page that cannot be shown, in a sentence."""
        assert isinstance(error, HTTPException)
        text = "There is no such page." if error.status_code == 404 else error.detail
        page = self._pages.render("error.html", text=text)
        return HTMLResponse(page, error.status_code, error.headers)


def _action_of(key: str) -> Action:
    if key not in ACTIONS:
        raise HTTPException(404)
    return ACTIONS[key]


def _own_path(path: str) -> str:
    """A path that somebody has asked for, where it is one of this page."""
    is_own = path.startswith("/") and not path.startswith("//")
    return quote(path) if is_own else "/"


async def _form_of(request: Request) -> dict[str, str]:
    """The fields of a form; of several with one name the last."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too long.")
    fields = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=20)
    return {name: values[-1] for name, values in fields.items()}


def _static_files() -> dict[str, bytes]:
    """By their names, read once: no path of a request reaches the disk."""
    place = files("dagster_taskiq.dashboard") / "static"
    return {it.name: it.read_bytes() for it in place.iterdir() if it.is_file()}
