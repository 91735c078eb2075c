"""Who may see the web page and order workers about there, and by what name, way and form."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dagster_taskiq.dashboard.access import Access, check_login
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.errors import ConfigError, UntrustedError
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq_tests.unit.dashboard_client import Browser, Page, fields_of, text_of
from dagster_taskiq_tests.unit.overview_scene import SERVERS, Scene, worker

pytestmark = pytest.mark.once

TOKEN = "correct-horse-battery"
BASIC = "ann:pass:word"
ACTING = Face(may_act=True)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page(monkeypatch, Scene())
    asyncio.run(page.scene.beat(worker("a@one")))
    return page


@pytest.fixture
def acting(page: Page) -> Iterator[Browser]:
    with page.client(ACTING) as browser:
        browser.text()
        yield browser


def orders(scene: Scene, worker_id: str = "a@one") -> list[str]:
    """The kinds of the orders that wait for a worker."""
    reader = OrderReader(scene.servers.signer, worker_id, worker_id)
    found = asyncio.run(scene.backend.wait_for_control(worker_id, 0.01))
    return [reader.read(it)["kind"] for it in found]


# --- names of the host ---


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost", True),
        ("LOCALHOST:3030", True),
        ("127.0.0.1:3030", True),
        ("[::1]:3030", True),
        ("10.1.2.3", True),
        ("tasks.example.com", True),
        ("tasks.example.com:8443", True),
        ("evil.example.com", False),
        ("localhost.evil.example.com", False),
        ("127.0.0.1.evil.example.com:3030", False),
        ("", False),
        ("[", False),
    ],
)
def test_a_name_that_leads_here_is_not_enough(page: Page, host: str, is_own: bool) -> None:
    """Somebody else's name may lead to this host (DNS rebinding); an address is nobody's name."""
    with page.client(access=Access(hosts=["Tasks.example.com"])) as browser:
        answer = browser.get(Host=host)
        assert answer.status_code == (200 if is_own else 421)
        assert is_own or "--allow-host" in answer.text
        assert browser.get("/health", Host=host).status_code == 200


# --- login ---


def test_a_token_opens_the_page(page: Page) -> None:
    """In a form of the page, which leaves a cookie that is not the token, or in a header."""
    with page.client(Face(may_log_out=True), Access(token=TOKEN)) as browser:
        for path in ("/", "/events", "/ended", "/runs/x"):
            answer = browser.get(path)
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/login")
            assert browser.get(path, Accept="*/*").status_code == 401
        assert browser.get("/static/page.css").status_code == 200
        assert "a@one" not in browser.text("/login")
        wrong = browser.post("/login", {"token": TOKEN[:-1]})
        assert wrong.status_code == 401
        assert "That is not the token" in wrong.text
        assert "set-cookie" not in wrong.headers
        right = browser.post("/login", {"token": TOKEN})
        assert right.status_code == 303
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert TOKEN not in cookie
        assert "a@one" in browser.text()
        browser.post("/logout", {})
        assert browser.get().status_code == 303
        assert browser.get(Authorization=f"Bearer {TOKEN}").status_code == 200
        assert browser.get(Authorization=f"Bearer {TOKEN}x", Accept="*/*").status_code == 401
        assert browser.get(Cookie="dagster_taskiq_login=x", Accept="*/*").status_code == 401


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("/runs/a%2Fb", "/taskiq/runs/a/b"),
        ("/ended", "/taskiq/ended"),
        ("/", "/taskiq/"),
    ],
)
def test_a_login_leads_to_the_page_that_was_asked_for(page: Page, asked: str, shown: str) -> None:
    """As one that Dagster's UI links to."""
    with page.client(Face("/taskiq"), Access(token=TOKEN)) as browser:
        form = browser.get(browser.get(asked).headers["location"])
        done = browser.post("/taskiq/login", {**fields_of(form.text), "token": TOKEN})
        assert done.headers["location"] == shown


@pytest.mark.parametrize(
    "where", ["https://evil.example.com", "//evil.example.com", "javascript:x"]
)
def test_a_login_leads_nowhere_else(page: Page, where: str) -> None:
    with page.client(access=Access(token=TOKEN)) as browser:
        done = browser.post("/login", {"next": where, "token": TOKEN})
        assert done.headers["location"] == "/"


def test_a_password_opens_the_page(page: Page) -> None:
    def said(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    with page.client(access=Access(basic=BASIC)) as browser:
        stranger = browser.get()
        assert stranger.status_code == 401
        assert stranger.headers["www-authenticate"].startswith("Basic realm=")
        assert browser.get(Authorization=said(BASIC)).status_code == 200
        for wrong in (said("ann:pass"), said("bob:pass:word"), "Basic !", "Basic", BASIC):
            assert browser.get(Authorization=wrong).status_code == 401


def test_a_cookie_is_for_tls_where_the_browser_speaks_it(page: Page) -> None:
    with page.client(access=Access(token=TOKEN)) as browser:
        plain = browser.post("/login", {"token": TOKEN})
        assert "Secure" not in plain.headers["set-cookie"]
        proxied = browser.post("/login", {"token": TOKEN}, X_Forwarded_Proto="https")
        assert "Secure" in proxied.headers["set-cookie"]


@pytest.mark.parametrize("values", [("short", None), (None, "ann"), (None, ":x"), (None, "ann:")])
def test_a_login_that_is_none_is_refused(values: tuple[str | None, str | None]) -> None:
    with pytest.raises(ConfigError, match=r"^(TOKEN|BASIC) "):
        check_login(*values, "TOKEN", "BASIC")


# --- headers ---


def test_every_answer_has_the_headers(page: Page) -> None:
    """Also one that is refused."""
    with page.client(access=Access(token=TOKEN)) as browser:
        strange = browser.get(Host="evil.example.com")
        for answer in (browser.get(), browser.get("/login"), browser.get("/nowhere"), strange):
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"


def test_what_is_not_there_is_said(page: Page) -> None:
    with page.client() as browser:
        for path in ("/nowhere", "/static/..%2fpages.py", "/events?view=x", "/static/x.css"):
            answer = browser.get(path)
            assert answer.status_code == 404, path
            assert "There is no such page." in answer.text
        assert browser.post("/", {}).status_code == 405


# --- a prefix ---


@pytest.mark.parametrize("asked", ["/taskiq", ""])
def test_a_proxy_may_keep_the_prefix_or_not(page: Page, asked: str) -> None:
    """What the page links to has it in both cases."""
    with page.client(Face(prefix="/taskiq", may_act=True)) as browser:
        html = browser.get(f"{asked}/").text
        assert 'href="/taskiq/static/page.css"' in html
        assert 'data-events="/taskiq/events"' in html
        assert 'href="/taskiq/order?do=worker-drain&amp;on=a%40one"' in html
        assert 'href="/static' not in html
        assert browser.get(f"{asked}/static/page.css").status_code == 200
        form = browser.get(f"{asked}/order?do=worker-reload&on=a%40one")
        assert 'action="/taskiq/order"' in form.text
        assert "Path=/taskiq/" in form.headers["set-cookie"]
        done = browser.post("/taskiq/order", fields_of(form.text))
        assert done.headers["location"] == "/taskiq/#orders"
    assert orders(page.scene) == ["reload"]


# --- orders ---


def test_orders_are_given_where_they_are_allowed(page: Page, acting: Browser) -> None:
    """A button leads to a question, and its form to the order; everybody sees what was done."""
    form = acting.get("/order?do=worker-drain&on=a%40one")
    assert "Drain worker a@one ?" in text_of(form.text)
    assert "SameSite=strict" in form.headers["set-cookie"]
    assert acting.post("/order", fields_of(form.text)).status_code == 303
    assert orders(page.scene) == ["terminate"]
    assert "Ordered here Drain Told a@one, which has not answered yet" in acting.text()


def test_orders_are_not_given_where_they_are_not_allowed(page: Page) -> None:
    with page.client() as browser:
        assert "Drain" not in browser.text()
        answer = browser.get("/order?do=worker-drain&on=a%40one")
        assert answer.status_code == 403
        assert "--allow-actions" in answer.text
        assert browser.post("/order", {"do": "worker-drain", "on": "a@one"}).status_code == 403
    assert orders(page.scene) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example.com"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8080"},
        {"Origin": ""},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "evil.example.com", "Origin": "http://evil.example.com"},
    ],
)
def test_forms_of_other_pages_are_refused(
    page: Page, acting: Browser, headers: dict[str, str]
) -> None:
    """Even with a token of ours, which they cannot have."""
    fields = fields_of(acting.get("/order?do=worker-drain&on=a%40one").text)
    assert acting.post("/order", fields, **headers).status_code in (403, 421)
    assert orders(page.scene) == []


def test_a_form_is_of_one_browser(page: Page, acting: Browser) -> None:
    """Without its token, or with that of another browser, it orders nothing."""
    fields = fields_of(acting.get("/order?do=worker-drain&on=a%40one").text)
    without = {key: it for key, it in fields.items() if key != "form_token"}
    with page.client(ACTING) as other:
        for given in (without, {**fields, "form_token": ""}, {**fields, "form_token": "é"}):
            assert acting.post("/order", given).status_code == 403
        assert other.post("/order", fields).status_code == 403
    assert orders(page.scene) == []


def test_a_proxy_may_ask_by_another_name(page: Page) -> None:
    with page.client(ACTING, Access(hosts=["tasks.example.com"])) as browser:
        browser.text()
        fields = fields_of(browser.get("/order?do=worker-reload&on=a%40one").text)
        proxied = {"Host": "10.0.0.5:3030", "Origin": "https://tasks.example.com"}
        # the cookie is of the name that the browser asked by
        cookie = "; ".join(f"{it.name}={it.value}" for it in browser.client.cookies.jar)
        assert browser.post("/order", fields, Cookie=cookie, **proxied).status_code == 303
    assert orders(page.scene) == ["reload"]


def test_an_order_that_cannot_be_given_is_said(page: Page, acting: Browser) -> None:
    """What is gone when it is asked for, and what goes between question and order."""
    for path, code in (("do=worker-drain&on=nobody", 410), ("do=nothing&on=a%40one", 404)):
        assert acting.get(f"/order?{path}").status_code == code
    fields = fields_of(acting.get("/order?do=worker-drain&on=a%40one").text)
    assert acting.post("/order", {**fields, "do": "nothing"}).status_code == 404
    asyncio.run(page.scene.backend.goodbye("a@one"))
    acting.post("/order", fields)
    assert "Drain That worker is not running any more." in acting.text()
    page.scene.state.freeze()
    acting.post("/order", fields)
    assert "Drain Cannot reach memory://test" in acting.text()
    page.is_resting = True
    acting.post("/order", fields)
    assert "No process uses the embedded server" in acting.text()


def test_a_long_form_is_not_read(acting: Browser) -> None:
    assert acting.post("/order", {"reason": "x" * 20_000}).status_code == 413


def test_an_order_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key of the settings; a worker that has another one is not told in vain."""
    mine, theirs = Signer(["m" * 32]), Signer(["t" * 32])
    page = Page(monkeypatch, Scene(replace(SERVERS, signer=mine)))
    mates = [
        replace(worker(name), sent_at=time.time(), key_ids=it.key_ids)
        for name, it in (("a@one", mine), ("b@two", theirs))
    ]
    for record in mates:
        asyncio.run(page.scene.beat(record))
    with page.client(ACTING) as browser:
        browser.text()
        for name in ("a%40one", "b%40two"):
            form = browser.get(f"/order?do=worker-drain&on={name}")
            browser.post("/order", fields_of(form.text))
        assert "Drain The order would be of no use: worker b@two refuses it" in browser.text()
    (order,) = asyncio.run(page.scene.backend.wait_for_control("a@one", 0.01))
    assert OrderReader(mine, "a@one", "a@one").read(order)["kind"] == "terminate"
    with pytest.raises(UntrustedError):
        OrderReader(theirs, "a@one", "a@one").read(order)
    assert orders(page.scene, "b@two") == []
