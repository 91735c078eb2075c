"""What a worker's metrics make of what it does; its health, and the pages that tell both."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dagster_taskiq.backend import ClaimAnswer
from dagster_taskiq.errors import ConfigError, UnreachableServerError
from dagster_taskiq.messages.envelope import Envelope, QueueKind, TaskName
from dagster_taskiq.messages.results import Outcome, TaskResult
from dagster_taskiq.messages.worker_records import PAUSED
from dagster_taskiq.monitoring import health as health_module
from dagster_taskiq.monitoring import pages as pages_module
from dagster_taskiq.monitoring.definitions import WORKER_METRICS
from dagster_taskiq.monitoring.exporter import Exporter
from dagster_taskiq.monitoring.health import WorkerHealth
from dagster_taskiq.monitoring.pages import Page, PageServer
from dagster_taskiq.monitoring.peaks import WINDOW_SECONDS, Peak
from dagster_taskiq.monitoring.queue_labels import MOST_UNKNOWN, OTHER, QueueLabels
from dagster_taskiq.monitoring.worker_metrics import OUTCOMES, Seen, WorkerMetrics
from dagster_taskiq.monitoring.worker_pages import WorkerPages
from dagster_taskiq.worker.leases import StopReason
from dagster_taskiq.worker.observer import Ending, LeaseRenewal
from dagster_taskiq.worker.options import WorkerOptions
from dagster_taskiq.worker.slot_base import ReplaceReason
from dagster_taskiq.worker.templates import CodeState
from dagster_taskiq.worker.worker import Worker
from dagster_taskiq_tests.messages import STEP_TASK
from dagster_taskiq_tests.unit.worker_stand_ins import PLACE

SECONDS = 20.0
OPTIONS = WorkerOptions("w", ("dagster",), slots=2, run_slots=1)
QUEUE = {"queue": "dagster", "kind": "steps"}
AWAY = UnreachableServerError("redis://a", "Cannot reach redis://a: refused.")
RESULT = TaskResult(Outcome.FINISHED, PLACE)
RUN = replace(STEP_TASK, name=TaskName.EXECUTE_JOB, step_key=None, attempt=0)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics("w@h", OPTIONS, WorkerHealth())


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"dagster_taskiq_worker_{name}", labels)


def test_all_metrics_of_the_table_are_there_and_no_others(metrics: WorkerMetrics) -> None:
    """With their types, labels and texts."""
    metrics.ended(STEP_TASK, Ending(Outcome.FINISHED, 0.0, 1.0))
    metrics.dropped(STEP_TASK, ClaimAnswer.DONE)
    metrics.claimed(STEP_TASK)
    metrics.completed(STEP_TASK, RESULT, is_cancelled=False, size_bytes=1)
    metrics.seen = Seen(code_states=lambda: [CodeState("m", is_warm=True)])
    found = {}
    for family in metrics.registry.collect():
        if not family.name.startswith("process_"):
            suffix = "_total" if family.type == "counter" else ""
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[family.name + suffix] = (family.type, labels, family.documentation)
    assert found == {it.name: (it.type.value, {*it.labels}, it.text) for it in WORKER_METRICS}


def test_a_scrape_tells_no_times_of_creation(metrics: WorkerMetrics) -> None:
    """They would be a second line for each counter."""
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert not [name for name in names if name.endswith("_created")]


def test_the_way_of_a_task_is_counted(metrics: WorkerMetrics) -> None:
    envelope = replace(STEP_TASK, sent_at=time.time() - 7, payload="x" * 3000)
    metrics.admitted(envelope)
    metrics.claimed(envelope)
    assert value(metrics, "busy_slots", kind="steps") == 1
    metrics.began(envelope, PLACE)
    metrics.ended(envelope, Ending(Outcome.FINISHED, 0.1, 2.0, step_end="success"))
    metrics.completed(envelope, RESULT, is_cancelled=False, size_bytes=5000)
    metrics.released(envelope)
    assert value(metrics, "busy_slots", kind="steps") == 0
    assert value(metrics, "tasks_started_total", **QUEUE) == 1
    assert value(metrics, "tasks_retried_total", **QUEUE) == 0
    assert value(metrics, "tasks_ended_total", **QUEUE, outcome="success") == 1
    assert value(metrics, "task_seconds_sum", **QUEUE) == 2
    assert value(metrics, "queue_wait_seconds_sum", **QUEUE) == pytest.approx(7, abs=2)
    assert value(metrics, "message_bytes_sum", **QUEUE) == 3000
    assert value(metrics, "result_bytes_sum", **QUEUE) == 5000


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (Ending(Outcome.FINISHED, 0, 1, step_end="failure"), "failure"),
        (Ending(Outcome.FINISHED, 0, 1, step_end="up_for_retry"), "up_for_retry"),
        (Ending(Outcome.FINISHED, 0, 1, step_end="skipped"), "skipped"),
        (Ending(Outcome.FINISHED, 0, 1), "finished"),
        (Ending(Outcome.UNLOGGED, 0, 1, step_end="success"), "unlogged"),
        (Ending(Outcome.DIED, 0, 1), "died"),
        (Ending(Outcome.ERROR, 0, None), "error"),
        (Ending(Outcome.FINISHED, 0, 1, stopped_by="CANCELLED"), "cancelled"),
        (Ending(Outcome.DIED, 0, 1, stopped_by="LEASE_LOST"), "stopped"),
        (Ending(Outcome.FINISHED, 0, 1, step_end="nonsense"), "finished"),
    ],
)
def test_how_a_task_ended_is_one_of_few_words(
    metrics: WorkerMetrics, ending: Ending, outcome: str
) -> None:
    metrics.ended(STEP_TASK, ending)
    counts = {it: value(metrics, "tasks_ended_total", **QUEUE, outcome=it) for it in OUTCOMES}
    assert {it for it, count in counts.items() if count} == {outcome}
    assert value(metrics, "task_seconds_count", **QUEUE) == (ending.run_seconds is not None)
    if ending.stopped_by:
        labels = {**QUEUE, "reason": ending.stopped_by.lower()}
        assert value(metrics, "tasks_stopped_total", **labels) == 1


def test_every_stop_has_a_counter_from_the_start(metrics: WorkerMetrics) -> None:
    """Its first increase would not be seen otherwise."""
    for reason in StopReason:
        labels = {**QUEUE, "reason": reason.name.lower()}
        assert value(metrics, "tasks_stopped_total", **labels) == 0


@pytest.mark.parametrize(
    ("envelope", "is_retry"),
    [
        (STEP_TASK, False),
        (replace(STEP_TASK, attempt=2), True),
        (RUN, False),
        (replace(RUN, name=TaskName.RESUME_JOB, attempt=1), True),
    ],
)
def test_a_later_attempt_is_a_retry(
    metrics: WorkerMetrics, envelope: Envelope, is_retry: bool
) -> None:
    metrics.began(envelope, PLACE)
    labels = {"queue": "dagster", "kind": envelope.kind.value}
    assert value(metrics, "tasks_retried_total", **labels) == is_retry


def test_a_wait_is_never_negative(metrics: WorkerMetrics) -> None:
    """The clocks of two hosts differ; a sender of another version may not say when it sent."""
    metrics.claimed(replace(STEP_TASK, sent_at=time.time() + 3600))
    metrics.claimed(replace(STEP_TASK, sent_at=0.0))
    assert value(metrics, "queue_wait_seconds_count", **QUEUE) == 1
    assert value(metrics, "queue_wait_seconds_sum", **QUEUE) == 0


def test_queues_that_nobody_has_configured_are_bounded(metrics: WorkerMetrics) -> None:
    """Without a key anybody can send a task that names any queue."""
    for number in range(MOST_UNKNOWN + 50):
        metrics.dropped(replace(STEP_TASK, queue=f"made up {number}"), ClaimAnswer.STALE)
    (family,) = (it for it in metrics.registry.collect() if it.name.endswith("tasks_dropped"))
    assert len(family.samples) == MOST_UNKNOWN + 1
    assert {it.value for it in family.samples if it.labels["queue"] == OTHER} == {50}


def test_a_known_queue_has_its_label_whatever_came_before() -> None:
    labels = QueueLabels(["known"])
    for number in range(2 * MOST_UNKNOWN):
        labels.of(str(number))
    assert labels.of("known") == "known"
    assert labels.of("0") == "0"
    assert labels.of("late") == OTHER


def test_what_goes_wrong_is_counted(metrics: WorkerMetrics) -> None:
    for what in ("a message", "an order", "an order to cancel", "something new"):
        metrics.refused("redis://a", what, ValueError())
    metrics.given_back(STEP_TASK)
    metrics.child_replaced(1, 4711, ReplaceReason.MEMORY)
    assert value(metrics, "messages_refused_total", what="message") == 2
    assert value(metrics, "messages_refused_total", what="order") == 1
    assert value(metrics, "messages_refused_total", what="cancel") == 1
    assert value(metrics, "tasks_given_back_total", **QUEUE) == 1
    assert value(metrics, "children_replaced_total", reason="memory") == 1


def test_an_outage_is_one_however_many_stations_hear_of_it(metrics: WorkerMetrics) -> None:
    metrics.outage("redis://a", AWAY)
    metrics.broker_away(QueueKind.STEPS, AWAY)
    metrics.broker_away(QueueKind.RUNS, AWAY)
    metrics.broker_back(QueueKind.STEPS)
    for role in ("broker", "backend"):
        assert value(metrics, "server_away", role=role) == 1
        assert value(metrics, "server_outages_total", role=role) == 1
    metrics.broker_back(QueueKind.RUNS)
    metrics.outage_over("redis://a")
    for role in ("broker", "backend"):
        assert value(metrics, "server_away", role=role) == 0


def test_renewals_are_measured(metrics: WorkerMetrics) -> None:
    """The gauge has the worst of the last minute, and all of a lease where none was renewed."""
    assert value(metrics, "lease_left_ratio") == 1
    metrics.renewed(LeaseRenewal(3, 0, 0.25, 0.4))
    metrics.renewed(LeaseRenewal(3, 0, 0.25, 0.8))
    assert value(metrics, "lease_left_ratio") == pytest.approx(0.4)
    assert value(metrics, "lease_renewal_seconds_sum") == 0.5


def test_a_lease_that_is_not_renewed_is_seen_before_anybody_answers() -> None:
    """A server that is frozen answers no renewal that could be measured."""
    clock = Clock()
    health = ready_health(clock)
    metrics = WorkerMetrics("w@h", OPTIONS, health)
    health.claimed(STEP_TASK)
    clock.now += 24
    assert value(metrics, "lease_left_ratio") == pytest.approx(0.2)
    health.released(STEP_TASK)
    assert value(metrics, "lease_left_ratio") == 1


def test_children_are_looked_at_when_it_is_asked(metrics: WorkerMetrics) -> None:
    """One that has just ended is left out, and a second scrape does not look again at once."""
    asked = []

    def pids() -> list[int]:
        asked.append(1)
        return [os.getpid(), 2**22 - 1]

    metrics.seen = Seen(lambda: "draining", lambda: {QueueKind.STEPS: 2}, pids)
    assert value(metrics, "children") == 1
    memory = value(metrics, "children_memory_bytes")
    assert memory == value(metrics, "largest_child_memory_bytes")
    assert memory is not None
    assert memory > 2**20
    assert value(metrics, "state", state="draining") == 1
    assert value(metrics, "slots", kind="steps") == 2
    assert value(metrics, "slots", kind="runs") == 0
    assert len(asked) == 1


# --- what the worst was ---


def test_the_worst_of_a_minute_is_forgotten_after_it() -> None:
    clock = Clock()
    peak = Peak(clock)
    for seconds, number in ((0, 5.0), (10, 3.0), (10, 4.0)):
        clock.now += seconds
        peak.note(number)
    assert peak.largest() == 5.0
    clock.now += WINDOW_SECONDS - 15
    assert peak.largest() == 4.0
    clock.now += WINDOW_SECONDS
    assert peak.largest() is None
    peak.note(1.0)
    assert peak.largest() == 1.0
    assert len(peak._values) == 1


# --- health ---


def texts(health: WorkerHealth, state: str = "running") -> list[str]:
    return [cause.text for cause in health.causes(state)]


def ready_health(clock: Clock) -> WorkerHealth:
    health = WorkerHealth(clock)
    health.ready()
    return health


def test_a_worker_is_healthy_when_it_is_ready() -> None:
    health = WorkerHealth(Clock())
    (cause,) = health.causes("running")
    assert "is not ready yet" in cause.text
    assert not cause.is_mended_by_restart
    health.ready()
    assert texts(health) == texts(health, "draining") == texts(health, PAUSED) == []
    for state in ("draining", PAUSED):
        assert "takes no new tasks" in health.note(state)


def test_a_worker_that_can_start_no_processes_is_not_healthy() -> None:
    assert "can start no processes" in texts(ready_health(Clock()), "no processes")[0]


def test_a_background_task_that_ended_is_said() -> None:
    health = ready_health(Clock())
    health.failed("leases")
    (cause,) = health.causes("running")
    assert "background task 'leases' has ended" in cause.text
    assert cause.is_mended_by_restart


def test_claims_that_cannot_be_renewed_are_said_with_the_reason() -> None:
    clock = Clock()
    health = ready_health(clock)
    health.outage("redis://a", AWAY)
    clock.now += 12
    (cause,) = health.causes("running")
    assert cause.text == "The worker has not renewed its claims for 12 s: " + str(AWAY)
    assert not cause.is_mended_by_restart  # or an outage would end all workers
    health.outage_over("redis://a")
    assert texts(health) == []


def test_claims_that_nobody_renews_are_said_though_no_outage_is() -> None:
    """By half of a lease, in which three renewals should have come."""
    clock = Clock()
    health = ready_health(clock)
    health.claimed(STEP_TASK)
    clock.now += 10
    health.renewed(LeaseRenewal(1, 0, 1.0, 0.9))
    clock.now += 13
    assert texts(health) == []
    clock.now += 2
    assert "has not renewed 1 of its claims for up to 16 s" in texts(health)[0]
    health.released(STEP_TASK)
    assert texts(health) == []


def test_a_loop_that_hangs_is_seen_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, while the loop hangs; and not any more when it goes round again."""
    monkeypatch.setattr(health_module, "LONGEST_LAG_SECONDS", 0.1)
    with closing(WorkerPages("127.0.0.1", 0, OPTIONS)) as pages:
        pages.ready()
        worker = cast(
            "Worker", SimpleNamespace(state="running", slots={}, child_pids=[], code_states=[])
        )

        async def hang() -> None:
            pages.watch(worker)
            assert get(pages, "/health") == (200, "The worker is running.\n")
            deadline = time.monotonic() + SECONDS
            while get(pages, "/health")[0] != HTTPStatus.SERVICE_UNAVAILABLE:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # noqa: ASYNC251 - that is what is tested
            status, text = get(pages, "/live")
            assert status == HTTPStatus.SERVICE_UNAVAILABLE
            assert text.startswith("The worker's event loop, which renews claims, has hung for ")
            await until(lambda: get(pages, "/health")[0] == HTTPStatus.OK)
            _, metrics = get(pages, "/metrics")
            (lag,) = (it for it in metrics.splitlines() if it.startswith(f"{LAG} "))
            assert float(lag.split()[1]) > 0.1
            pages.unwatch()

        asyncio.run(hang())


LAG = "dagster_taskiq_worker_event_loop_lag_seconds"


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def get(pages: WorkerPages | PageServer | Exporter, path: str, **headers: str) -> tuple[int, str]:
    """Status and text of a page."""
    request = urllib.request.Request(f"{pages.url}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


# --- the pages ---


@contextmanager
def served(**pages: Any) -> Iterator[PageServer]:
    made = {f"/{name}": make for name, make in pages.items()}
    with closing(PageServer("127.0.0.1", 0, made)) as server:
        server.start()
        yield server


def test_pages_are_found_by_their_paths() -> None:
    with served(a=lambda accept: Page(accept.encode()), b=lambda _: Page(b"b")) as server:
        assert get(server, "/a?x=1", Accept="this") == (200, "this")
        assert get(server, "/c") == (404, "There is no such page. There are: /a, /b\n")
        request = urllib.request.Request(f"{server.url}/b", method="HEAD")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert (answer.headers["Content-Length"], answer.read()) == ("1", b"")


def test_a_page_that_cannot_be_made_is_said_here_and_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: str) -> Page:
        raise ZeroDivisionError

    with served(a=fail) as server:
        assert get(server, "/a")[0] == HTTPStatus.INTERNAL_SERVER_ERROR
    assert "/a cannot be answered." in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_says_nothing_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do many: above a bound they are hung up on, and later their places are free again."""
    monkeypatch.setattr(pages_module, "_MOST_REQUESTS", 2)
    with served(a=lambda _: Page(b"a")) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address, SECONDS) as silent:
            assert get(server, "/a") == (200, "a")
            with ExitStack() as others:
                clients = [
                    others.enter_context(socket.create_connection(address, SECONDS))
                    for _ in range(3)
                ]
                hung_up, _, _ = select.select(clients, [], [], SECONDS)
                assert [client.recv(1) for client in hung_up] == [b""] * len(hung_up) != []
            silent.sendall(b"GET /a HTTP/1.0\r\n\r\n")
            assert silent.makefile("rb").read().endswith(b"\r\n\r\na")
        assert _within(lambda: get(server, "/a") == (200, "a"))


def _within(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if condition():
                return True
        except OSError:  # it was hung up on
            time.sleep(0.05)
    return False


def test_a_port_that_is_taken_is_said_in_a_sentence() -> None:
    with closing(PageServer("127.0.0.1", 0, {})) as server:
        said = rf"on 127\.0\.0\.1, port {server.port}: Address already in use\."
        with pytest.raises(ConfigError, match=said):
            PageServer("127.0.0.1", server.port, {})
    with pytest.raises(ConfigError, match="Cannot serve metrics on no host, port 1"):
        PageServer("no host", 1, {})


def test_nothing_is_left_when_the_pages_are_closed() -> None:
    before = set(threading.enumerate())
    with served(a=lambda _: Page(b"a")) as server:
        get(server, "/a")
        port = server.port
    assert _within(lambda: set(threading.enumerate()) <= before)
    with closing(PageServer("127.0.0.1", port, {})) as again:
        assert again.port == port


def test_pages_on_an_address_of_the_sixth_version() -> None:
    if not socket.has_ipv6:
        pytest.skip("this host has no IPv6")
    with closing(PageServer("::1", 0, {})) as server:
        assert server.url == f"http://[::1]:{server.port}"


def test_the_address_of_the_metrics_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A port of 0 is known from there alone; before the worker is made it is starting."""
    caplog.set_level(logging.INFO)
    with closing(WorkerPages("127.0.0.1", 0, OPTIONS)) as pages:
        assert f"Metrics are on {pages.url}/metrics" in caplog.text
        assert get(pages, "/health")[0] == HTTPStatus.SERVICE_UNAVAILABLE
        assert get(pages, "/live") == (200, "The worker is starting.\n")
        status, text = get(pages, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert status == HTTPStatus.OK
        assert text.endswith("# EOF\n")
        assert 'dagster_taskiq_worker_state{state="starting"} 1.0' in text
