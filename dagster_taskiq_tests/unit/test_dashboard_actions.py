"""What can be ordered on the web page: what is offered where, what it does, and what is said."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from dagster_taskiq.dashboard import actions
from dagster_taskiq.dashboard.access import Access
from dagster_taskiq.dashboard.actions import ACTIONS
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.messages.control import OrderReader
from dagster_taskiq.messages.results import TaskResult
from dagster_taskiq.messages.worker_records import PAUSED
from dagster_taskiq_tests.unit.dashboard_client import Browser, Page, fields_of
from dagster_taskiq_tests.unit.overview_scene import RUN, Scene, step, worker

pytestmark = pytest.mark.once

ACTING = Face(may_act=True)

#: Of a page with a login, which knows who orders.
BASIC = "ann:secret"
ANN = {"Authorization": f"Basic {base64.b64encode(BASIC.encode()).decode()}"}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch, Scene())


@pytest.fixture
def ann(page: Page) -> Iterator[Browser]:
    """A user with a name."""
    with page.client(ACTING, Access(basic=BASIC)) as browser:
        browser.client.headers.update(ANN)
        yield browser


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that obey at once."""

    async def answers(_: object, told: Any, __: float) -> dict[str, float]:
        return dict.fromkeys((it.worker_id for it in told.records), 0.01)

    monkeypatch.setattr(actions, "answers_of", answers)


def order(browser: Browser, key: str, target: str, reason: str = "") -> str:
    """Give an order as a user does; the page after it."""
    path = f"/order?do={key}&on={target}"
    assert path.replace("&", "&amp;") in browser.get().text
    form = browser.get(path)
    assert ('name="reason"' in form.text) == ACTIONS[key].asks_reason
    done = browser.post("/order", {**fields_of(form.text), "reason": reason})
    assert (done.status_code, done.headers["location"]) == (303, "/#orders")
    return browser.text()


def buttons(browser: Browser) -> list[str]:
    """What is offered, by its key."""
    return [key for key in ACTIONS if f"do={key}&amp;" in browser.get().text]


def until(look: Callable[[], bool]) -> None:
    """The page looks again after a moment."""
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline, "it did not happen"


@pytest.mark.usefixtures("obedient")
@pytest.mark.parametrize(
    ("key", "state", "kind", "said"),
    [
        ("worker-pause", "running", "pause", "Pause w@h takes nothing new."),
        ("worker-resume", PAUSED, "resume", "Resume w@h takes tasks again."),
        ("worker-reload", "running", "reload", "Reload w@h reloads."),
        ("worker-drain", "running", "terminate", "Drain w@h finishes its steps and stops."),
    ],
)
def test_a_worker_obeys(
    page: Page, ann: Browser, key: str, state: str, kind: str, said: str
) -> None:
    asyncio.run(page.scene.beat(worker(state=state)))
    text = order(ann, key, "w%40h", "a new disk")
    assert f"Ordered here {said} 0 s ago by ann" in text
    (data,) = asyncio.run(page.scene.backend.wait_for_control("w@h", 0.01))
    given = OrderReader(page.scene.servers.signer, "w@h", "w@h").read(data)
    assert given["kind"] == kind
    assert given.get("reason") == ("a new disk" if kind == "pause" else None)


def test_what_is_offered_fits(page: Page, ann: Browser) -> None:
    """A paused worker can be resumed and not paused; one that is lost can be told nothing."""
    asyncio.run(page.scene.beat(worker()))
    of_queue = ["queue-pause"]
    assert buttons(ann) == ["worker-pause", "worker-reload", "worker-drain", *of_queue]
    asyncio.run(page.scene.beat(replace(worker(), state=PAUSED, pause_reason="a new disk")))
    until(lambda: "worker-resume" in buttons(ann))
    assert buttons(ann) == ["worker-resume", "worker-reload", "worker-drain", *of_queue]
    assert "Paused: a new disk" in ann.text()
    last = replace(worker(), sent_at=time.time(), done=12, failed=3, memory_bytes=600 * 2**20)
    asyncio.run(page.scene.backend.heartbeat(last, expires_seconds=0.01))
    until(lambda: buttons(ann) == of_queue)
    assert "w@h pid 7 · unknown lost 0 s ago dagster" in ann.text()
    assert "12 3 failed 600 MiB" in ann.text()
    assert "Worker w@h is lost" in ann.text()


@pytest.mark.usefixtures("obedient")
def test_a_queue_is_paused_and_resumed(page: Page, ann: Browser) -> None:
    asyncio.run(page.scene.beat(worker()))
    text = order(ann, "queue-pause", "dagster", "the warehouse is full")
    assert "Queue dagster is paused; 1 worker told." in text
    (pause,) = asyncio.run(page.scene.backend.paused_queues()).values()
    assert pause.reason == "the warehouse is full"
    until(lambda: "dagster steps paused" in ann.text())
    assert "the warehouse is full" in ann.text()
    assert "queue-pause" not in buttons(ann)
    stale = ann.get("/order?do=queue-resume&on=dagster").text
    assert "Queue dagster is resumed; 1 worker told." in order(ann, "queue-resume", "dagster")
    assert asyncio.run(page.scene.backend.paused_queues()) == {}
    ann.post("/order", fields_of(stale))
    assert "Queue dagster is not paused any more." in ann.text()


def test_a_step_is_cancelled(page: Page, ann: Browser) -> None:
    """One that waits is over at once, with the reason and the name of who has done it."""
    scene = page.scene
    asyncio.run(scene.open())
    waits, runs, whole = step("waits", epoch=scene.epoch), step("runs"), RUN
    asyncio.run(scene.claim(runs, worker()))
    asyncio.run(scene.beat(worker(), runs))
    asyncio.run(scene.send(waits, whole))
    html = ann.get().text
    assert f"on={whole.task_id}" not in html
    text = order(ann, "task-cancel", waits.task_id, "not needed")
    assert "Cancelled waits of run run, which no worker had started." in text
    results = asyncio.run(scene.backend.read_results("run", [waits.task_id]))
    result = TaskResult.from_bytes(results[waits.task_id], scene.servers.signer, waits.task_id)
    assert "Cancelled by ann on host" in result.reason
    assert "not needed" in result.reason
    form = fields_of(ann.get(f"/order?do=task-cancel&on={runs.task_id}").text)
    ann.post("/order", form)
    assert "Told the worker of runs of run run to stop it." in ann.text()
    for target, words in ((whole.task_id, "terminate it in Dagster"), ("x", "is over")):
        ann.post("/order", {**form, "on": target})
        assert words in ann.text()
