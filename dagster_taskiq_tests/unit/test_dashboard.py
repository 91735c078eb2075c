"""The web page: what it shows of servers, workers, queues and tasks, and while a server is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest

from dagster_taskiq.connections import Servers
from dagster_taskiq.dashboard import flight, looks, pages
from dagster_taskiq.dashboard.face import Face
from dagster_taskiq.dashboard.looks import Watch
from dagster_taskiq.messages.attempt_ends import AttemptEnd, EndOutcome, HistoryBatch
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.withheld_steps import Withheld, WithheldGroup
from dagster_taskiq.servers.kinds import ServerOptions
from dagster_taskiq_tests.unit.dashboard_client import Browser, Page, read_events
from dagster_taskiq_tests.unit.overview_scene import Scene, step, worker

pytestmark = pytest.mark.once

EVIL = "<script>alert('x')</script>"

#: A broker and a backend that are two servers.
TWO = Servers(ServerOptions("amqp://localhost"), ServerOptions("redis://localhost"), Signer())


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch, Scene())


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Page:
    """On a broker as RabbitMQ, beside another backend."""
    return Page(monkeypatch, Scene(TWO, is_searchable=False))


@pytest.fixture
def browser(page: Page) -> Iterator[Browser]:
    with page.client() as browser:
        yield browser


def do(*steps: Coroutine[Any, Any, Any]) -> None:
    async def all_of_them() -> None:
        for it in steps:
            await it

    asyncio.run(all_of_them())


def ended(outcome: EndOutcome, key: str = "load", **values: Any) -> AttemptEnd:
    now = time.time()
    values = {"queue": "dagster", "ended_at": now - 60, "run_id": "run", "attempt": 1, **values}
    task_id = f"{key}-{outcome.value}-{values['ended_at']}"
    return AttemptEnd(task_id, step_key=key, outcome=outcome, **values)


def until_read(browser: Browser, *texts: str, path: str = "/") -> str:
    """Load the page until it has all of the texts."""
    deadline = time.monotonic() + 60
    while True:
        text = browser.text(path)
        if all(it in text for it in texts):
            return text
        assert time.monotonic() < deadline, f"{texts} not in {text}"


def test_it_shows_what_waits_and_runs(page: Page, browser: Browser) -> None:
    """Servers, workers, queues, and each task with its place and its reason."""
    scene, now = page.scene, time.time()
    runs_now, waits = step("load"), step("clean", sent_at=now - 90, state="", attempt=2)
    far = step("train", queue="gpu", sent_at=now - 200, state="")
    busy = worker("etl@one", slots=1, busy_slots=1)
    do(scene.open(), scene.claim(runs_now, busy), scene.beat(busy, runs_now))
    do(scene.send(waits, far))
    text = until_read(browser, "etl@one")
    assert "Broker and backend answers in" in text
    assert "load run running" not in text  # the row of the worker has the run's link
    assert "etl@one pid 7" in text
    assert "running dagster 1 /1 0 /1 load run" in text
    assert "dagster steps waiting 1 1 min 30 s 5: 1 1 etl@one" in text
    assert "gpu steps stuck 1 3 min 20 s 5: 1 0 none No worker listens" in text
    assert "clean try 2 waiting 1 min 30 s dagster 1 of 1" in text
    assert 'All 1 step slots of queue "dagster" are busy.' in text
    assert "Queue gpu is stuck 1 step waiting." in text


def test_it_shows_what_has_ended(page: Page, browser: Browser) -> None:
    """What went wrong comes first, though it is older."""
    now = time.time()
    lost = ended(
        EndOutcome.LOST,
        "join",
        ended_at=now - 300,
        worker="etl@one",
        job="nightly",
        sent_at=now - 420,
        started_at=now - 400,
        reason="Its worker has died.",
    )
    retried = ended(EndOutcome.FAILED, "load", is_retried=True, attempt=2, ended_at=now - 200)
    good = ended(EndOutcome.SUCCEEDED, "publish", ended_at=now - 10)
    do(page.scene.backend.add_history(HistoryBatch([lost, retried, good])))
    text = until_read(browser, "publish succeeded")
    assert "join lost 5 min ago run nightly etl@one dagster 20 s, 1 min 40 s Its worker" in text
    assert text.index("load try 2 failed, retried") < text.index("join lost")
    assert text.index("join lost") < text.index("publish succeeded")
    assert "Failed, last hour 1 1 retried" in text
    assert "failed 1 retried 1 succeeded 1" in text
    assert "median 20 s" in text


def test_the_page_of_a_run_is_about_that_run(page: Page, browser: Browser) -> None:
    """And each run that is named leads to it, and to Dagster where its address is known."""
    do(page.scene.beat(worker()), page.scene.send(step("mine"), step("other", run_id="a/b?c")))
    until_read(browser, "other", "mine")
    assert 'href="/runs/a%2Fb%3Fc"' in browser.get().text
    assert "↗" not in browser.text()
    text = browser.text("/runs/run")
    assert "mine" in text
    assert "other" not in text
    assert "Nothing of this run waits or is executed." in browser.text("/runs/nobody")
    with page.client(Face(dagster_url="https://dagster.example.com")) as linked:
        until_read(linked, "other")
        assert 'href="https://dagster.example.com/runs/a%2Fb%3Fc"' in linked.get().text


def test_what_anybody_has_written_is_only_text(page: Page, browser: Browser) -> None:
    """In names of workers, queues and steps, in reasons and in the address of the page itself."""
    scene = page.scene
    evil = replace(worker(EVIL), queues=(EVIL,), version=EVIL, other_backend=EVIL)
    task = step(EVIL, run_id=EVIL, queue=EVIL)
    bad = ended(EndOutcome.FAILED, EVIL, run_id=EVIL, reason=EVIL, job=EVIL, worker=EVIL)
    do(scene.open(EVIL), scene.claim(task, evil), scene.beat(evil, task))
    do(scene.send(step(EVIL, run_id=EVIL, queue=EVIL)))
    do(scene.backend.add_history(HistoryBatch([bad])))
    until_read(browser, EVIL)
    for path in ("/", "/ended", f"/runs/{EVIL.replace('/', '')}", f"/order?do={EVIL}"):
        html = browser.get(path).text
        assert html.count("<script") == html.count('<script src="/static/page.js"'), path
        assert 'href="javascript' not in html
    (events,) = asyncio.run(read_events(page.app(), "/events", 1))
    assert all("<script" not in html for html in events.values())


def test_much_is_cut_and_said(
    page: Page, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page stays of a size that a browser bears; the command line has the rest."""
    monkeypatch.setattr(flight, "MOST_ROWS", 4)
    monkeypatch.setattr(flight, "_MOST_OF_RUN", 3)
    monkeypatch.setattr(pages, "MOST_WORKERS", 2)
    scene = page.scene
    do(*[scene.beat(worker(f"w{n}@h")) for n in range(5)])
    do(*[scene.send(*[step(f"s{n}", run_id=run) for n in range(5)]) for run in "abc"])
    text = until_read(browser, "Workers 5", "In flight 3 runs")
    assert "3 more workers: dagster-taskiq worker list" in text
    assert "2 more tasks of this run: dagster-taskiq run show a" in text
    assert "4 more tasks of this run: dagster-taskiq run show b" in text
    assert "1 more run: dagster-taskiq task list" in text
    assert "1 more task of this run" in browser.text("/runs/a")


def test_it_shows_what_a_run_holds_back(page: Page, browser: Browser) -> None:
    """Also of a run of which nothing else is in flight."""
    full = WithheldGroup("db", "Slots <b> are taken.", (("pooled", 17.0), ("later", 17.0)))
    told = page.scene.backend.tell_withheld("run", Withheld((full,), 3), token="t")
    do(page.scene.open("run"), told)
    text = until_read(browser, "held back: pooled, later. Slots <b> are taken.")
    assert "3 more steps held back." in text


def test_it_says_what_it_cannot_tell(blind: Page) -> None:
    with blind.client() as browser:
        do(blind.scene.beat(worker()), blind.scene.send(step("one")))
        text = until_read(browser, "not told")
        assert "RabbitMQ says how many tasks wait in a queue, not which" in text
        assert "Not shown: 1 task in queue dagster (steps)." in text


def test_a_queue_that_its_last_worker_has_left_is_still_seen(blind: Page) -> None:
    """RabbitMQ lists no queues: the page knows it from before, and status with -q alone."""
    with blind.client() as browser:
        do(
            blind.scene.beat(replace(worker(), queues=("gpu",))),
            blind.scene.send(step("one", queue="gpu")),
        )
        until_read(browser, "gpu steps waiting 1")
        do(blind.scene.backend.goodbye("w@h"))
        assert "Queue gpu is stuck" in until_read(browser, "gpu steps stuck 1")


def test_it_goes_on_without_the_broker(blind: Page) -> None:
    """Workers are seen, queues as they were; with the broker all is up to date again."""
    with blind.client() as browser:
        do(blind.scene.beat(worker("a@one")), blind.scene.send(step("one")))
        until_read(browser, "dagster steps waiting 1")
        blind.scene.queues.freeze()
        do(blind.scene.beat(worker("b@two")))
        text = until_read(browser, "The broker is away", "b@two")
        assert "Cannot reach memory://test" in text
        assert "Queues are as seen" in text
        assert "dagster steps waiting 1" in text
        blind.scene.queues.thaw()
        text = until_read(browser, "answers in")
        assert "Not up to date" not in until_read(browser, "Broker answers")


def test_it_goes_on_without_the_backend(page: Page, browser: Browser) -> None:
    """With what was seen last; before anything was seen, with the reason alone."""
    page.scene.state.freeze()
    assert "The broker and backend is away" in until_read(browser, "Cannot reach")
    page.scene.state.thaw()
    do(page.scene.beat(worker("a@one")))
    until_read(browser, "a@one", "All is well")
    page.scene.state.freeze()
    text = until_read(browser, "is away")
    assert "All below is as seen" in text
    assert "a@one" in text


def test_a_server_that_goes_while_it_is_read_is_away(
    page: Page, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(page.scene.beat(worker("a@one")))
    until_read(browser, "a@one", "All is well")

    async def reach(*_: object) -> list[looks.ServerView]:
        page.scene.queues.freeze()
        return [looks.ServerView(("broker",), "x", "memory://test", 0.1)]

    monkeypatch.setattr(looks, "reach_servers", reach)
    assert "a@one" in until_read(browser, "The broker is away", "All below is as seen")


def test_a_mistake_of_ours_is_no_traceback(
    page: Page,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The reader goes on, and the log of the process has what is to be mended."""
    do(page.scene.beat(worker("a@one")))

    def fail(*_: object) -> None:
        raise RuntimeError("of ours")

    with monkeypatch.context() as broken:
        broken.setattr(looks, "read_overview", fail)
        assert "of ours" not in until_read(browser, "The look has failed")
    assert "RuntimeError: of ours" in caplog.text
    assert "All is well" in until_read(browser, "a@one", "All is well")


def test_an_embedded_server_that_rests_is_no_error(page: Page, browser: Browser) -> None:
    page.is_resting = True
    assert "No process uses the embedded server" in browser.text()
    page.is_resting = False
    do(page.scene.beat(worker("a@one")))
    until_read(browser, "a@one")


def test_changes_come_alone(page: Page) -> None:
    """A stream begins with the whole page, and then has the parts that differ."""
    do(page.scene.beat(replace(worker("a@one"), started_at=0.0)))

    async def test() -> None:
        app = page.app()
        first, second = await read_events(app, "/events", 2)
        assert {"workers", "queues", "flight", "ended", "servers", "charts"} <= first.keys()
        assert "flight" not in second
        await page.scene.send(step("new"))
        events = await read_events(app, "/events?view=run&run=run", 3)
        assert events[0].keys() == {"alerts", "flight", "ended"}
        assert any("new" in event.get("flight", "") for event in events)

    asyncio.run(test())


def test_many_viewers_have_one_reader(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share its looks, and nobody looks where nobody is."""
    seen: list[float] = []
    reach = looks.reach_servers

    async def counted(*servers: Any) -> Any:
        seen.append(time.monotonic())
        await asyncio.sleep(0.05)  # others come meanwhile
        return await reach(*servers)

    monkeypatch.setattr(looks, "reach_servers", counted)

    async def test() -> None:
        watch = Watch(lambda: page.scene.servers, [])
        found = await asyncio.gather(*[watch.latest() for _ in range(20)])
        assert {it.number for it in found} == {1}
        assert len(seen) == 1
        later = await asyncio.gather(*[watch.after(1) for _ in range(20)])
        assert {it.number for it in later if it} == {2}
        assert len(seen) == 2
        watch.stop()
        assert await watch.after(2) is None
        await watch.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(test())


def test_a_viewer_who_goes_takes_nobodys_look_away(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()
    reach = looks.reach_servers

    async def slow(*servers: Any) -> Any:
        begun.set()
        await may_end.wait()
        return await reach(*servers)

    monkeypatch.setattr(looks, "reach_servers", slow)

    async def test() -> None:
        watch = Watch(lambda: page.scene.servers, [])
        first = asyncio.create_task(watch.latest())
        await begun.wait()
        second = asyncio.create_task(watch.latest())
        await asyncio.sleep(0)
        first.cancel()
        may_end.set()
        assert (await second).number == 1
        await watch.close()

    asyncio.run(test())


def test_a_page_does_not_wait_for_a_silent_server(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "PATIENCE_SECONDS", 0.05)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(looks, "reach_servers", never)
    with page.client() as browser:
        assert "The servers are being asked." in browser.text()
