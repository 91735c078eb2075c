"""The web page on servers in memory, asked by a client in the same process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import unescape

import httpx
import pytest
from starlette.types import ASGIApp, Message

from dagster_taskiq.backend.memory import MemoryBackend
from dagster_taskiq.brokers.memory import MemoryBroker
from dagster_taskiq.connections import Servers
from dagster_taskiq.dashboard import actions, looks
from dagster_taskiq.dashboard.access import Access
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.dashboard.looks import Watch
from dagster_taskiq.dashboard.orders import Orders
from dagster_taskiq.dashboard.web import make_app
from dagster_taskiq.steering import helm
from dagster_taskiq_tests.unit.overview_scene import Scene


class Page:
    """A page that shows a scene.

    Attributes:
        is_resting: whether there is no server to be found.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
        self.scene = scene
        self.is_resting = False
        monkeypatch.setattr(
            looks, "open_backend", lambda _, signer: MemoryBackend(scene.state, signer)
        )
        monkeypatch.setattr(looks, "open_broker", lambda _: MemoryBroker(scene.queues))
        monkeypatch.setattr(helm, "open_backend", lambda *_: scene.backend)
        monkeypatch.setattr(helm, "open_broker", lambda _: MemoryBroker(scene.queues))
        monkeypatch.setattr(helm, "open_bell", lambda *_: None)
        monkeypatch.setattr(looks, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(actions, "ANSWER_SECONDS", 0.02)

    def _find(self) -> Servers | None:
        return None if self.is_resting else self.scene.servers

    def watch(self) -> Watch:
        """A reader of the scene."""
        return Watch(self._find, ["dagster"])

    def app(
        self,
        watch: Watch | None = None,
        face: Face | None = None,
        access: Access | None = None,
    ) -> ASGIApp:
        """The page as an app."""
        orders = Orders(self._find)
        return make_app(watch or self.watch(), orders, face or Face(), access or Access())

    @contextmanager
    def client(self, face: Face | None = None, access: Access | None = None) -> Iterator[Browser]:
        """A browser that has the page."""
        watch = self.watch()
        loop = asyncio.new_event_loop()
        transport = httpx.ASGITransport(self.app(watch, face, access))
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        try:
            yield Browser(client, loop)
        finally:
            loop.run_until_complete(client.aclose())
            loop.run_until_complete(watch.close())
            loop.close()


class Browser:
    """A client with the headers that a browser sends."""

    def __init__(self, client: httpx.AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self._loop = loop

    def get(self, path: str = "/", **headers: str) -> httpx.Response:
        own = {"Accept": "text/html", **_named(headers)}
        return self._loop.run_until_complete(self.client.get(path, headers=own))

    def post(self, path: str, fields: Mapping[str, str], **headers: str) -> httpx.Response:
        own = {"Origin": "http://localhost", "Accept": "text/html", **_named(headers)}
        asked = self.client.post(path, data=dict(fields), headers=own)
        return self._loop.run_until_complete(asked)

    def text(self, path: str = "/") -> str:
        """What is to be read on the page, which must be there."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return text_of(answer.text)


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def text_of(html: str) -> str:
    """The texts of a page in one line."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def fields_of(html: str) -> dict[str, str]:
    """The hidden fields of a form."""
    found = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', html)
    return {name: unescape(value) for name, value in found}


async def read_events(app: ASGIApp, path: str, count: int) -> list[dict[str, str]]:
    """The first events of a stream, after which the viewer goes away."""
    bare, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": bare,
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
        "scheme": "http",
        "server": ("localhost", 80),
    }
    found: list[dict[str, str]] = []
    is_enough = asyncio.Event()

    async def receive() -> Message:
        await is_enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        text = message.get("body", b"").decode()
        found.extend(json.loads(it) for it in re.findall(r"^data: (.*)$", text, re.MULTILINE))
        if len(found) >= count:
            is_enough.set()

    await asyncio.wait_for(app(scope, receive, send), 60)
    return found[:count]
